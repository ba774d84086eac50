"""The figures of a comparison page, as plotly JSON; colours are CSS variables that report.js resolves.

No name that a user gave gets into plotly unescaped; runs are named by id in the hover text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loadgen.core.compare import Ratio
from loadgen.core.scenario import Kind
from loadgen.core.verdict import limited
from loadgen.edge import physics
from loadgen.edge.compare_grid import GridView, interval
from loadgen.edge.compare_report import Comparison
from loadgen.edge.fingerprint import cell_of, fingerprint, hardware, model_of
from loadgen.edge.hardware_catalogue import BYTES
from loadgen.edge.report_plots import Figure, colour
from loadgen.edge.store import Run

MARGIN = {"l": 60, "r": 20, "t": 30, "b": 46}


def plain(text: str) -> str:
    """Plotly reads a few HTML tags in names: none may come from a user."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def heat_map(view: GridView) -> Figure:
    """Gain over the baseline cell, darker is more; a hole is an empty field with a dash."""
    grid, gains = view.grid, view.gains.total
    z, text, hover = [], [], []
    for h in grid.hardware:
        row = [gains.get((h, b)) for b in grid.backends]
        z.append([math.log2(g.ratio) if g else None for g in row])
        text.append([_label(view, (h, b), g) for b, g in zip(grid.backends, row, strict=True)])
        hover.append([plain(", ".join(view.cells[h, b].run_ids)) if (h, b) in view.cells else ""
                      for b in grid.backends])  # fmt: skip
    data: dict[str, Any] = {
        "type": "heatmap", "x": [plain(b) for b in grid.backends], "y": [plain(h) for h in grid.hardware], "z": z,
        "customdata": hover, "text": text, "texttemplate": "%{text}", "showscale": False, "hoverongaps": False,
        "colorscale": [[0, "--c0/12"], [1, "--c0/75"]], "xgap": 3, "ygap": 3, "textfont": {"color": "--ink"},
        "hovertemplate": "%{y}, %{x}<br>runs %{customdata}<extra></extra>",
    }  # fmt: skip
    holes = [{"x": plain(b), "y": plain(h), "text": "not measured", "showarrow": False, "font": {"color": "--soft"}}
             for h, b in grid.holes]  # fmt: skip
    axes = {"xaxis": {"side": "top", "type": "category"}, "yaxis": {"autorange": "reversed", "type": "category"}}
    return {"data": [data], "layout": {"margin": {**MARGIN, "l": 130}, "annotations": holes, **axes}}


def _label(view: GridView, cell: tuple[str, str], gain: Ratio | None) -> str:
    if gain is None:
        return ""
    return "<b>1×</b><br>baseline" if cell == view.baseline else f"<b>{gain.ratio:.3g}×</b><br>{interval(gain)}"


def slopes(view: GridView) -> Figure:
    """Throughput of each backend from one GPU to the next: steeper is more hardware gain, apart is compiler gain."""
    data = []
    for i, b in enumerate(view.grid.backends):
        found = [(h, view.grid.cells.get((h, b))) for h in view.grid.hardware]
        y = [None if m is None else _value(view, m.log) for _, m in found]
        ids = [", ".join(view.cells[h, b].run_ids) if m is not None else "" for h, m in found]
        data.append({"type": "scatter", "mode": "lines+markers", "name": plain(b), "connectgaps": False,
                     "x": [plain(h) for h in view.grid.hardware], "y": y, "customdata": [plain(x) for x in ids],
                     "line": {"color": colour(i), "width": 2.5}, "marker": {"size": 9, "color": colour(i), "symbol": i},
                     "hovertemplate": "%{x}: %{y:.4g}<br>runs %{customdata}"})  # fmt: skip
    title = plain(f"{view.figure.label}, {view.figure.unit}")
    axes = {"xaxis": {"type": "category"}, "yaxis": {"title": {"text": title}, "type": "log"}}
    return {"data": data, "layout": {"margin": MARGIN, "legend": {"orientation": "h", "y": 1.15}, **axes}}


def _value(view: GridView, log: float) -> float:
    return math.exp(-log if view.figure.lower else log) / view.figure.scale


