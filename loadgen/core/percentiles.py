"""Percentiles as LoadGen takes them, of values that are all there and of gaps that are too many to keep."""

from __future__ import annotations

from typing import Any

import numpy as np

from loadgen.core.record import Int64

PERCENTILES = (0.50, 0.90, 0.95, 0.97, 0.99, 0.999)
Summary = dict[str, Any]


def percentile_name(p: float) -> str:
    """0.99 → "p99", 0.999 → "p99.9"."""
    return f"p{p * 100:.10g}"


class GapHistogram:
    """Pooled gaps between responses, in constant memory: log-spaced bins 0.034 % wide (1/2048 of an octave).

    A million streams of a hundred tokens have 10^8 gaps; exact percentiles would need them all. Reported values are
    the upper edge of their bin, so they err by at most 0.034 %, upwards.
    """

    BINS_PER_OCTAVE = 2048

    def __init__(self) -> None:
        self.counts = np.zeros(45 * self.BINS_PER_OCTAVE, dtype=np.int64)  # 1 ns to 9.7 hours
        self.total_ns = 0

    def add(self, gaps_ns: Int64) -> None:
        """Counts an array of gaps, in ns."""
        bins = np.ceil(np.log2(np.maximum(gaps_ns, 1)) * self.BINS_PER_OCTAVE).astype(np.int64)
        self.counts += np.bincount(np.minimum(bins, len(self.counts) - 1), minlength=len(self.counts))
        self.total_ns += int(gaps_ns.sum())

    def describe(self) -> Summary:
        """count, mean, min, max and percentiles, in ns, like `describe`."""
        count = int(self.counts.sum())
        if not count:
            return {"count": 0, "failed": 0}
        cumulative = np.cumsum(self.counts)
        edges = {percentile_name(p): int(np.searchsorted(cumulative, int(count * p), "right")) for p in PERCENTILES}
        edges |= {"min": int(np.flatnonzero(self.counts)[0]), "max": int(np.flatnonzero(self.counts)[-1])}
        values = {name: round(2 ** (bin_ / self.BINS_PER_OCTAVE)) for name, bin_ in edges.items()}
        return {"count": count, "failed": 0, "mean": self.total_ns / count, **values}


def describe(values: Int64, failed: int) -> Summary:
    """count, failed, mean, min, max and LoadGen percentiles of `values`, with `failed` infinite values behind them."""
    values = np.sort(values)
    n = len(values) + failed
    out: Summary = {"count": len(values), "failed": failed}
    if len(values):
        out |= {"mean": float(values.mean()), "min": int(values[0]), "max": int(values[-1])}
    for p in PERCENTILES if n else ():
        index = int(n * p)
        out[percentile_name(p)] = int(values[index]) if index < len(values) else None
    return out
