"""What the server says of the measured time: Triton's statistics and metrics before and after, and where time went.

Triton counts queue and compute of every request. For a model that answers with many responses (decoupled: every
streaming one) its compute ends when `execute` returns, which is before the first token: there only the first-response
figures of newer servers and the gauges of the served runtime tell more, and what nobody tells is named in `unknown`.
"""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from loadgen.core.record import NEVER, Rows
from loadgen.edge.telemetry_sampler import series
from loadgen.edge.telemetry_sources import Missing, scrape

TIMEOUT_S = 3.0
PARTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
FIRST = "nv_inference_first_response_histogram_ms"
CUMULATIVE = ("_total", "_count", "_sum", "_duration_us")
MAX_SERIES = 300  # kept in run.json; all are in server.parquet

Counts = dict[str, float]
Track = Sequence[tuple[int, float]]  # (ns from T0, value), when it changed


def metrics_url(host: str, wanted: str) -> str | None:
    """The metrics page of the server at `host`: `wanted` if it is a URL, else the port that belongs to it (HTTP + 2, as
    every layout here has it) and then Triton's usual one, which may be another server's."""
    if wanted == "off":
        return None
    if wanted != "auto":
        return wanted
    parts = urlsplit(host)
    ports = dict.fromkeys([(parts.port or 8000) + 2, 8002])
    for port in ports:
        url = f"http://{parts.hostname}:{port}/metrics"
        try:
            if "nv_inference_" in scrape(url):
                return url
        except Missing:
            continue
    return None


def fetch(hosts: Sequence[str], model: str, pages: Sequence[str]) -> dict[str, Any]:
    """Statistics of `model` (over versions) and its metric series now, sums over servers; None where one gives none."""
    statistics = [_statistics(host, model) for host in hosts]
    metrics = [_series(page, model) for page in pages]
    complete = len(pages) == len(hosts)
    return {"statistics": _sum(statistics), "page": _sum(metrics) if complete else None, "servers": len(hosts)}


def _statistics(host: str, model: str) -> Counts | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        url = f"{host.rstrip('/')}/v2/models/{quote(model, safe='')}/stats"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return flat(json.load(response))
    return None


def _series(page: str, model: str) -> Counts | None:
    with contextlib.suppress(Missing, ValueError):
        return series(scrape(page), model)
    return None


def _sum(parts: Sequence[Counts | None]) -> Counts | None:
    known = [part for part in parts if part is not None]
    if not parts or len(known) < len(parts):
        return None
    return {name: sum(part.get(name, 0) for part in known) for name in dict.fromkeys(n for part in known for n in part)}


def flat(document: Mapping[str, Any]) -> Counts:
    """Triton's statistics as plain sums: "queue.ns", "queue.count", "inference_count", "first.ns" (response 0) …"""
    out: Counts = {}

    def add(name: str, value: float) -> None:
        out[name] = out.get(name, 0) + value

    for version in document["model_stats"]:
        for name in ("inference_count", "execution_count"):
            add(name, version.get(name, 0))
        for part in PARTS:
            for unit in ("count", "ns"):
                add(f"{part}.{unit}", version["inference_stats"].get(part, {}).get(unit, 0))
        first = (version.get("response_stats") or {}).get("0", {}).get("success")
        for unit in ("count", "ns") if first else ():
            add(f"first.{unit}", first[unit])
    return out


def describe(
    before: dict[str, Any] | None, after: dict[str, Any] | None, tracks: Mapping[str, Track], rows: Rows, end_ns: int,
    decoupled: bool,
) -> dict[str, Any]:  # fmt: skip
    """Everything for `run.json`: counts and means over the run, gauges over the window, and the split of latency."""
    unknown: list[str] = []
    counts = _difference((before or {}).get("statistics"), (after or {}).get("statistics"))
    page = _difference((before or {}).get("page"), (after or {}).get("page"))
    if counts is None:
        unknown.append("the server gave no statistics before and after the run")
    if page is None:
        unknown.append("no metrics page of the server was found: give --server-metrics its URL")
    if (after or {}).get("servers", 1) > 1:
        unknown.append(f"gauges are those of the first of {after['servers']} servers")  # type: ignore[index]
    counters = {k: v for k, v in (page or {}).items() if cumulative(k) and v > 0}
    gauges = {k: _over(t, end_ns) for k, t in tracks.items() if not cumulative(k)}
    out: dict[str, Any] = {
        "requests": _int(counts, "success.count"), "failed": _int(counts, "fail.count"),
        "inferences": _int(counts, "inference_count"), "executions": _int(counts, "execution_count"),
        "mean_ms": {name: _mean(counts, name) for name in PARTS if name != "fail"} if counts else {},
        "first_response_ms": first_response_ms(counts, counters),
        "counters": dict(sorted(counters.items())[:MAX_SERIES]),
        "gauges": {k: v for k, v in sorted(gauges.items())[:MAX_SERIES] if v},
    }  # fmt: skip
    sent = int((rows.sent_ns != NEVER).sum())
    seen = (out["requests"] or 0) + (out["failed"] or 0)
    if counts is not None and seen > sent:
        unknown.append(f"the server counted {seen} requests and this run sent {sent}: it served others too")
    out["latency_ms"] = _split(rows, out, decoupled, unknown)
    return out | {"unknown": unknown}


