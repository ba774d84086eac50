"""Rows → the few hundred points that a plot needs, whatever the length of the run.

Memory: 37 bytes a row; chunks are folded batch by batch. A failed request has no point on a latency curve: the
distribution stops short of 100 % by the failed share, and plots over time mark failures on the axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadgen.core.clips import mean_step
from loadgen.core.metrics import tpot, ttft
from loadgen.core.record import NEVER, Bool, Int64, Rows
from loadgen.core.scenario import Kind
from loadgen.edge.store import Run

Float = npt.NDArray[np.float64]
QUANTILES = 400
BINS = 240
POINTS = 1500  # up to as many requests are drawn one by one
BANDS = ("p50", "p90", "p99")
_NAMES = ("due", "sent", "done", "failed", "ttft", "tpot", "e2e")
TEXT, VIDEO = ("ttft", "tpot", "e2e"), ("start", "step", "e2e")


@dataclass
class Series:
    """What is plotted of one run: times in s from T0, latencies in ms; None where there is no value."""

    cdf: dict[str, dict[str, list[float]]]  # "ttft", "ttft_sent" …: x (ms), p
    over_time: dict[str, dict[str, list[float | None]]]  # "ttft", "e2e": t with y (few rows) or p50, p90, p99
    failures: list[float]
    tokens_per_s: dict[str, list[float]]
    in_flight: dict[str, list[float]]
    end_s: float
    by: str  # "due time" or "completion": what the time axis of the latencies is
    names: tuple[str, str, str] = TEXT  # of the three latencies; a video has `start` and `step` in place of tokens


def series(run: Run) -> Series:
    """Reads the rows of a run once. About 2 s for a million rows without chunks."""
    last_s = float(run.summary["duration_s"] or 0)
    video = run.scenario.clip is not None
    made = run.summary["frames_out" if video else "tokens_out"]
    edges = _edges(last_s, int(made or 0) // 50)
    tokens = np.zeros(len(edges) - 1)
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for rows in run.rows():
        tokens += _tokens(rows, edges)
        parts.append(_columns(rows, video))
    c = {name: np.concatenate([p[name] for p in parts]) if parts else np.empty(0) for name in _NAMES}
    times = np.concatenate([c["due"], c["done"]])
    end = float(max(times[times != NEVER].max(initial=0) / 1e9, last_s))
    at_end = run.scenario.kind is Kind.OFFLINE  # all is due at 0: only the end of a request tells them apart
    when = np.where(c["done"] == NEVER, end * 1e9, c["done"]) if at_end else c["due"]
    ok = ~c["failed"].astype(bool)
    out = Series(_distributions(c, ok), {}, _thinned(when[~ok] / 1e9), {}, _in_flight(c, end), end,
                 "completion" if at_end else "due time", VIDEO if video else TEXT)  # fmt: skip
    for name in ("ttft", "e2e"):
        out.over_time[name] = _over_time(when / 1e9, c[name], end)
    if video:
        for points in (out.cdf, out.over_time):
            for old, new in (("ttft", "start"), ("tpot", "step"), ("ttft_sent", "start_sent")):
                if old in points:
                    points[new] = points.pop(old)  # type: ignore[assignment]
    out.tokens_per_s = {"t": _round(edges), "y": _round(np.append(tokens / np.diff(edges), 0.0))}
    return out


def _columns(rows: Rows, video: bool) -> dict[str, npt.NDArray[Any]]:
    """The columns that outlive a batch. Latencies are ms from due, NaN where there is none, inf where it failed.

    Of a video, "ttft" is its first response and "tpot" the mean time of its denoising steps.
    """
    answered, long = rows.ok & (rows.first_ns != NEVER), rows.ok & (rows.first_ns != NEVER) & (rows.tokens_out > 1)
    latencies = {"ttft": (answered, ttft(rows)), "tpot": mean_step(rows) if video else (long, tpot(rows)),
                 "e2e": (rows.ok, (rows.done_ns - rows.due_ns)[rows.ok])}  # fmt: skip
    out: dict[str, npt.NDArray[Any]] = {"due": rows.due_ns, "sent": rows.sent_ns, "done": rows.done_ns,
                                        "failed": ~rows.ok}  # fmt: skip
    for name, (where, values) in latencies.items():
        column = np.where(rows.ok, np.nan, np.inf).astype(np.float32)
        column[where] = values / 1e6
        out[name] = column
    return out


def _distributions(c: dict[str, npt.NDArray[Any]], ok: Bool) -> dict[str, dict[str, list[float]]]:
    waited = np.where(ok, (c["sent"] - c["due"]) / 1e6, 0.0)
    failed = int((~ok).sum())
    values = {"ttft": c["ttft"], "tpot": c["tpot"], "e2e": c["e2e"],
              "ttft_sent": c["ttft"] - waited, "e2e_sent": c["e2e"] - waited}  # fmt: skip
    return {name: _quantiles(v[np.isfinite(v)], failed) for name, v in values.items()}


def _quantiles(values: npt.NDArray[Any], failed: int) -> dict[str, list[float]]:
    """About 400 points of the distribution over all requests, half of them beyond p90, with the largest value."""
    n = len(values) + failed
    if not len(values):
        return {"x": [], "p": []}
    ordered = np.sort(values)
    tail = 1 - np.geomspace(0.1, max(1 / n, 1e-9), QUANTILES // 2) if n > 10 else np.empty(0)
    p = np.concatenate([np.linspace(0, 0.9 if n > 10 else 1 - 1 / n, QUANTILES // 2), tail])
    index = np.unique(np.minimum((p * n).astype(np.int64), n - 1))
    index = index[index < len(ordered)]
    if index[-1] != len(ordered) - 1:
        index = np.append(index, len(ordered) - 1)
    return {"x": _round(ordered[index].astype(np.float64)), "p": [round(float(i), 7) for i in index / n]}


def _over_time(t: Float, y: npt.NDArray[Any], end: float) -> dict[str, list[float | None]]:
    there = ~np.isnan(y)
    t, y = t[there], y[there]
    if len(t) <= POINTS:
        finite = np.isfinite(y)
        return {"t": list(_round(t[finite])), "y": list(_round(y[finite].astype(np.float64)))}
    edges = _edges(end, len(t) // 30)
    order = np.lexsort((y, np.searchsorted(edges, t, "right")))  # by bin, and by latency inside a bin
    bins, y = np.searchsorted(edges, t, "right")[order] - 1, y[order]
    starts, counts = np.unique(bins, return_index=True)[1], np.unique(bins, return_counts=True)[1]
    out: dict[str, list[float | None]] = {"t": list(_round(edges[bins[starts]] + (edges[1] - edges[0]) / 2))}
    for name in BANDS:
        picked = y[starts + (counts * float(name[1:]) / 100).astype(np.int64)].astype(np.float64)
        out[name] = [round(float(v), 3) if np.isfinite(v) else None for v in picked]
    return out


def _tokens(rows: Rows, edges: Float) -> Float:
    """Output tokens of completed requests that arrived in each bin, so that all bins sum up to `tokens_out`."""
    keep = np.repeat(rows.ok, np.diff(rows.chunk_offsets))
    at = np.clip(np.searchsorted(edges, rows.chunk_ns[keep] / 1e9, "right") - 1, 0, len(edges) - 2)
    return np.bincount(at, weights=rows.chunk_tokens[keep], minlength=len(edges) - 1).astype(np.float64)


def _in_flight(c: dict[str, npt.NDArray[Any]], end: float) -> dict[str, list[float]]:
    """Requests between send and done: every step of a short run, the most of each bin of a long one."""
    sent = np.sort(c["sent"][c["sent"] != NEVER])
    done = np.sort(c["done"][(c["done"] != NEVER) & (c["sent"] != NEVER)])
    times = np.concatenate([done, sent])
    order = np.argsort(times, kind="stable")  # at equal times an end comes before a start
    level = np.cumsum(np.concatenate([np.full(len(done), -1), np.ones(len(sent), dtype=np.int64)])[order])
    t = times[order] / 1e9
    if len(t) > 2 * POINTS:
        edges = _edges(end, BINS)
        starts = np.searchsorted(t, edges[:-1])
        peaks = np.concatenate([[0], level])[starts]  # what was in flight when the bin began
        filled = starts < np.append(starts[1:], len(t))
        peaks[filled] = np.maximum(peaks[filled], np.maximum.reduceat(level, starts[filled]))
        t, level = edges[:-1], peaks
    return {"t": _round(t.astype(np.float64)), "y": [int(v) for v in level]}


def _edges(end_s: float, wanted: int) -> Float:
    """Edges of 20 to 240 equal bins from 0 to `end_s`."""
    return np.linspace(0.0, max(end_s, 1e-3), int(np.clip(wanted, 20, BINS)) + 1)


def _thinned(times_s: Float) -> list[float]:
    """At most about a mark a pixel."""
    times = np.unique(np.round(times_s, 3))
    return _round(times[:: max(1, len(times) // 1000)])


def _round(values: Float | Int64) -> list[float]:
    """Microseconds in s, and in ms: finer than any clock here, and half the file."""
    return [round(float(v), 6 if v < 1 else 4) for v in values]
