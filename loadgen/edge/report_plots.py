"""Plotly figures of runs, as plain JSON: distributions of all runs over each other, and each run over time.

Colours are names of the page's CSS variables; `report.js` resolves them, so that the page has a light and a dark form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loadgen.core.metrics import METRICS, percentile_name
from loadgen.core.scenario import Limits
from loadgen.edge.report_data import facts
from loadgen.edge.report_series import BANDS, TEXT, Series
from loadgen.edge.store import Run

Figure = dict[str, Any]
COLOURS = 7
_LABELS = {m.name.removesuffix("_ns"): m.label for m in METRICS}
_TICKS = (0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
# Band to dash, width and opacity: three shades of one line, told apart without colour.
_STYLE = {"p50": ("solid", 2, None), "p90": ("solid", 1, 60), "p99": ("dot", 1.2, None)}


def colour(run: int, percent: int | None = None) -> str:
    """The CSS variable of a run's colour, at an opacity."""
    return f"--c{run % COLOURS}" + (f"/{percent}" if percent else "")


def nines(p: float) -> float:
    """The place of a percentile on the axis: 90 to 99 % gets as much room as 99 to 99.9 %: tails matter most."""
    return -math.log10(max(1 - p, 1e-9))


def distributions(runs: Sequence[Run], found: list[Series]) -> Figure:
    """TTFT, TPOT and E2E (of a video start, step, E2E): share of all requests that were as fast, solid from due, dashed
    from send."""
    data: list[dict[str, Any]] = []
    layout: Figure = {"grid": {"rows": 1, "columns": 3, "pattern": "independent"}, "hovermode": "closest",
                      "margin": {"l": 46, "r": 10, "t": 34, "b": 40}, "shapes": [], "annotations": [],
                      "legend": {"orientation": "h", "y": 1.22, "x": 0}}  # fmt: skip
    panels = found[0].names if found else TEXT
    curves = [s.cdf[name] for s in found for name in panels if name in s.cdf]
    top = max((nines(c["p"][-1]) for c in curves if c["p"]), default=1.0)
    for n, name in enumerate(panels, start=1):
        axis = str(n) if n > 1 else ""
        for i, (run, series) in enumerate(zip(runs, found, strict=True)):
            for kind in (name, f"{name}_sent"):
                if kind in series.cdf:
                    data.append(_curve(run, i, series.cdf[kind], kind, axis, len(runs) > 1))
        values = [x for s in found for x in s.cdf.get(name, {"x": []})["x"] if x > 0]
        wide = bool(values) and max(values) > 20 * min(values)
        layout[f"xaxis{axis}"] = {"title": {"text": f"{_LABELS[name]}, ms"}, "type": "log" if wide else "linear",
                                  "rangemode": "tozero", **({"dtick": "D2"} if wide else {})}  # fmt: skip
        layout[f"yaxis{axis}"] = {"tickvals": [nines(p) for p in _TICKS], "ticktext": [f"{p:.6g} %" for p in
                                  (100 * t for t in _TICKS)], "range": [0, top * 1.06]}  # fmt: skip
        _limit_lines(layout, runs, name, axis, wide)
    return {"data": data, "layout": layout}


def _curve(run: Run, index: int, points: dict[str, list[float]], kind: str, axis: str, several: bool) -> dict[str, Any]:
    from_send = kind.endswith("_sent")
    name = (facts(run)["scenario"] + ", " if several else "") + ("from send" if from_send else "from due")
    return {
        "type": "scatter", "mode": "lines", "x": points["x"], "y": [round(nines(p), 5) for p in points["p"]],
        "customdata": [round(p * 100, 5) for p in points["p"]], "name": _plain(name),
        "legendgroup": f"{index}{from_send}", "showlegend": axis == "", "xaxis": f"x{axis}",
        "yaxis": f"y{axis}", "line": {"color": colour(index), "width": 1.4 if from_send else 2,
                                      "dash": "dash" if from_send else "solid", "shape": "hv"},
        "hovertemplate": "%{customdata} % within %{x} ms",
    }  # fmt: skip


