"""How far answers agree with reference answers, token by token. (`core.rouge` compares texts.)

Greedy answers of one model should be equal whatever engine computed them, up to ties that rounding decides. So the
first place where an answer leaves its reference is what matters: all tokens after it had another context.

>>> agreement([([1, 2, 3], [1, 2, 9]), ([4, 5], [4, 5])])["token_agreement"]
0.8
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Tokens = Sequence[int] | Sequence[str]


def first_divergence(answer: Tokens, reference: Tokens) -> int | None:
    """The first position at which the two differ, or where one ends; None when they are equal."""
    for at, (mine, other) in enumerate(zip(answer, reference, strict=False)):
        if mine != other:
            return at
    shorter = min(len(answer), len(reference))
    return None if len(answer) == len(reference) else shorter


def agreement(pairs: Iterable[tuple[Tokens, Tokens]]) -> dict[str, Any]:
    """Greedy token agreement over pairs of answer and reference; JSON-ready. Pairs are read once and not kept.

    `token_agreement` is the share of reference positions before the first divergence, over all samples together:
    a token that agrees after it is chance. `equal` and `exact_match` are count and share of equal answers. `divergence`
    holds p10, p50 and the earliest of first divergences, over the samples that diverge at all. Raises ValueError where
    there are no pairs.
    """
    samples = positions = agreeing = 0
    places = array("q")
    for answer, reference in pairs:
        length, at = max(len(answer), len(reference)), first_divergence(answer, reference)
        samples, positions, agreeing = samples + 1, positions + length, agreeing + (length if at is None else at)
        if at is not None:
            places.append(at)
    if not samples:
        raise ValueError("need at least one pair of answer and reference")
    early = np.sort(np.array(places, dtype=np.int64))
    return {
        "samples": samples,
        "token_agreement": agreeing / max(positions, 1),
        "equal": samples - len(early),
        "exact_match": (samples - len(early)) / samples,
        "divergence": {
            "samples": len(early),
            "earliest": int(early[0]) if len(early) else None,
            "p10": int(early[int(len(early) * 0.10)]) if len(early) else None,
            "p50": int(early[int(len(early) * 0.50)]) if len(early) else None,
        },
    }