def first_response_ms(counts: Counts | None, counters: Counts) -> float | None:
    """Mean time from a request's arrival in Triton to its first response; None where this server does not tell."""
    total = sum(v for k, v in counters.items() if k.startswith(f"{FIRST}_sum"))
    number = sum(v for k, v in counters.items() if k.startswith(f"{FIRST}_count"))
    if number:
        return total / number
    if counts and counts.get("first.count") and counts.get("queue.count"):
        return (counts["first.ns"] / counts["first.count"] + counts["queue.ns"] / counts["queue.count"]) / 1e6
    return None


def _split(rows: Rows, seen: dict[str, Any], decoupled: bool, unknown: list[str]) -> dict[str, float]:
    """Means over completed requests in ms, in the order in which a request meets them."""
    ok = rows.ok & (rows.sent_ns != NEVER) & (rows.first_ns != NEVER)
    if not ok.any():
        return {}
    due, sent, first, done = (column[ok] / 1e6 for column in (rows.due_ns, rows.sent_ns, rows.first_ns, rows.done_ns))
    out = {"client_wait": float(np.mean(sent - due))}
    means, answer = seen["mean_ms"], float(np.mean(done - sent))
    if means.get("queue") is not None:
        out["server_queue"] = means["queue"]
    if not decoupled and means.get("success") is not None:
        out["server_compute"] = sum(means[p] or 0.0 for p in ("compute_input", "compute_infer", "compute_output"))
        out["network"] = answer - means["success"]
    elif decoupled:
        _engine(out, rows, seen)
        if seen["first_response_ms"] is not None:
            out["server_first_response"] = seen["first_response_ms"]
            out["network"] = float(np.mean(first - sent)) - seen["first_response_ms"]
        else:
            unknown.append("no time to the first response from this Triton (2.52 and later tell it for streams): "
                           "server and network stay together")  # fmt: skip
    if out.get("network", 0.0) < 0:
        unknown.append("the server's mean is above the client's: it counted other requests than this run measured")
        del out["network"]
    return out | {"send_to_first": float(np.mean(first - sent)), "first_to_done": float(np.mean(done - first))}


def _engine(out: dict[str, float], rows: Rows, seen: dict[str, Any]) -> None:
    """Mean wait and stay in the runtime from its gauges, by Little's law (mean number = rate × mean time)."""
    done_s = float(rows.done_ns[rows.ok].max()) / 1e9
    rate = int(rows.ok.sum()) / done_s if done_s > 0 else 0.0
    for gauge, name in (("tritonmark_requests_waiting", "engine_wait"), ("tritonmark_requests_running", "engine_run")):
        figure = seen["gauges"].get(gauge)
        if figure and rate:
            out[name] = figure["mean"] / rate * 1e3


def cumulative(name: str) -> bool:
    """Is this series a counter, by the names that Triton, its backends and Prometheus use?"""
    bare = name.partition("{")[0]
    known = ("nv_inference_request_success", "nv_inference_request_failure")
    gauge = bare == "nv_inference_pending_request_count"
    return bare in known or (bare.endswith((*CUMULATIVE, "_bucket")) and not gauge)


def _difference(before: Counts | None, after: Counts | None) -> Counts | None:
    if before is None or after is None:
        return None
    return {name: value - before.get(name, 0) for name, value in after.items()}


def _over(track: Track, end_ns: int) -> dict[str, float] | None:
    """Mean over time and maximum of a gauge within the window; it keeps a value until the next."""
    t = np.array([at for at, _ in track], dtype=np.int64)
    values = np.array([v for _, v in track], dtype=np.float64)
    lasts = np.minimum(np.append(t[1:], end_ns), end_ns) - np.maximum(t, 0)
    inside = lasts > 0
    if not inside.any():
        return None
    return {"mean": float(np.average(values[inside], weights=lasts[inside])), "max": float(values[inside].max())}


def _mean(counts: Counts, part: str) -> float | None:
    number = counts.get(f"{part}.count")
    return counts[f"{part}.ns"] / number / 1e6 if number else None


def _int(counts: Counts | None, name: str) -> int | None:
    return int(counts[name]) if counts else None
