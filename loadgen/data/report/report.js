// Draws the figures in #figures with the page's own colours, and again when the colour scheme changes.
// Colours in the figures are names of CSS variables ("--c0", "--soft/40": 40 % opaque), resolved here.
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const narrow = matchMedia("(max-width: 700px)");

function colour(name) {
  const [variable, percent] = name.split("/");
  const hex = getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
  return percent ? hex + Math.round(percent * 2.55).toString(16).padStart(2, "0") : hex;
}

function themed(value) {
  if (typeof value === "string") return value.startsWith("--") ? colour(value) : value;
  if (Array.isArray(value)) return value.every(x => typeof x === "number" || x === null) ? value : value.map(themed);
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
  return value;
}

function draw() {
  for (const [id, figure] of Object.entries(figures)) {
    const layout = themed(figure.layout);
    if (id === "distributions" && narrow.matches) layout.grid = { ...layout.grid, rows: layout.grid.columns, columns: 1 };
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--soft") };
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.hoverlabel = { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--ink") } };
    for (const axis of Object.keys(layout).filter(k => /^[xy]axis/.test(k)))
      layout[axis] = { gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false, automargin: true,
        tickcolor: colour("--line"), ...layout[axis] };
    Plotly.react(id, themed(figure.data), layout,
      { displayModeBar: false, responsive: true });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
narrow.addEventListener("change", draw);
addEventListener("beforeprint", draw);
addEventListener("afterprint", draw);
