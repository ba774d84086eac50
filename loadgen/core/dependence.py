"""How much less a series of dependent observations is worth than as many independent ones.

A queue makes neighbours alike: when one request is late, so is the next. The mean of n such observations then has the
variance of the mean of n / v independent ones, where

    v = 1 + 2 (r1 + r2 + r3 + ...)        rk = autocorrelation at lag k

is the *inflation* of the variance, and n / v the effective sample size. v is estimated by Geyer's initial monotone
sequence (Practical Markov chain Monte Carlo, Statistical Science 1992): sums of neighbouring pairs of r are added up
while they are positive, and not allowed to rise. It assumes nothing about how fast r falls. Because a batching
server's r swings below zero at first (the members of a batch end together) and a slow swell would hide behind that,
the sum is repeated on means of 2, 4, 8, ... neighbours, as in Flyvbjerg and Petersen's blocking (J. Chem. Phys. 1989),
and the largest of them counts. benchmarks/false_pass.py shows what this choice comes to.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, next_fast_len, rfft

from loadgen.core.record import Bool

Float = npt.NDArray[np.float64]

LEAST_BLOCKS = 64  # blocking stops before fewer than this, or 2 sqrt(n), are left: their scatter would inflate v
MOST_BLOCKS = 2**16  # longer series start as means, so that a million rows cost what 65,536 do
THRESHOLDS = (0.5, 0.75, 0.9, 0.95)  # quantiles of latency at which lateness is watched, see `latency_inflation`


def variance_inflation(series: Float | Bool) -> float:
    """v of `series`, finite and in the order of time: its long-run variance over its variance, at least 1.

    A constant series has v = 1: nothing in it says otherwise. For independent values the largest of several noisy
    estimates is some 1.1 to 1.3. With n / v below about 10 v is too small, since the series is shorter than its swells.
    O(n) time and memory; 1 M values take some 40 ms.
    """
    x = np.asarray(series, dtype=np.float64)
    n = len(x)
    if n < 4:
        return 1.0
    x = x - x.mean()
    variance = float(x @ x) / n
    if variance <= 0:
        return 1.0
    largest, width = 1.0, -(-n // MOST_BLOCKS)
    least = max(LEAST_BLOCKS, 2 * math.sqrt(n))
    while True:
        blocks = x[: n // width * width].reshape(-1, width).mean(axis=1)
        blocks -= blocks.mean()
        spread = float(blocks @ blocks) / len(blocks)
        largest = max(largest, width * spread / variance * _geyer(blocks))
        width *= 2
        if n // width < least:
            return largest


def effective_size(series: Float | Bool) -> float:
    """How many independent observations would estimate the mean of `series` as well: n / v, in (0, n]."""
    return len(series) / variance_inflation(series)


def latency_inflation(latencies: Float, over: Bool | None = None) -> float:
    """The largest v among the ranks of `latencies` (due order, +inf = failed), four thresholds on them, and `over`.

    Late requests are rare, and a short run may hold one cluster of them or none, which says nothing about how long
    clusters are. The latencies below the limit do: a queue that keeps its ordinary answers alike for a thousand
    requests keeps late ones alike too. Ranks make this independent of the scale and let failures be the slowest.
    """
    rank = ranks(latencies)
    found = [variance_inflation(rank), *(variance_inflation(rank >= level) for level in THRESHOLDS)]
    if over is not None and over.any():
        found.append(variance_inflation(over))
    return max(found)


def ranks(values: Float) -> Float:
    """Mid-ranks of `values` in [0, 1); equal values share one, so that ties cannot pose as a trend."""
    n = len(values)
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    first = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]])) if n else np.empty(0, np.int64)
    counts = np.diff(np.append(first, n))
    out = np.empty(n)
    out[order] = np.repeat((first + (counts - 1) / 2) / max(n, 1), counts)
    return out


def _geyer(centred: Float) -> float:
    """1 + 2 (r1 + r2 + ...) of a centred series, by Geyer's initial monotone sequence; 0 for a constant one."""
    n = len(centred)
    size = next_fast_len(2 * n, real=True)  # zero padding, so that the end does not meet the beginning
    spectrum = rfft(centred, size)
    covariance = irfft(spectrum.real**2 + spectrum.imag**2, size)[: n // 2 * 2]
    if covariance[0] <= 0:
        return 0.0
    pairs = (covariance / covariance[0]).reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs <= 0)
    pairs = pairs[: negative[0]] if len(negative) else pairs
    return float(2 * np.minimum.accumulate(pairs).sum() - 1)
