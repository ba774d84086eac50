"""How far answers agree with reference answers: token by token where ids are known, by ROUGE where only texts are.

Greedy answers of one model should be equal whatever engine computed them, up to ties that rounding decides. So the
first place where an answer leaves its reference is what matters: all tokens after it had another context.

>>> agreement([[1, 2, 3], [4, 5]], [[1, 2, 9], [4, 5]])["token_agreement"]
0.8
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
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


def agreement(answers: Sequence[Tokens], references: Sequence[Tokens]) -> dict[str, Any]:
    """Greedy token agreement over pairs of answers; JSON-ready.

    `token_agreement` is the share of reference positions before the first divergence, over all samples together:
    a token that agrees after it is chance. `exact_match` is the share of equal answers. `divergence` holds p10, p50 and
    the earliest of first divergences, over the samples that diverge at all. Raises ValueError on unequal or no counts.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"need as many answers as references and at least one: {len(answers)} and {len(references)}")
    places = [first_divergence(a, r) for a, r in zip(answers, references, strict=True)]
    lengths = [max(len(a), len(r)) for a, r in zip(answers, references, strict=True)]
    agreeing = sum(length if at is None else at for at, length in zip(places, lengths, strict=True))
    early = np.sort([at for at in places if at is not None])
    return {
        "samples": len(answers),
        "token_agreement": agreeing / max(sum(lengths), 1),
        "exact_match": sum(at is None for at in places) / len(places),
        "divergence": {
            "samples": len(early),
            "earliest": int(early[0]) if len(early) else None,
            "p10": int(early[int(len(early) * 0.10)]) if len(early) else None,
            "p50": int(early[int(len(early) * 0.50)]) if len(early) else None,
        },
    }


def rouge(answer: str, reference: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measures (Lin 2004), as Google's rouge_score without stemming computes them.

    Words are runs of lower-case ASCII letters and digits; an empty side scores 0.
    """
    mine, other = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference))
    scores = {f"rouge{n}": _overlap(mine, other, n) for n in (1, 2)}
    return scores | {"rougeL": _f_measure(_longest_common(mine, other), len(mine), len(other))}


def mean_rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean of each ROUGE over pairs, as a fraction. Raises ValueError on unequal counts or none."""
    if len(answers) != len(references) or not answers:
        raise ValueError(f"need as many answers as references and at least one: {len(answers)} and {len(references)}")
    scores = [rouge(a, r) for a, r in zip(answers, references, strict=True)]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _overlap(mine: list[str], other: list[str], n: int) -> float:
    grams = [Counter(zip(*(words[k:] for k in range(n)), strict=False)) for words in (mine, other)]
    return _f_measure((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def _f_measure(hits: int, mine: int, other: int) -> float:
    return 2 * hits / (mine + other) if hits else 0.0


def _longest_common(mine: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, one numpy row at a time."""
    if not mine or not other:
        return 0
    codes = {word: code for code, word in enumerate({*mine, *other})}
    columns = np.array([codes[word] for word in other])
    row = np.zeros(len(other) + 1, dtype=np.int64)
    for word in mine:
        # Either extend the match that ended before this column, or keep the best so far to the left or above.
        extended = np.where(columns == codes[word], row[:-1] + 1, row[1:])
        row = np.concatenate(([0], np.maximum.accumulate(extended)))
    return int(row[-1])
