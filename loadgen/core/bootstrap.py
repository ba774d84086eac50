"""How far a figure of one run would scatter if the run were made again on the same machine: block bootstrap.

Latencies of neighbours are alike, so single requests may not be resampled. A run in due order is cut into blocks of
equal length, several times as long as the dependence lasts (`dependence.variance_inflation` says how long), and whole
blocks are drawn with replacement (Carlstein, Annals of Statistics 1986). Everything is estimated as a logarithm, since
comparisons are ratios. Two runs of one schedule may be drawn with the same blocks: what befell both then cancels.

What this cannot see is how two runs of the same thing differ; `compare.py` takes that from repeats.
benchmarks/compare_coverage.py shows how often the intervals cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loadgen.core.dependence import Float, variance_inflation
from loadgen.core.record import Int64

RESAMPLES = 400
CANDIDATES = 512
MOST_BLOCKS = 250  # more of them tell the scatter no better
LENGTHS = 4.0  # block length in inflations v: what blocks cut apart is then a small share of the dependence
FEWEST_BLOCKS = 10  # fewer blocks cannot tell their own scatter
LEAST_TAIL = 15.0  # effective values beyond a quantile; with fewer the quantile is a matter of one or two clusters
_LEAN = 4.0  # v of a short series tends to be too small, see confidence.py


@dataclass(frozen=True)
class Estimate:
    """A figure of one run as a natural logarithm, and the variance of that with its degrees of freedom.

    `variance` is None where the run is too short to tell it.
    """

    log: float
    variance: float | None = None
    df: float = math.inf

    @property
    def value(self) -> float:
        return math.exp(self.log)


Statistic = Callable[[Float], Float]  # block weights, resamples x blocks → the logarithm of the figure in each


def quantile(values: Float, p: float, seed: int = 0) -> Estimate | None:
    """The p-quantile of positive `values` in due order (+inf = failed), LoadGen's sorted[floor(n p)].

    None where there is no value or the quantile lies among failures.
    """
    point = _quantile(values, p)
    if point is None:
        return None
    blocks = _quantile_blocks(values, p)
    if blocks is None:
        return Estimate(math.log(point))
    return _estimate(math.log(point), len(values), blocks, lambda w: _quantiles(values, p, blocks, w), seed)


def mean(values: Float, seed: int = 0) -> Estimate | None:
    """The mean of positive `values` in due order; None where one failed or there is none."""
    if not len(values) or not np.isfinite(values).all() or values.mean() <= 0:
        return None
    return ratio_of_sums(values, np.ones(len(values)), seed)


def rate(done_ns: Int64, amounts: Float, seed: int = 0) -> Estimate | None:
    """Amounts per second from T0 to the last completion, of completed rows in any order. None without any.

    Blocks are made of consecutive completions: each brings its amount, and the time since the one before it.
    """
    order = np.argsort(done_ns, kind="stable")
    gaps = np.diff(done_ns[order], prepend=0) / 1e9
    amounts = amounts[order]
    if not len(order) or gaps.sum() <= 0 or amounts.sum() <= 0:
        return None
    return ratio_of_sums(amounts, gaps, seed)


def ratio_of_sums(above: Float, below: Float, seed: int = 0) -> Estimate:
    """log(Σ above / Σ below) of rows in the order of time."""
    log = math.log(above.sum() / below.sum())
    influence = above / above.mean() - below / below.mean()
    blocks = _blocks(len(above), variance_inflation(influence))
    if blocks is None:
        return Estimate(log)
    sums = [_block_sums(x, blocks.length) for x in (above, below)]
    return _estimate(log, len(above), blocks, lambda w: np.log((w @ sums[0]) / (w @ sums[1])), seed)


def paired_quantile(a: Float, b: Float, p: float, seed: int = 0) -> Estimate | None:
    """log(quantile of b / quantile of a) where row i of both was the same slot of the same schedule."""
    points = _quantile(a, p), _quantile(b, p)
    if points[0] is None or points[1] is None:
        return None
    log = math.log(points[1] / points[0])
    found = _quantile_blocks(a, p), _quantile_blocks(b, p)
    if found[0] is None or found[1] is None:
        return Estimate(log)
    # What scatters is where only one of the two is slow: that lasts less long than what makes both slow.
    apart = (b > points[1]).astype(np.float64) - (a > points[0])
    blocks = _blocks(len(a), variance_inflation(apart))
    if blocks is None:
        return Estimate(log)
    return _estimate(log, len(a), blocks, lambda w: _quantiles(b, p, blocks, w)
                     - _quantiles(a, p, blocks, w), seed)  # fmt: skip


def paired_mean(a: Float, b: Float, seed: int = 0) -> Estimate | None:
    """log(mean of b / mean of a), paired as in `paired_quantile`; None where a row failed."""
    both = np.concatenate([a, b])
    if not len(both) or not np.isfinite(both).all() or both.min() <= 0:
        return None
    return ratio_of_sums(b, a, seed)


@dataclass(frozen=True)
class _Blocks:
    """`length` in rows, for an `inflation` v; `kept` is the share of the variance that blocks of that length show."""

    length: int
    kept: float
    inflation: float


def _estimate(log: float, n: int, blocks: _Blocks, statistic: Statistic, seed: int) -> Estimate:
    """The variance of `statistic` over resampled blocks, corrected for their number and for what they cut apart."""
    count = n // blocks.length
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count)) + count * np.arange(RESAMPLES)[:, None]
    found = statistic(np.bincount(drawn.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(float))
    if not np.isfinite(found).all():  # a resample whose quantile failed: there is no telling how slow it might be
        return Estimate(log)
    return Estimate(log, float(found.var(ddof=1)) * count / (count - 1) / blocks.kept, count - 1)


def _blocks(n: int, inflation: float) -> _Blocks | None:
    """None where there would be too few blocks. A series that shows no dependence is resampled one by one."""
    if n < FEWEST_BLOCKS:
        return None
    length = 1
    if inflation > 1.0:
        length = math.ceil(LENGTHS * inflation * (1 + _LEAN * math.sqrt(inflation / n)))
    if n // length < FEWEST_BLOCKS:
        return None
    length = max(length, -(-n // MOST_BLOCKS))
    # Blocks of length L of an AR(1) series lose (v - 1 / v) / 2L of the variance at their cuts.
    return _Blocks(length, 1 - (inflation - 1 / inflation) / (2 * length), inflation)


def _quantile_blocks(values: Float, p: float) -> _Blocks | None:
    """Blocks for a quantile, by the dependence of being slow: at the quantile, at p50 and at p90.

    None where too few values lie beyond the quantile: they would be one or two clusters of slow requests.
    """
    n = len(values)
    if n < 2 * FEWEST_BLOCKS:
        return None
    ascending = np.sort(values)
    at = {int(n * p), int(n * 0.5), int(n * min(p, 0.9))}
    v = max(variance_inflation(values > ascending[i]) for i in at)
    return None if n * min(p, 1 - p) / v < LEAST_TAIL else _blocks(n, v)


def _quantile(values: Float, p: float) -> float | None:
    if not len(values):
        return None
    point = float(np.partition(values, int(len(values) * p))[int(len(values) * p)])
    return point if math.isfinite(point) and point > 0 else None


def _quantiles(values: Float, p: float, blocks: _Blocks, weights: Float) -> Float:
    """log of the p-quantile for each row of block weights.

    Only order statistics around the quantile are candidates: 512 ranks within eight standard errors of it, which for
    most runs are all there are.
    """
    count = len(values) // blocks.length
    n = count * blocks.length
    values = values[:n]
    reach = 8 * math.sqrt(blocks.inflation * p * (1 - p) / n) * n + 2
    low, high = max(0, math.floor(n * p - reach)), min(n - 1, math.ceil(n * p + reach))
    ranks = np.unique(np.linspace(low, high, min(CANDIDATES, high - low + 1)).astype(np.int64))
    candidates = np.sort(values)[ranks]
    above = np.searchsorted(candidates, values)  # a value counts at all candidates from here on
    cells = np.repeat(np.arange(count), blocks.length) * (len(ranks) + 1) + above
    counts = np.bincount(cells, minlength=count * (len(ranks) + 1)).reshape(count, -1)
    reached = weights @ np.cumsum(counts, axis=1)[:, :-1].astype(np.float64)
    index = np.minimum((reached <= int(n * p)).sum(axis=1), len(ranks) - 1)
    return np.asarray(np.log(candidates[index]))


def _block_sums(values: Float, length: int) -> Float:
    return np.asarray(values[: len(values) // length * length].reshape(-1, length).sum(axis=1))
