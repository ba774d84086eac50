// Draws the figures in the colours of the page, and again when those change between light and dark.
const plots = JSON.parse(document.getElementById("plots").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  for (const [name, figure] of Object.entries(plots)) {
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
    const layout = { ...figure.layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: "system-ui, sans-serif" },
      xaxis: { ...axis, ...figure.layout.xaxis, title: { text: figure.layout.xaxis.title } },
      yaxis: { ...axis, ...figure.layout.yaxis, title: { text: figure.layout.yaxis.title } } };
    Plotly.react(name, figure.data, layout, { responsive: true, displayModeBar: false });
  }
}
dark.addEventListener("change", draw);
draw();
