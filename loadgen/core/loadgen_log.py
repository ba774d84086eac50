"""What a LoadGen detail log lets one derive: sample counts, bounds, due times, the honest window.

One rule: nothing here judges; `recheck.py` does, with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from loadgen.core import schedule
from loadgen.core.early_stopping import max_overlatency, min_queries
from loadgen.core.loadgen_verdict import divide
from loadgen.core.metrics import PERCENTILES
from loadgen.core.scenario import Kind

Log = Mapping[str, Any]  # key → first value; logs of v4.1 to v6.1 differ in a few keys, all optional

SIX_DIGITS = 5e-6  # half a unit of the sixth digit is at most this much, relative
_BLOCK = 1 << 22  # queries at a time: bounds memory
_CLOCK = "%m-%d-%Y %H:%M:%S.%f"


def samples_of(log: Log, kind: Kind) -> int:
    """Samples, not queries: Offline is one query of all of them, with equal issue in whole data sets.

    LoadGen of v4.1 logs the count before it is rounded up, and some builds not even whether it is: the rate tells.
    """
    width = int(log.get("generated_samples_per_query") or log.get("effective_samples_per_query") or 1)
    if kind is Kind.OFFLINE:
        dataset = int(log.get("effective_performance_sample_count") or 1)
        whole = -(-width // dataset) * dataset
        seconds = log.get("result_max_latency_ns", 0) / 1e9
        width = whole if same_rate(divide(whole, seconds), log.get("result_samples_per_second", 0.0)) else width
    return int(log["result_query_count"]) * (width if kind in (Kind.OFFLINE, Kind.MULTI_STREAM) else 1)


def over_limit_bounds(log: Log, name: str, n: int) -> tuple[int, int]:
    """(least, most) requests whose TTFT or TPOT was over its limit, as far as the logged percentiles tell."""
    limit = log.get(f"requested_server_{name.lower()}_latency", log.get(f"requested_{name.lower()}_latency"))
    stem = "result_first_token_{}_percentile_latency_ns"
    stem = stem if name == "TTFT" else "result_time_per_output_token_{}_percentile_ns"
    least, most = 0, n
    for p in PERCENTILES if limit is not None else ():
        value = log.get(stem.format(f"{p * 100:.2f}"))
        if value is not None and value > limit:
            least = max(least, n - int(n * p))
        elif value is not None:
            most = min(most, n - int(n * p) - 1)
    return least, most


def due_times(qps: float, wanted: tuple[int, int], seed: int) -> tuple[int, int]:
    """Due times in ns of the queries with these two numbers (ascending), of a schedule too long to keep."""
    rng, start, at, found = schedule._mt19937(seed), 0, 0, []
    while at <= wanted[1]:
        due = schedule._arrivals(rng, qps, min(_BLOCK, wanted[1] - at + 1), start)
        found += [int(due[w - at]) for w in wanted if at <= w < at + len(due) - 1]
        start, at = int(due[-1]), at + len(due) - 1
    return found[0], found[-1]


def late_counts(n: int, more: int, p: float) -> list[int]:
    """The counts over the limit with which n + more queries are just enough: at most one."""
    late = max_overlatency(n + more, p)
    return [late] if late >= 0 and min_queries(late, p) == n + more else []


def power_window_s(log: Log) -> float | None:
    """From the start to the last response, to the ms; None where the log does not say."""
    try:
        begin, end = (datetime.strptime(log[key], _CLOCK) for key in ("power_begin", "power_end"))
    except (KeyError, TypeError, ValueError):
        return None
    return (end - begin).total_seconds() or None


def same_rate(ours: float, logged: float) -> bool:
    """Equal to six digits; the last may round either way."""
    return abs(ours - logged) <= 2 * SIX_DIGITS * abs(logged)
