"""How fast the schedule, the sample order and early stopping are, and how they compare with a plain loop.

    python benchmarks/core_speed.py

Best of three, in this process; ratios are against the loop that a straightforward port of LoadGen would be. Numbers
of one machine are not numbers of another: the output begins with what it ran on.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable

import numpy as np
import scipy
from scipy.special import betainc

from loadgen.core import early_stopping, sample_order, schedule

SEED = 16159082839903944936


def best_s(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def looped_schedule(qps: float, count: int) -> list[int]:
    words = iter(np.random.RandomState(SEED % 2**32).randint(0, 2**32, size=2 * count, dtype=np.uint32).tolist())
    due, now = [], 0
    for _ in range(count):
        due.append(now)
        u = min((next(words) + next(words) * 2.0**32) / 2.0**64, math.nextafter(1.0, 0.0))
        now += int(-math.log(1.0 - u) / qps * 1e9)
    return due


def looped_max_overlatency(queries: int, percentile: float) -> int:
    """LoadGen's way: try 1, 2, 3, ... late queries until one too many."""
    late = 1
    while betainc(queries - late, late + 1, percentile) < 1.0 - 0.99:
        late += 1
    return late - 1


def fresh_max_overlatency(queries: int, percentile: float) -> int:
    early_stopping.max_overlatency.cache_clear()
    return early_stopping.max_overlatency(queries, percentile)


def fresh_min_queries(late: int, percentile: float) -> int:
    early_stopping.min_queries.cache_clear()
    return early_stopping.min_queries(late, percentile)


def line(name: str, seconds: float, naive_s: float | None = None) -> None:
    ratio = f"{naive_s / seconds:10.0f} x a plain loop ({naive_s * 1e3:.0f} ms)" if naive_s else ""
    print(f"{name:<52}{seconds * 1e3:10.3f} ms {ratio}")


def main() -> None:
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    print(f"{versions}, {platform.machine()}, {os.cpu_count()} cores")
    million = 10**6
    assert looped_schedule(100.0, 1000) == schedule.loadgen_poisson(100.0, 1000, SEED).tolist()
    line(
        "schedule, 1 M arrivals",
        best_s(lambda: schedule.loadgen_poisson(100.0, million, SEED)),
        best_s(lambda: looped_schedule(100.0, million), 1),
    )
    line(
        "schedule, Server 600 s at 1000/s, equal issue",
        best_s(lambda: schedule.loadgen_server(1000.0, 600 * 10**9, 24_576, SEED, dataset=24_576)),
    )
    for percentile in (0.9, 0.99, 0.999):
        assert looped_max_overlatency(50_000, percentile) == fresh_max_overlatency(50_000, percentile)
        line(
            f"early stopping, late queries allowed in 5 M, p{percentile * 100:g}",
            best_s(lambda p=percentile: fresh_max_overlatency(5 * million, p)),
            best_s(lambda p=percentile: looped_max_overlatency(5 * million, p), 1),
        )
    line("early stopping, queries needed for 50,000 late, p99", best_s(lambda: fresh_min_queries(50_000, 0.99)))
    loaded = sample_order.loaded_set(24_576, 24_576, SEED)
    line("sample order, shuffle of 24,576", best_s(lambda: sample_order.loaded_set(24_576, 24_576, SEED)))
    line(
        "sample order, 1 M with replacement",
        best_s(lambda: sample_order.with_replacement(loaded, million, SEED, 100)),
    )
    line(
        "sample order, 1 M equal issue (41 passes)",
        best_s(lambda: sample_order.equal_issue(loaded, million, SEED, million)),
    )


if __name__ == "__main__":
    main()
