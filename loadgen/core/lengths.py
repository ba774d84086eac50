"""How many tokens each sample has: a spec as text, and lengths drawn from it. A pure function of spec and seed.

    128, fixed:128        every sample
    uniform:64-256        both ends included
    normal:256,64         mean and standard deviation, rounded, at least 1
    dist:llama2-70b       the published statistics of that benchmark's data set

Where of a data set only mean and maximum are published, `Statistics` gives the distribution on 1 ... maximum that
assumes least beyond them (a truncated geometric one; without a mean, the uniform one). It's an approximation.

>>> draw(parse("uniform:2-4"), 5, seed=1).tolist()
[3, 2, 2, 3, 3]
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadgen.core.record import Int64

LONGEST = 10_000_000
FORMS = "a number, fixed:128, uniform:64-256, normal:256,64 or dist:BENCHMARK"


@dataclass(frozen=True)
class Statistics:
    """What is published of a data set's lengths, in tokens."""

    maximum: int
    mean: float | None = None


@dataclass(frozen=True)
class Lengths:
    """A parsed spec: kind is `fixed` (low), `uniform` (low to high), `normal` (low is the mean, high the deviation)
    or `dist` (1 to high, with mean `low` where that is not 0)."""

    kind: str
    low: float
    high: float = 0.0


def parse(spec: str, known: Mapping[str, Statistics] | None = None) -> Lengths:
    """The spec as data. `known` are the benchmarks that `dist:` may name. Raises ValueError, saying what is allowed."""
    text = spec.strip()
    if match := re.fullmatch(r"(?:fixed:)?(\d+)", text):
        return _checked(Lengths("fixed", int(match[1])), int(match[1]), spec)
    if match := re.fullmatch(r"uniform:(\d+)-(\d+)", text):
        low, high = int(match[1]), int(match[2])
        if low > high:
            raise ValueError(f"{spec}: {low} is above {high}")
        return _checked(Lengths("uniform", low, high), low, spec)
    if match := re.fullmatch(r"normal:(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", text):
        return _checked(Lengths("normal", float(match[1]), float(match[2])), float(match[1]), spec)
    if text.startswith("dist:"):
        name = text.removeprefix("dist:")
        if name not in (known or {}):
            raise ValueError(f"{spec}: no published lengths of {name!r}; there are: {', '.join(known or {}) or 'none'}")
        statistics = (known or {})[name]
        return Lengths("dist", statistics.mean or 0.0, statistics.maximum)
    raise ValueError(f"{spec!r} is no length: give {FORMS}")


def _checked(lengths: Lengths, least: float, spec: str) -> Lengths:
    if least < 1 or max(lengths.low, lengths.high) > LONGEST:
        raise ValueError(f"{spec}: lengths must be from 1 to {LONGEST:,} tokens")
    return lengths


def draw(lengths: Lengths, count: int, seed: int) -> Int64:
    """`count` lengths, each at least 1; shape (count,). numpy's frozen legacy stream: the same in every version."""
    rng = np.random.RandomState(seed % 2**32)
    if lengths.kind == "fixed":
        return np.full(count, int(lengths.low), dtype=np.int64)
    if lengths.kind == "uniform":
        spread: Int64 = rng.randint(int(lengths.low), int(lengths.high) + 1, size=count, dtype=np.int64)
        return spread
    if lengths.kind == "normal":
        values = np.rint(rng.normal(lengths.low, lengths.high, size=count))
        clipped: Int64 = np.clip(values, 1, LONGEST).astype(np.int64)
        return clipped
    weights = _least_assuming(int(lengths.high), lengths.low or None)
    picked: Int64 = np.searchsorted(np.cumsum(weights), rng.random_sample(count), "right") + 1
    capped: Int64 = np.minimum(picked, int(lengths.high))
    return capped


def _least_assuming(maximum: int, mean: float | None) -> npt.NDArray[np.float64]:
    """Probabilities of 1 ... maximum: the distribution of greatest entropy with that mean, p(k) ~ r^k."""
    steps = np.arange(1, maximum + 1, dtype=np.float64)
    if mean is None:
        return np.full(maximum, 1.0 / maximum)
    if mean >= maximum:
        return np.where(steps == maximum, 1.0, 0.0)

    def weights(rate: float) -> npt.NDArray[np.float64]:
        exponents = rate * (steps - (maximum if rate > 0 else 1))
        raised = np.exp(exponents)
        return np.asarray(raised / raised.sum())

    import scipy.optimize  # late: every load worker imports this file, and few need 20 MB for it

    edge = 50.0
    rate = scipy.optimize.brentq(lambda r: math.fsum(weights(r) * steps) - mean, -edge, edge)
    return weights(float(rate))
