"""The plots of a run as plotly figures (plain dicts), small whatever the number of rows.

Distributions are drawn through a few hundred quantiles, series through a few hundred time bins; a run of a million
requests makes a page no larger than a run of a thousand.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loadgen.core.metrics import concatenate, percentile_name, tpot, ttft, without_chunks
from loadgen.core.record import NEVER, Int64, Rows
from loadgen.edge.store import Run

BINS = 240
QUANTILES = np.concatenate([np.linspace(0, 0.98, 250), np.linspace(0.98, 1, 150)[1:]])
# Okabe-Ito, distinct to colour-blind readers, with enough contrast on white and on black
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"

Figure = dict[str, Any]


def figures(run: Run) -> list[Figure]:
    """Latency distribution, latency over time, throughput and requests in flight over time; empty without rows."""
    kept: list[Rows] = []
    end_ns = max(int(run.summary["duration_s"] * 1e9), 1)
    edges = np.linspace(0, end_ns, min(BINS, max(10, run.summary["scheduled"])) + 1)
    tokens = np.zeros(len(edges) - 1)
    for rows in run.rows():
        where = np.clip(np.searchsorted(edges, rows.chunk_ns, "right") - 1, 0, len(tokens) - 1)
        tokens += np.bincount(where, weights=rows.chunk_tokens, minlength=len(tokens))
        kept.append(without_chunks(rows))
    rows = concatenate(kept)
    if not len(rows):
        return []
    return [distribution(run, rows), over_time(run, rows, edges), throughput(edges, tokens), in_flight(rows, edges)]


def distribution(run: Run, rows: Rows) -> Figure:
    """Cumulative share of requests over latency; failures keep the curves below 100 %."""
    scenario, n = run.scenario, len(rows)
    answered = rows.ok & (rows.first_ns != NEVER)
    curves = [
        ("TTFT", ttft(rows), BLUE, "solid"),
        ("TTFT from send", (rows.first_ns - rows.sent_ns)[answered], BLUE, "dot"),
        ("TPOT", tpot(rows), ORANGE, "solid"),
        ("E2E", (rows.done_ns - rows.due_ns)[rows.ok], GREEN, "solid"),
        ("E2E from send", (rows.done_ns - rows.sent_ns)[rows.ok], GREEN, "dot"),
    ]
    data = [_curve(name, values, n, colour, dash) for name, values, colour, dash in curves if len(values)]
    limits = [("TTFT", scenario.limits.ttft_ns, BLUE), ("TPOT", scenario.limits.tpot_ns, ORANGE),
              ("E2E", scenario.limits.e2e_ns, GREEN)]  # fmt: skip
    shapes, notes = [], []
    for name, limit, colour in limits:
        if limit is not None:
            x = float(np.log10(limit / 1e6))
            shapes.append({"type": "line", "x0": limit / 1e6, "x1": limit / 1e6, "y0": 0, "y1": 1, "yref": "paper",
                           "line": {"color": colour, "width": 1, "dash": "dash"}})  # fmt: skip
            notes.append({"x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "text": f"{name} limit",
                          "showarrow": False, "font": {"color": colour, "size": 11}})  # fmt: skip
    goal = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": scenario.percentile, "y1": scenario.percentile,
            "line": {"color": "#888", "width": 1, "dash": "dot"}}  # fmt: skip
    return _figure(
        f"Latency distribution (dotted: from send; grey: {percentile_name(scenario.percentile)})", data,
        xaxis={"title": "ms", "type": "log"},
        yaxis={"title": "share of requests", "range": [0, 1.02], "tickformat": ".0%"},
        shapes=[*shapes, goal], annotations=notes,
    )  # fmt: skip


def _curve(name: str, values: Int64, n: int, colour: str, dash: str) -> Figure:
    ordered = np.sort(values)
    index = np.unique((QUANTILES * (len(ordered) - 1)).astype(np.int64))
    return {"type": "scatter", "mode": "lines", "name": name, "x": _ms(ordered[index]),
            "y": ((index + 1) / n).round(5).tolist(),
            "line": {"color": colour, "dash": dash, "width": 2 if dash == "solid" else 1.3}}  # fmt: skip


def over_time(run: Run, rows: Rows, edges: np.ndarray) -> Figure:
    """E2E and TTFT by due time: every request when they are few, else p50 and p99 of each bin; failures in red."""
    data = []
    bad = np.flatnonzero(~rows.ok)
    keep = rows.ok & (rows.first_ns != NEVER)
    for name, end_ns, colour in (("E2E", rows.done_ns, GREEN), ("TTFT", rows.first_ns, BLUE)):
        due, latency = rows.due_ns[keep], (end_ns - rows.due_ns)[keep]
        if len(due) <= 3 * BINS:
            order = np.argsort(due, kind="stable")
            data.append({"type": "scatter", "mode": "markers", "name": name, "x": _s(due[order]),
                         "y": _ms(latency[order]), "marker": {"color": colour, "size": 4, "opacity": 0.7}})  # fmt: skip
        else:
            data += _bands(name, due, latency, edges, colour)
    if len(bad):
        few = bad[:: max(1, len(bad) // BINS)]
        data.append({"type": "scatter", "mode": "markers", "name": f"failed ({len(bad)})", "x": _s(rows.due_ns[few]),
                     "y": [0] * len(few), "marker": {"color": RED, "symbol": "x", "size": 8}})  # fmt: skip
    title = "Latency by due time" + ("" if run.scenario.kind.open_loop else " (closed loop)")
    return _figure(title, data, xaxis={"title": "due, s"}, yaxis={"title": "ms", "rangemode": "tozero"})


def _bands(name: str, due: Int64, latency: Int64, edges: np.ndarray, colour: str) -> list[Figure]:
    where = np.searchsorted(edges, due, "right") - 1
    order = np.lexsort((latency, where))
    bins, first, count = np.unique(where[order], return_index=True, return_counts=True)
    middle = ((edges[:-1] + edges[1:]) / 2)[np.clip(bins, 0, len(edges) - 2)]
    out = []
    for p, dash in ((0.5, "solid"), (0.99, "dot")):
        values = latency[order][first + np.minimum((count * p).astype(np.int64), count - 1)]
        out.append({"type": "scatter", "mode": "lines", "name": f"{name} {percentile_name(p)}", "x": _s(middle),
                    "y": _ms(values), "line": {"color": colour, "dash": dash, "width": 1.5}})  # fmt: skip
    return out


def throughput(edges: np.ndarray, tokens: np.ndarray) -> Figure:
    """Output tokens per second by arrival, of every measured request."""
    width_s = (edges[1] - edges[0]) / 1e9
    data = [_steps("tokens/s", edges[:-1], (tokens / width_s).round(1), PURPLE) | {"fill": "tozeroy"}]
    return _figure("Throughput", data, xaxis={"title": "s"}, yaxis={"title": "tokens/s", "rangemode": "tozero"})


def in_flight(rows: Rows, edges: np.ndarray) -> Figure:
    """Requests between send and done, and requests that are due and not yet done: the queue the users feel."""
    data = []
    for name, starts, colour in (("due and not done", rows.due_ns, GREEN), ("in flight", rows.sent_ns, ORANGE)):
        began, done = (
            np.sort(starts[starts != NEVER]),
            np.sort(rows.done_ns[(starts != NEVER) & (rows.done_ns != NEVER)]),
        )
        open_ = np.searchsorted(began, edges, "right") - np.searchsorted(done, edges, "right")
        data.append(_steps(name, edges, np.maximum(open_, 0), colour))
    return _figure("Requests", data, xaxis={"title": "s"}, yaxis={"title": "requests", "rangemode": "tozero"})


def _steps(name: str, x_ns: np.ndarray, y: np.ndarray, colour: str) -> Figure:
    return {"type": "scatter", "mode": "lines", "name": name, "x": _s(x_ns), "y": y.tolist(),
            "line": {"color": colour, "width": 1.5, "shape": "hv"}}  # fmt: skip


def _figure(title: str, data: list[Figure], **layout: Any) -> Figure:
    base = {"title": {"text": title, "x": 0.01, "font": {"size": 14}}, "margin": {"l": 55, "r": 15, "t": 45, "b": 75},
            "height": 340, "legend": {"orientation": "h", "y": -0.25}, "hovermode": "closest"}  # fmt: skip
    return {"data": data, "layout": base | layout}


def _ms(ns: np.ndarray) -> list[float]:
    return (np.asarray(ns) / 1e6).round(3).tolist()


def _s(ns: np.ndarray) -> list[float]:
    return (np.asarray(ns) / 1e9).round(3).tolist()
