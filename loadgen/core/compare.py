"""Ratios between what was measured on one side and on the other, with intervals, and which runs may be compared.

A *fingerprint* is what a run was: facts that runs must share (`MUST`), facts that are what one compares (`AXES`), and
facts that may matter and are named when they differ (`NOTES`). A *cell* is all runs with the same axes: its repeats.

Intervals are for the ratio, at 95 %, made on logarithms with Student's t and Welch's degrees of freedom. Where both
sides have repeats, the scatter between repeats is the uncertainty: it contains the scatter inside a run. A lone run
borrows the scatter of the cell whose repeats differ most; where no cell has repeats there is only what `bootstrap.py`
sees inside a run, and it is marked so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from loadgen.core.bootstrap import Estimate

CONFIDENCE = 0.95
MARGIN = 1.03  # on half-widths: estimated variances are a little too small, and 1 must not be excluded by that

AXES = ("hardware", "backend", "precision", "tp")
MUST = ("weights", "prompts", "input tokens", "output tokens", "seeds", "limits", "arrivals", "duration", "in flight",
        "sample order", "clip", "preset", "salt", "servers")  # fmt: skip
NOTES = ("server", "driver", "host", "power limit", "clocks", "client", "client host", "tool versions", "workers",
         "warmup")  # fmt: skip

REPEATS, BORROWED, WITHIN, NONE = "repeats", "repeats of other cells", "within single runs", "none"


@dataclass(frozen=True)
class Ratio:
    """`ratio` = this side / baseline, with its interval; `basis` says what the interval rests on.

    Without an interval (`low` None) nothing is claimed to be separable.
    """

    ratio: float
    low: float | None
    high: float | None
    basis: str
    df: float = 0.0

    @property
    def separable(self) -> bool:
        """Does the interval leave out 1?"""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


@dataclass(frozen=True)
class Mean:
    """The mean logarithm of a cell's repeats: `variance` of that mean with its degrees of freedom, None if unknown.

    `within` is the part of the variance that single runs show by themselves; `spread` the variance of one run among
    repeats: its own, or, of a lone run, what `lend` gave it.
    """

    log: float
    runs: int
    variance: float | None
    df: float
    within: float | None = None
    spread: float | None = None


def mean(estimates: Sequence[Estimate]) -> Mean:
    """A cell's repeats as one figure. Raises ValueError without any."""
    if not estimates:
        raise ValueError("a cell needs at least one run")
    logs = np.array([e.log for e in estimates])
    n = len(logs)
    known = [(e.variance, e.df) for e in estimates if e.variance is not None]
    within = sum(v for v, _ in known) / n**2 if len(known) == n else None
    if n > 1:
        spread = float(logs.var(ddof=1))
        return Mean(float(logs.mean()), n, spread / n, n - 1, within, spread)
    return Mean(float(logs[0]), 1, within, known[0][1] if known else 0.0, within)


def lend(means: Sequence[Mean]) -> list[Mean]:
    """The same figures, but a lone run has the scatter of those repeats that differ most: how much a second run would
    have differed is not in the first one. It keeps its own where that is larger, or where nothing has repeats."""
    spread, df = max(((m.spread, m.df) for m in means if m.spread is not None), default=(None, 0.0))
    if spread is None:
        return list(means)
    return [m if m.runs > 1 or (m.variance or 0.0) > spread else replace(m, variance=spread, df=df, spread=spread)
            for m in means]  # fmt: skip


def ratio(
    side: Sequence[Estimate], baseline: Sequence[Estimate], paired: Estimate | None = None, others: Sequence[Mean] = ()
) -> Ratio:
    """exp(mean log of `side` − mean log of `baseline`). `paired`, of two single runs of one schedule, is log side/base;
    it is used where none of the `others`, the further cells of a comparison, has repeats to lend their scatter.

    Raises ValueError where a side is empty.
    """
    a, b = mean(side), mean(baseline)
    if paired is not None and all(m.runs == 1 for m in (a, b, *others)):
        return between(paired.log, paired.variance, paired.df, WITHIN)
    a, b, *_ = lend([a, b, *others])
    return contrast([a], [b])


def contrast(plus: Sequence[Mean], minus: Sequence[Mean]) -> Ratio:
    """exp(Σ log of `plus` − Σ log of `minus`) with its interval."""
    means = [*plus, *minus]
    log = math.fsum([m.log for m in plus] + [-m.log for m in minus])
    if any(m.variance is None for m in means):
        return between(log, None, 0.0, NONE)
    alone = [m for m in means if m.runs == 1]
    basis = REPEATS if not alone else BORROWED if any(m.spread is not None for m in means) else WITHIN
    sources: dict[tuple[float | None, float, int], float] = {}
    for place, m in enumerate(means):  # one scatter that stands for several cells is one source of error, not several
        source = (m.spread, m.df, -1 if m.spread is not None else place)
        sources[source] = sources.get(source, 0.0) + (m.variance or 0.0)
    return between(log, *welch([(variance, df) for (_, df, _), variance in sources.items()]), basis)


def welch(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The variance of a sum of independent figures, and Welch and Satterthwaite's degrees of freedom of it."""
    total = sum(v for v, _ in parts)
    below = sum(v * v / df for v, df in parts if df > 0)
    return total, (total * total / below if below > 0 else math.inf)


def between(log: float, variance: float | None, df: float, basis: str, confidence: float = CONFIDENCE) -> Ratio:
    """The ratio exp(log) with its interval, from the variance of the logarithm."""
    if variance is None or df <= 0:
        return Ratio(_exp(log), None, None, NONE)
    half = half_width(variance, df, confidence)
    return Ratio(_exp(log), _exp(log - half), _exp(log + half), basis, df)


def _exp(log: float) -> float:
    """exp that does not overflow: two repeats can be worth an interval of many powers of ten."""
    return math.exp(min(max(log, -300.0), 300.0))


def half_width(variance: float, df: float, confidence: float = CONFIDENCE) -> float:
    """Half the width of an interval for a mean logarithm."""
    return float(MARGIN * stdtrit(min(df, 1e6), (1 + confidence) / 2) * math.sqrt(variance))


def differing(fingerprints: Sequence[Mapping[str, str]], names: Sequence[str]) -> dict[str, list[str]]:
    """The facts of `names` that are not the same in all fingerprints, each with its distinct values."""
    out = {}
    for name in names:
        values = list(dict.fromkeys(f.get(name, "unknown") for f in fingerprints))
        if len(values) > 1:
            out[name] = values
    return out