def curves(c: Comparison, model: str) -> Figure | None:
    """Throughput against p99 latency of the runs at several rates or concurrencies, with their limits. None without."""
    groups: dict[str, list[Run]] = {}
    for run in c.runs:
        if model_of(run) == model and run.scenario.kind in (Kind.SERVER, Kind.CONCURRENCY) and _p99(run) is not None:
            name = run.scenario.name.replace("_", " ")  # a server's rate and a concurrency are two curves
            groups.setdefault(f"{cell_of(fingerprint(run))}, {name}", []).append(run)
    if not any(len({r.scenario.target_qps or r.scenario.concurrency for r in g}) > 1 for g in groups.values()):
        return None
    video = any(r.scenario.clip is not None for g in groups.values() for r in g)
    data = []
    for i, (cell, runs) in enumerate(groups.items()):
        made = "qps" if video else "tokens_per_s"
        points = sorted(((float(r.summary[made]), _p99(r), r) for r in runs), key=lambda point: point[0])
        data.append({"type": "scatter", "mode": "lines+markers", "name": plain(cell), "x": [p[0] for p in points],
                     "y": [p[1] for p in points], "line": {"color": colour(i), "width": 2},
                     "customdata": [plain(str(p[2].document["run_id"])) for p in points],
                     "hovertemplate": "%{x:.4g} at %{y:.4g} ms<br>run %{customdata}"})  # fmt: skip
    name = "E2E" if video else "TPOT"
    layout: Figure = {"margin": MARGIN, "legend": {"orientation": "h", "y": 1.15}, "shapes": [], "annotations": [],
                      "xaxis": {"title": {"text": "videos/s" if video else "tokens/s"}, "rangemode": "tozero"},
                      "yaxis": {"title": {"text": f"{name} p99, ms"}, "type": "log"}}  # fmt: skip
    column = "e2e_ns" if video else "tpot_ns"
    for ns in sorted({v for g in groups.values() for r in g for n, v in limited(r.scenario.limits) if n == column}):
        layout["shapes"].append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": ns / 1e6, "y1": ns / 1e6,
                                 "line": {"color": "--bad", "width": 1.5, "dash": "dashdot"}})  # fmt: skip
        layout["annotations"].append({"xref": "paper", "x": 0, "y": math.log10(ns / 1e6), "yanchor": "bottom",
                                      "xanchor": "left", "text": "limit", "showarrow": False,
                                      "font": {"color": "--bad", "size": 11}})  # fmt: skip
    return {"data": data, "layout": layout}


def _p99(run: Run) -> float | None:
    ns = run.summary.get("e2e_ns" if run.scenario.clip is not None else "tpot_ns", {}).get("p99")
    return None if ns is None else ns / 1e6


def rooflines(runs: Sequence[Run]) -> Figure | None:
    """Operations per second over operations per byte: the roof of each GPU, and where each run is. None without any."""
    data: list[dict[str, Any]] = []
    roofs: dict[str, int] = {}
    for run in runs:
        precision = str(run.document.get("precision", ""))
        for work in physics.works(run):
            machine = hardware(run).machine(precision)
            if machine is None or precision not in BYTES:
                continue
            several = f"{machine.gpus}x " if machine.gpus > 1 else ""  # that share one copy of the model
            key = f"{several}{machine.name} {precision}"
            if key not in roofs:
                roofs[key] = len(roofs)
                turn = machine.flops_s / machine.bandwidth_bytes_s if machine.flops_s else 1e4
                x = [0.1, turn, max(1e4, 4 * turn)]
                y = [min(i * machine.bandwidth_bytes_s, machine.flops_s or math.inf) / 1e12 for i in x]
                data.append({"type": "scatter", "mode": "lines", "name": plain(f"{key}, {machine.source}"), "x": x,
                             "y": y, "line": {"color": colour(roofs[key]), "width": 2},
                             "hoverinfo": "name"})  # fmt: skip
            data.append({"type": "scatter", "mode": "markers", "showlegend": False, "x": [work.intensity],
                         "y": [work.limit.flops / work.measured_s / 1e12],
                         "name": plain(f"{model_of(run)} {work.name}, {cell_of(fingerprint(run))}"),
                         "customdata": [plain(str(run.document["run_id"]))],
                         "hovertemplate": f"{work.share:.1%} of the limit<br>run %{{customdata}}",
                         "marker": {"color": colour(roofs[key]), "size": 10,
                                    "symbol": "circle" if work.name == "decode" else "diamond"}})  # fmt: skip
    if not data:
        return None
    return {"data": data, "layout": {
        "margin": MARGIN, "legend": {"orientation": "h", "y": 1.18}, "hovermode": "closest",
        "xaxis": {"type": "log", "title": {"text": "operations per byte needed"}},
        "yaxis": {"type": "log", "title": {"text": "TFLOPS needed and reached"}},
    }}  # fmt: skip
