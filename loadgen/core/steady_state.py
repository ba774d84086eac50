"""Was the run in one state throughout? Warm-up, drift and a growing backlog, each by a named test.

1. *Warm-up*: MSER-5 (White, Cobb and Spratt 2000) proposes where to cut. The cut counts only if Geweke's test (1992)
   finds the beginning different from the last half, at one of three fixed lengths of beginning (Bonferroni).
2. *Drift* of what is left: Mann and Kendall's trend test on means of blocks, with Hamed and Rao's correction (1998) for
   autocorrelation between blocks; Theil and Sen's slope with its interval says how much.
3. *Backlog*: requests due but not done. Above capacity it grows by a share of the arrivals, so its increments have a
   mean above zero: a one-sided t-test. A queue below capacity gives increments that cancel, which only lowers t.

Ranks of latency are tested, so that a few slow requests don't decide and failures can be the slowest. Each test has a
false-alarm rate of 1 to 2 %. A run that is worth fewer than 50 independent requests can't be told from a slow swell:
it is then not tested for warm-up and drift, and says so. Nothing is removed: excluded rows stay in the file.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri, stdtr

from loadgen.core.dependence import Float, ranks, variance_inflation
from loadgen.core.record import Int64

LEVEL = 0.01  # of each of the three tests
_FEWEST = 100  # rows
_FEWEST_EFFECTIVE = 50.0  # independent rows that warm-up and drift need
_MATTERS = 0.05  # of the median latency: a warm-up or drift below that is no reason to worry
_BEGINNINGS = (64, 16, 4)  # Geweke compares the first n/64, n/16 and n/4 with the last n/2
_MINUTE_NS = 60e9


@dataclass(frozen=True)
class SteadyState:
    """The outcome of the tests. `steady` is False where warm-up, drift or a growing backlog was found.

    Rows due before `truncation_ns` (None: no warm-up found) are `excluded` of the steady figures. `slope_ns_per_minute`
    is the drift of the median latency, from `slope_low` to `slope_high` with 95 % confidence. `tested` is False where
    the run was too short for warm-up and drift. p-values are None where a test wasn't made.
    """

    steady: bool
    tested: bool
    explanation: str
    truncation_ns: int | None = None
    excluded: int = 0
    warmup_p: float | None = None
    slope_ns_per_minute: float | None = None
    slope_low: float | None = None
    slope_high: float | None = None
    trend_p: float | None = None
    backlog_per_minute: float | None = None
    backlog_p: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def steady_state(due_ns: Int64, latencies: Float) -> SteadyState:
    """Tests rows in due order: when they were due, and their latencies in ns (+inf = failed), equally many.

    About 0.5 s for a million rows. Raises ValueError on unequal lengths.
    """
    if len(due_ns) != len(latencies):
        raise ValueError(f"due_ns and latencies must be equally many, got {len(due_ns)} and {len(latencies)}")
    n = len(latencies)
    if n < _FEWEST or due_ns[-1] <= due_ns[0]:
        why = f"only {n} requests" if n < _FEWEST else "all requests were due at once"
        return SteadyState(True, False, f"not tested: {why}")
    growth, growth_p = _backlog(due_ns, latencies)
    found: dict[str, Any] = {"backlog_per_minute": growth, "backlog_p": growth_p}
    words = [f"the backlog grew by {growth:.3g} requests a minute: above capacity"] if growth_p < LEVEL else []
    position = ranks(latencies)
    effective = n / _inflation_without_trend(position)
    if effective < _FEWEST_EFFECTIVE:
        untested = f"too short to tell warm-up or drift: worth {effective:.0f} independent requests"
        return SteadyState(not words, False, "; ".join([*words, untested]), **found)
    warmup_p = geweke(position)
    cut = mser5(position) if warmup_p < LEVEL else 0
    if cut and not _matters(float(np.median(latencies[:cut])), float(np.median(latencies[cut:]))):
        cut = 0  # the start of a slow drift, say, which the next test will find
    found |= {"warmup_p": warmup_p}
    if cut:
        found |= {"truncation_ns": int(due_ns[cut]), "excluded": cut}
        seconds = (due_ns[cut] - due_ns[0]) / 1e9
        words.append(f"the first {cut} requests ({seconds:.3g} s) differ from the rest: warm-up")
    drift = _drift(due_ns[cut:], latencies[cut:])
    words += [f"latency drifts by {drift['slope_ns_per_minute'] / 1e6:.3g} ms a minute"] if drift.pop("matters") else []
    return SteadyState(not words, True, "; ".join(words) or "no warm-up, drift or growing backlog", **found, **drift)


def mser5(series: Float) -> int:
    """How many values at the start of `series` to leave out, by MSER on means of 5: a multiple of 5, at most half.

    The cut d makes the squared standard error of the mean of the rest, var(rest) / (k - d), least.
    """
    k = len(series) // 5
    if k < 2:
        return 0
    means = series[: 5 * k].reshape(k, 5).mean(axis=1)
    left = np.arange(k, 0, -1)
    rest, squares = np.cumsum(means[::-1])[::-1], np.cumsum(means[::-1] ** 2)[::-1]
    error = (squares - rest**2 / left) / left**2
    return 5 * int(np.argmin(error[: k // 2 + 1]))


def geweke(series: Float) -> float:
    """p-value that the beginning of `series` is like its last half: Geweke's diagnostic, two-sided.

    The least of three p-values, for the first n/64, n/16 and n/4, times three. The variance of a mean of m values is
    var * v / m, with v from the last half alone, which a warm-up hasn't touched; Student's t with the degrees of
    freedom of that half.
    """
    half = series[len(series) // 2 :]
    variance, v = float(half.var()), variance_inflation(half)
    v *= 1 + 2 * math.sqrt(v / len(half))
    freedom = len(half) / v - 1
    if variance <= 0 or freedom <= 0:
        return 1.0
    smallest = 1.0
    for part in _BEGINNINGS:
        start = series[: max(len(series) // part, 1)]
        error = math.sqrt(variance * (min(1.0, v / len(start)) + v / len(half)))
        t = abs(float(start.mean() - half.mean())) / error
        smallest = min(smallest, 2 * float(stdtr(freedom, -t)))
    return min(1.0, 3 * smallest)


def theil_sen(y: Float, x: Float, confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of the slopes of all pairs, and its interval after Sen (1968), with ties: (slope, low, high).

    As scipy.stats.theilslopes, whose import costs the load generator half a second and 45 MB.
    """
    ascending = x[:, None] < x[None, :]
    slopes = np.sort(((y[None, :] - y[:, None])[ascending]) / ((x[None, :] - x[:, None])[ascending]))
    n = len(y)
    variance = float(n * (n - 1) * (2 * n + 5))
    for values in (x, y):
        ties = np.unique(values, return_counts=True)[1].astype(np.float64)
        variance -= float((ties * (ties - 1) * (2 * ties + 5)).sum())
    reach = -float(ndtri((1 - confidence) / 2)) * math.sqrt(variance / 18)
    low = max(round((len(slopes) - reach) / 2) - 1, 0)
    high = min(round((len(slopes) + reach) / 2), len(slopes) - 1)
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def mann_kendall(values: Float) -> float:
    """p-value that `values` (at most a few hundred) have no trend, two-sided, corrected as Hamed and Rao do.

    The variance of S is multiplied by n / n*, from the autocorrelations of the ranks of the detrended values that are
    significant at 5 %; the factor isn't let below 1.
    """
    n = len(values)
    later, earlier = np.tril_indices(n, -1)
    s = float(np.sign(values[later] - values[earlier]).sum())
    slope = np.median((values[later] - values[earlier]) / (later - earlier))
    rank = ranks(values - slope * np.arange(n))
    rank = rank - rank.mean()
    spread = float(rank @ rank)
    factor = 1.0
    for lag in range(1, n - 2) if spread > 1e-9 else ():
        r = float(rank[lag:] @ rank[:-lag]) / spread
        if abs(r) > 1.96 / math.sqrt(n):
            factor += 2 * (n - lag) * (n - lag - 1) * (n - lag - 2) * r / (n * (n - 1) * (n - 2))
    variance = n * (n - 1) * (2 * n + 5) / 18 * max(factor, 1.0)
    return float(2 * ndtr(-max(abs(s) - 1, 0.0) / math.sqrt(variance)))