def _limit_lines(layout: Figure, runs: Sequence[Run], name: str, axis: str, log: bool) -> None:
    """A vertical line at each latency limit, once where runs share it; named where others have none."""
    having: dict[int, list[Run]] = {}
    for run in runs:
        if (ns := _limit(run.scenario.limits, name)) is not None:
            having.setdefault(ns, []).append(run)
    where = {"xref": f"x{axis}", "yref": f"y{axis} domain"}
    for ns, owners in having.items():
        at = percentile_name(owners[0].scenario.percentile)
        owner = f"{facts(owners[0])['scenario']} " if len(owners) < len(runs) else ""
        ms = ns / 1e6
        layout["shapes"].append({"type": "line", "x0": ms, "x1": ms, "y0": 0, "y1": 1, **where,
                                 "line": {"color": "--bad", "width": 1.5, "dash": "dashdot"}})  # fmt: skip
        layout["annotations"].append({"x": math.log10(ms) if log else ms, "y": 1, "yanchor": "bottom", **where,
                                      "text": _plain(f"{owner}limit at {at}"), "showarrow": False,
                                      "font": {"color": "--bad", "size": 11}})  # fmt: skip


def _limit(limits: Limits, name: str) -> int | None:
    value: int | None = getattr(limits, f"{name}_ns", None)
    return value


def over_time(run: Run, index: int, series: Series) -> Figure:
    """TTFT, E2E, tokens/s (of a video start, E2E, frames/s) and requests in flight of one run over one time axis,
    failures as crosses on the axis."""
    data: list[dict[str, Any]] = []
    first, made = series.names[0], "tokens/s" if series.names == TEXT else "frames/s"
    titles = (f"{_LABELS[first]}, ms", "E2E, ms", made, "in flight")
    layout: Figure = {"margin": {"l": 60, "r": 10, "t": 24, "b": 40}, "hovermode": "x", "shapes": [],
                      "legend": {"orientation": "h", "y": 1.06, "x": 0}, "showlegend": True,
                      "xaxis": {"range": [0, series.end_s], "anchor": "y4",
                                "title": {"text": "s from T0"}}}  # fmt: skip
    for n, title in enumerate(titles):
        top = 1 - n * 0.255
        layout["yaxis" + (str(n + 1) if n else "")] = {"title": {"text": title}, "rangemode": "tozero",
                                                       "domain": [round(top - 0.215, 3), round(top, 3)]}  # fmt: skip
    for axis, name in (("", first), ("2", "e2e")):
        data += _latency_traces(series, name, index, axis)
        limit = _limit(run.scenario.limits, name)
        highest = max((y for k in ("y", "p99") for y in series.over_time[name].get(k, ()) if y), default=0)
        if limit is not None and limit / 1e6 < 1.5 * highest:  # a limit far above would press the data flat
            layout["shapes"].append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": f"y{axis}",
                                     "y0": limit / 1e6, "y1": limit / 1e6,
                                     "line": {"color": "--bad", "width": 1.5, "dash": "dashdot"}})  # fmt: skip
    steps = {"type": "scatter", "mode": "lines", "xaxis": "x", "showlegend": False}
    line = {"color": colour(index), "width": 1.5, "shape": "hv"}
    data.append({**steps, "x": series.tokens_per_s["t"], "y": series.tokens_per_s["y"], "yaxis": "y3", "line": line,
                 "fill": "tozeroy", "fillcolor": colour(index, 15), "name": made})  # fmt: skip
    data.append({**steps, "x": series.in_flight["t"], "y": series.in_flight["y"], "yaxis": "y4", "line": line,
                 "name": "in flight"})  # fmt: skip
    return {"data": data, "layout": layout}


def _latency_traces(series: Series, name: str, index: int, axis: str) -> list[dict[str, Any]]:
    points = series.over_time[name]
    first = name == series.names[0]
    base: dict[str, Any] = {"type": "scatter", "xaxis": "x", "yaxis": f"y{axis}", "showlegend": first}
    out: list[dict[str, Any]] = []
    if "y" in points:
        out.append({**base, "mode": "markers", "x": points["t"], "y": points["y"], "name": "a request",
                    "legendgroup": "request", "marker": {"color": colour(index, 70), "size": 5}})  # fmt: skip
    else:
        for band in BANDS:
            dash, width, opacity = _STYLE[band]
            line = {"color": colour(index, opacity), "width": width, "dash": dash}
            out.append({**base, "mode": "lines", "x": points["t"], "y": points[band], "name": band,
                        "legendgroup": band, "connectgaps": False, "line": line})  # fmt: skip
    if series.failures:
        out.append({**base, "mode": "markers", "x": series.failures, "y": [0] * len(series.failures), "name": "failed",
                    "legendgroup": "failed", "cliponaxis": False, "hoverinfo": "x+name",
                    "marker": {"color": "--bad", "symbol": "x-thin", "size": 8,
                               "line": {"color": "--bad", "width": 2}}})  # fmt: skip
    return out


def _plain(text: str) -> str:
    """Plotly reads a few HTML tags in names: none may come from a user."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
