"""Where the boundary of a noisy server lies, after runs that passed and runs that failed.

Near its boundary a server passes by luck. The chance that a full-length run at rate r passes is taken as

    P(pass) = Phi((ln C - ln r) / s)

where C is the boundary, the rate that passes half of the time, and s how far luck reaches. All C are equally likely
beforehand. s comes from the work in a run: the sum of n service times with coefficient of variation c scatters by
c / sqrt(n), so s is expected around 0.5 / sqrt(n) or less, and anything from a sixteenth to four times of that is
possible: arrivals are the same in every run, so where service times are even there is hardly any luck.
Consistent runs speak for a small s, contradictory ones for a large one, which asks for more runs.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.special import log_ndtr

SCATTER = 0.5
FACTORS = np.array([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0])
WEIGHTS = np.array([0.1, 0.1, 0.15, 0.2, 0.2, 0.15, 0.1])
POINTS = 400


@lru_cache(maxsize=4096)  # a search is replayed from its history at each step
def quantiles(trials: tuple[tuple[float, bool], ...], requests: float, levels: tuple[float, ...]) -> tuple[float, ...]:
    """Quantiles of the boundary C at `levels`, after `trials` of (rate, passed) with about `requests` requests each.

    Raises ValueError unless something passed and something failed: one end would be unknown.
    """
    passed, failed = [r for r, ok in trials if ok], [r for r, ok in trials if not ok]
    if not (passed and failed):
        raise ValueError("a boundary lies between a rate that passed and one that failed")
    spread = np.clip(FACTORS * SCATTER / math.sqrt(max(requests, 1.0)), 0.001, 0.2)
    ends = sorted((math.log(max(passed)), math.log(min(failed))))
    margin = max(0.05, 4 * float(spread[4]))
    grid = np.linspace(ends[0] - margin, ends[1] + margin, POINTS)
    likelihood = np.tile(np.log(WEIGHTS)[:, None], (1, POINTS))
    for rate, ok in trials:
        z = (grid[None, :] - math.log(rate)) / spread[:, None]
        likelihood += log_ndtr(z if ok else -z)
    density = np.exp(likelihood - likelihood.max()).sum(axis=0)
    cumulative = np.cumsum(density) / density.sum()
    return tuple(math.exp(float(grid[int(np.searchsorted(cumulative, level))])) for level in levels)
