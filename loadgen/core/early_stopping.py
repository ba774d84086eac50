"""MLPerf's early stopping: how many queries make a percentile certain enough, and how many may be late.

Each query is taken as an independent trial that is late with probability 1 - p, where p is the percentile. A run of n
queries with t late ones passes when seeing so few late ones by luck, were the true share exactly 1 - p, is less than
1 % likely:

    P[X <= t] = I_p(n - t, t + 1) < 1 - 0.99        X ~ Binomial(n, 1 - p)

I is the regularised incomplete beta function. LoadGen (early_stopping.cc, results.cc, 6.0.17) writes h(t) for the
least n - t that passes, and computes I by a series in lgamma; here it is scipy's `betainc`. Of the 950,739 values
h(1), h(2), ... for n up to 5 million at p = 0.9, 0.95, 0.97, 0.99 and 0.999, LoadGen's series rounds 8 to the wrong
side, by one query; the ones here are exact. The comparison is strict, as in LoadGen's code; the rules' text says "at
most". The bound holds only for independent latencies, which a queue
does not give: the report corrects for that elsewhere.

>>> min_queries(0, 0.99), min_queries(1, 0.99), max_overlatency(24_576, 0.99)
(459, 662, 209)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from scipy.special import betainc

from loadgen.core.record import Int64

CONFIDENCE = 0.99
_LUCK = 1.0 - CONFIDENCE  # 0.010000000000000009 in binary, as in LoadGen: kept as a difference on purpose


@lru_cache(maxsize=4096)
def max_overlatency(queries: int, percentile: float) -> int:
    """The most late queries with which a run of `queries` still passes; -1 when not even 0 would do.

    LoadGen: the largest t with queries >= h(t) + t. `percentile` is a fraction, as 0.99.
    """
    _check(queries, "queries", percentile)
    if not _certain(queries, 0, percentile):
        return -1
    passes_at, fails_at = 0, queries  # queries out of queries late never passes: I_p(0, ...) = 1
    while fails_at - passes_at > 1:
        middle = (passes_at + fails_at) // 2
        if _certain(queries, middle, percentile):
            passes_at = middle
        else:
            fails_at = middle
    return passes_at


@lru_cache(maxsize=4096)
def min_queries(overlatency: int, percentile: float) -> int:
    """The least number of queries that passes with `overlatency` late ones among them: LoadGen's h(t) + t.

    `min_queries(1, p)` is the floor of SingleStream and MultiStream, `min_queries(0, p)` that of Server.
    """
    _check(overlatency, "overlatency", percentile)
    fails_at = overlatency  # all late
    passes_at = overlatency + 1
    while not _certain(passes_at, overlatency, percentile):
        fails_at, passes_at = passes_at, 2 * passes_at
    while passes_at - fails_at > 1:
        middle = (passes_at + fails_at) // 2
        if _certain(middle, overlatency, percentile):
            passes_at = middle
        else:
            fails_at = middle
    return passes_at


def passes(queries: int, overlatency: int, percentile: float) -> bool:
    """LoadGen's check of a Server run: of `queries`, `overlatency` took strictly longer than the limit."""
    return shortfall(queries, overlatency, percentile) == 0


def shortfall(queries: int, overlatency: int, percentile: float) -> int:
    """How many more queries, all in time, a Server run needs; 0 when it passes."""
    _check(queries, "queries", percentile)
    if overlatency > queries:
        raise ValueError(f"overlatency must not exceed queries, got {overlatency} of {queries}")
    return max(0, min_queries(overlatency, percentile) - queries)


def percentile_estimate(sorted_latencies: Sequence[int] | Int64, percentile: float) -> tuple[int, int] | None:
    """The percentile that SingleStream and MultiStream report: (estimate, how many higher latencies were discarded).

    With t = max_overlatency(n, p), the estimate is element n - t (from 0) of the ascending latencies, so t - 1 lie
    above it. It is pessimistic: 99 % sure to be at or above the true percentile. The unit is that of the input. None
    when there are fewer than `min_queries(1, percentile)` latencies. The caller sorts; order is not checked.
    """
    late = max_overlatency(len(sorted_latencies), percentile)
    if late < 1:
        return None
    return int(sorted_latencies[len(sorted_latencies) - late]), late - 1


def _certain(queries: int, late: int, percentile: float) -> bool:
    """Whether `late` or fewer late queries out of `queries` would be under 1 % likely at the percentile's own rate."""
    if late >= queries:
        return False
    return bool(betainc(queries - late, late + 1, percentile) < _LUCK)


def _check(count: int, name: str, percentile: float) -> None:
    if count < 0:
        raise ValueError(f"{name} must be at least 0, got {count}")
    if not (math.isfinite(percentile) and 0 < percentile < 1):
        raise ValueError(f"percentile must be a fraction between 0 and 1, as 0.99, got {percentile}")
