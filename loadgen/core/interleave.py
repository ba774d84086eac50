"""When an A/B experiment may stop: order of its runs, and an interval that stays right however often it is looked at.

Runs go A B B A, B A A B, ...: a drift that is linear over a block falls on both sides alike. The difference of a block
is mean log of B − mean log of A, and blocks are independent of each other's position. Looking after every block and
stopping at the first success would find a difference where there is none far more often than in 5 %; so look k is made
at 5 % / (k (k + 1)), which sums to 5 % over all looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.core.compare import CONFIDENCE, NONE, REPEATS, Ratio, between

BLOCK = 4


def order(run: int) -> str:
    """Which side run number `run` (from 0) is of: A B B A, then B A A B, and so on."""
    block, place = divmod(run, BLOCK)
    return "ABBA"[place] if block % 2 == 0 else "BAAB"[place]


@dataclass(frozen=True)
class Look:
    """The state of an experiment after `blocks` whole blocks; `decided` when B and A are told apart."""

    blocks: int
    gain: Ratio
    confidence: float

    @property
    def decided(self) -> bool:
        return self.gain.separable


def look(a: Sequence[float], b: Sequence[float]) -> Look:
    """exp(mean of `b` − mean of `a`) from logarithms in the order in which they were measured, two a block and side.

    Each look has its own confidence (see the module). Two blocks are the least that can show their own scatter.
    """
    blocks = min(len(a), len(b)) // 2
    differences = np.array([np.mean(b[2 * k : 2 * k + 2]) - np.mean(a[2 * k : 2 * k + 2]) for k in range(blocks)])
    if blocks < 2:
        log = float(differences.mean()) if blocks else 0.0
        return Look(blocks, Ratio(math.exp(log), None, None, NONE), CONFIDENCE)
    k = blocks - 1
    confidence = 1 - (1 - CONFIDENCE) / (k * (k + 1))
    variance = float(differences.var(ddof=1)) / blocks
    return Look(blocks, between(float(differences.mean()), variance, blocks - 1, REPEATS, confidence), confidence)
