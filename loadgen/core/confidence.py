"""What a run shows when its latencies depend on each other: a corrected early stopping, and intervals.

LoadGen's early stopping takes every query as an independent trial. In a queue it is not, and at a true rate of late
queries exactly at the limit the rule then passes far more often than the 1 % it claims: up to 95 % for an M/M/1 queue.
Here n queries count as n / v independent ones, with v from `dependence.py`. docs/confidence.md has the measured rates
of false passes, and says where the claim stops holding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import betainc, stdtrit

from loadgen.core.dependence import Float, latency_inflation, ranks, variance_inflation
from loadgen.core.early_stopping import CONFIDENCE
from loadgen.core.record import Bool, Int64

# v is known to about sqrt(8 v / n) of itself (Madras and Sokal 1988, with their window at four correlation times), and
# a run that has few late queries by luck tends to have a small v by the same luck: hence two standard errors.
_SAFETY = 6.0
_LEAN = 4.0  # for intervals, which should be right where a verdict should be safe
_FEWEST = 20  # values below which no interval is given
_LATE_WITHOUT_LATENCIES = 10.0  # effective late queries asked for where only they can tell the dependence
_LEAST_EFFECTIVE = 100.0  # queries: a run worth fewer tells its own v too badly
_LEAST_FOR_INTERVAL = 50.0  # effective values, by the most dependent of several series: v can't be told from fewer
_BINS = 2000  # of time, for rates
Interval = tuple[float, float]


@dataclass(frozen=True)
class CorrectedStop:
    """Whether a run shows, autocorrelation allowed for, that queries are late less often than 1 - percentile.

    `passes` is the decision at `confidence`. `inflation` is v with its safety margin, and `effective` = queries / v.
    `needed` is about how many queries would do at the same share of late ones: None where that share isn't below the
    limit, so that a longer run won't help, or where nothing is known about the dependence.
    """

    passes: bool
    queries: int
    late: int
    inflation: float
    effective: float
    needed: int | None
    explanation: str


def corrected_early_stopping(
    over: Bool, percentile: float, confidence: float = CONFIDENCE, latencies: Float | None = None
) -> CorrectedStop:
    """LoadGen's test of lateness with n / v queries of which t / v are late; it passes only where LoadGen's does.

    `over` says in due order which queries were late (failed ones are). `latencies`, in the same order and +inf for
    failures, let v be told from all queries; without them it rests on the late ones, and fewer than ten clusters of
    these are refused. So is a run that is worth fewer than 100 independent queries. Raises ValueError on a percentile
    outside (0, 1) and on latencies of another length.
    """
    if not 0 < percentile < 1:
        raise ValueError(f"percentile must be a fraction between 0 and 1, as 0.99, got {percentile}")
    if latencies is not None and len(latencies) != len(over):
        raise ValueError(f"latencies must be as many as over, got {len(latencies)} for {len(over)}")
    n, late = len(over), int(np.count_nonzero(over))
    if not n:
        return CorrectedStop(False, 0, 0, 1.0, 0.0, None, "no queries")
    estimate = variance_inflation(over) if latencies is None else latency_inflation(latencies, over)
    inflation = estimate * (1 + _SAFETY * math.sqrt(estimate / n))
    effective, luck = n / inflation, 1.0 - confidence
    short = effective < _LEAST_EFFECTIVE
    blind = latencies is None and late / inflation < _LATE_WITHOUT_LATENCIES
    passes = (
        not (blind or short)
        and _luck(n, late, percentile) < luck
        and _luck(effective, late / inflation, percentile) < luck
    )
    enough = None if blind else _enough(late / n, percentile, luck)
    needed = None if enough is None else max(n + (not passes), math.ceil(max(enough, _LEAST_EFFECTIVE) * inflation))
    text = _explain(passes, blind, n, late, effective, needed, percentile, confidence)
    return CorrectedStop(passes, n, late, inflation, effective, needed, text)


def _luck(queries: float, late: float, percentile: float) -> float:
    """P[X <= late], X ~ Binomial(queries, 1 - percentile), continued to real numbers by the incomplete beta."""
    return float(betainc(queries - late, late + 1, percentile)) if late < queries else 1.0


def _enough(share: float, percentile: float, luck: float) -> float | None:
    """Independent queries that prove the percentile when `share` of them are late; None when none would."""
    if share >= 1 - percentile:
        return None
    few, many = 0.0, 1.0
    while _luck(many, share * many, percentile) >= luck:
        few, many = many, 2 * many
        if many > 1e12:
            return None
    while many - few > 1e-3 * many:
        middle = (few + many) / 2
        if _luck(middle, share * middle, percentile) < luck:
            many = middle
        else:
            few = middle
    return many


def _explain(
    passes: bool, blind: bool, n: int, late: int, effective: float, needed: int | None, p: float, confidence: float
) -> str:
    seen = f"{late} of {n} queries late; they are worth {effective:.0f} independent ones"
    claim = f"{confidence:.0%} confidence that fewer than {1 - p:.3g} are late"
    if passes:
        return f"{seen}: {claim}"
    if blind:
        return f"{late} of {n} queries late: too few to tell how they cluster, so no {claim}"
    if needed is None:
        return f"{seen}: no {claim}, and no longer run would show it at this rate"
    return f"{seen}: no {claim}; about {needed} queries would show it"


def percentile_interval(values: Float, p: float, confidence: float = 0.95) -> Interval | None:
    """Interval for the p-quantile of `values` in due order (+inf = failed): between their own order statistics.

    Among m = n / v independent values, ranks l and u are taken so that a tail of (1 - confidence) / 2 is left on each
    side, then scaled to n: the classical nonparametric interval (David and Nagaraja, Order Statistics, 7.1), with real
    ranks. The high end is +inf where even the slowest value is not surely above the quantile, or where it falls among
    failures. It always contains LoadGen's sorted[floor(n p)]. None where the values, at p50, p90 or p, are worth fewer
    than 50 independent ones, or where not even the fastest is surely below the quantile. Raises ValueError on p or
    confidence outside (0, 1).
    """
    if not (0 < p < 1 and 0 < confidence < 1):
        raise ValueError(f"p and confidence must be fractions between 0 and 1, got {p} and {confidence}")
    n = len(values)
    if n < _FEWEST:
        return None
    ascending = np.sort(values)
    middle = int(n * p)
    # Few values lie above a high quantile, too few to show how they cluster: the slowest tenth must vouch for them.
    v = max(variance_inflation(values > ascending[i]) for i in {middle, int(n * min(p, 0.9))})
    worst = max(v, *(variance_inflation(values > ascending[n * part // 10]) for part in (5, 9)))
    m = n / (v * (1 + _LEAN * math.sqrt(v / n)))
    tail = (1 - confidence) / 2
    if n < _LEAST_FOR_INTERVAL * worst or (1 - p) ** m > tail:
        return None
    point, scale = float(ascending[middle]), (n + 1) / (m + 1)
    low = min(_between(ascending, _rank(m, p, 1 - tail) * scale), point)
    if p**m > tail:
        return low, math.inf
    return low, max(_between(ascending, _rank(m, p, tail) * scale), point)


def _between(ascending: Float, rank: float) -> float:
    """The value at a real rank, 1 for the smallest: linear between neighbours, +inf where a neighbour is."""
    position = min(max(rank - 1, 0.0), len(ascending) - 1.0)
    low, high = ascending[math.floor(position)], ascending[math.ceil(position)]
    return float(low + (high - low) * (position % 1)) if math.isfinite(high) else math.inf


def _rank(m: float, p: float, below: float) -> float:
    """The real rank r in (0, m] with P[Beta(r, m + 1 - r) <= p] = below; that falls as r rises."""
    low, high = 0.0, m
    for _ in range(60):
        middle = (low + high) / 2
        if betainc(middle, m + 1 - middle, p) > below:
            low = middle
        else:
            high = middle
    return high


def mean_interval(values: Float, confidence: float = 0.95, least: float = _LEAST_FOR_INTERVAL) -> Interval | None:
    """Interval for the mean of finite `values` in the order of time: Student's, with n / v - 1 degrees of freedom.

    None below 20 values, or where they are worth fewer than `least` independent ones.
    """
    if len(values) < _FEWEST:
        return None
    v = variance_inflation(values)
    m = len(values) / (v * (1 + _LEAN * math.sqrt(v / len(values))))
    if len(values) < least * max(v, variance_inflation(ranks(values))) or m < 3:
        return None
    half = float(stdtrit(m - 1, (1 + confidence) / 2) * values.std() / math.sqrt(m - 1))
    return float(values.mean()) - half, float(values.mean()) + half


def rate_interval(
    first_ns: Int64, done_ns: Int64, amounts: Float, window_ns: int, confidence: float = 0.95, bins: int = _BINS
) -> Interval | None:
    """Interval for amounts per second over (0, window_ns]: the mean of what was made in equal stretches of time.

    `amounts[i]` (requests: 1; or tokens) was made evenly from `first_ns[i]` to `done_ns[i]`, its first and last
    response: streams that run side by side end in waves, and a wave is no change of the rate. In any order; at least
    eight requests a stretch on average, so that a steady rate is not blurred by single ones. It says how far another
    run of this length, with other arrivals, would come out; None where `mean_interval` is None or the window is empty.
    """
    stretches = min(bins, len(done_ns) // 8)
    if window_ns <= 0 or stretches < _FEWEST:
        return None
    per_second = _made(first_ns, done_ns, amounts, window_ns, stretches) * (stretches / (window_ns / 1e9))
    interval = mean_interval(per_second, confidence, least=3.0)  # sums of many arrivals are nearly normal
    return None if interval is None else (max(0.0, interval[0]), interval[1])


def _made(first_ns: Int64, done_ns: Int64, amounts: Float, window_ns: int, stretches: int) -> Float:
    """What was made in each stretch: a request's rate begins at its first response and ends at its last. Where it has
    no first one, all was made at its end."""
    first_ns = np.where(first_ns > 0, first_ns, done_ns)
    begin, end = (np.clip(t * stretches // window_ns, 0, stretches - 1) for t in (first_ns, done_ns))
    inside = begin == end
    made = np.bincount(end[inside], amounts[inside], stretches).astype(np.float64)  # int64 where there are none
    begin, end, amounts = begin[~inside], end[~inside], amounts[~inside]
    width = window_ns / stretches
    first, done = first_ns[~inside] / width, done_ns[~inside] / width  # in stretches
    rate = amounts / (done - first)
    made += np.bincount(begin, rate * (begin + 1 - first), stretches)
    made -= np.bincount(end, rate * (end + 1 - done), stretches)
    running = np.cumsum(np.bincount(begin, rate, stretches) - np.bincount(end, rate, stretches))
    made[1:] += running[:-1]
    return made