def _drift(due_ns: Int64, latencies: Float) -> dict[str, Any]:
    """Slope of the median latency with its interval, the p-value of a trend, and whether the drift matters."""
    position = ranks(latencies)
    effective = len(latencies) / _inflation_without_trend(position)
    blocks = int(
        min(60, max(10, effective / 20))
    )  # of some twenty independent requests, so hardly dependent themselves
    edges = np.linspace(0, len(latencies), blocks + 1).astype(np.int64)
    pairs = list(pairwise(edges))
    p = mann_kendall(np.array([position[a:b].mean() for a, b in pairs]))
    medians = np.array([np.median(latencies[a:b]) for a, b in pairs])
    minutes = np.array([(due_ns[a] + due_ns[b - 1]) / 2 / _MINUTE_NS for a, b in pairs])
    known = np.isfinite(medians)
    if known.sum() < 5 or np.ptp(minutes[known]) <= 0:
        return {"trend_p": p, "matters": False}
    slope, low, high = theil_sen(medians[known], minutes[known])
    moved = abs(slope) * (due_ns[-1] - due_ns[0]) / _MINUTE_NS
    return {
        "slope_ns_per_minute": float(slope),
        "slope_low": float(low),
        "slope_high": float(high),
        "trend_p": p,
        "matters": bool(p < LEVEL and moved > _MATTERS * np.median(medians[known])),
    }


def _matters(median: float, of_rest: float) -> bool:
    """Whether two medians are far enough apart to care; +inf where half of the requests failed."""
    return median != of_rest and not abs(median - of_rest) <= _MATTERS * of_rest


def _inflation_without_trend(position: Float) -> float:
    """v of what a straight line leaves of `position`, so that a drift doesn't pass for slow dependence."""
    time = np.arange(len(position)) - (len(position) - 1) / 2
    return variance_inflation(position - float(time @ position) / float(time @ time) * time)


def _backlog(due_ns: Int64, latencies: Float) -> tuple[float, float]:
    """Growth of the backlog in requests a minute, and the p-value that it doesn't grow. Failed rows are left out."""
    answered = np.isfinite(latencies)
    due, done = due_ns[answered], np.sort(due_ns[answered] + latencies[answered])
    if len(due) < _FEWEST:
        return 0.0, 1.0
    stretches = min(100, len(due) // 10)
    times = np.linspace(due[0], due[-1], stretches + 1)
    backlog = np.searchsorted(due, times, "right") - np.searchsorted(done, times, "right")
    steps = np.diff(backlog)
    growth = float(steps.mean())
    scatter = float(steps.std(ddof=1)) / math.sqrt(stretches)
    p = float(stdtr(stretches - 1, -growth / scatter)) if scatter > 0 else float(growth <= 0)
    return growth * stretches / float(due[-1] - due[0]) * _MINUTE_NS, p
