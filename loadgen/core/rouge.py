"""ROUGE: how many words, pairs of words and common subsequences an answer shares with a reference (Lin 2004).

The figures are those of Google's `rouge_score`, which MLPerf's evaluators use, given the same `stem`. Words are runs of
ASCII letters and digits in lower case. Every score is an F-measure from 0 to 1; an empty side scores 0.

>>> rouge("The cat sat.", "The cat sat down.")["rouge1"]
0.8571428571428571
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
STEMMED_FROM = 4  # letters: rouge_score leaves shorter words alone
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")

Stem = Callable[[str], str]


def sentences(text: str) -> list[str]:
    """`text` cut after each `.`, `?` or `!` that white space follows.

    MLPerf's evaluators ask NLTK's punkt model, which knows abbreviations: only ROUGE-Lsum can differ by that.
    """
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def rouge(answer: str, reference: str, stem: Stem | None = None) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum of one answer. `stem` maps a word to its stem; None leaves words as they are.

    For -Lsum a line feed ends a sentence as well.
    """
    lines = ("\n".join(sentences(text)).split("\n") for text in (answer, reference))
    mine, other = ([_words(line, stem) for line in part] for part in lines)
    flat_mine, flat_other = list(chain(*mine)), list(chain(*other))
    sizes = len(flat_mine), len(flat_other)
    return {
        "rouge1": _overlap(flat_mine, flat_other, 1),
        "rouge2": _overlap(flat_mine, flat_other, 2),
        "rougeL": _f_measure(_lengths(flat_other, flat_mine)[-1][1], *sizes),
        "rougeLsum": _f_measure(_union_hits(mine, other), *sizes),
    }


def _words(text: str, stem: Stem | None) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [stem(w) if len(w) >= STEMMED_FROM else w for w in words] if stem else words


def _overlap(mine: list[str], other: list[str], n: int) -> float:
    grams = [Counter(zip(*(words[k:] for k in range(n)), strict=False)) for words in (mine, other)]
    return _f_measure((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def _f_measure(hits: int, mine: int, other: int) -> float:
    return 2 * hits / (mine + other) if hits else 0.0


def _lengths(rows: Sequence[str], columns: Sequence[str]) -> list[tuple[int, int]]:
    """Longest common subsequences of every prefix of `rows` with `columns`: (bits, length), the empty prefix first.

    A row of the textbook table is one integer: bit j is 0 where the length grows at column j (Crochemore et al. 2001),
    so a row costs a few operations on long integers instead of a step per column.
    """
    places: dict[str, int] = {}
    for at, word in enumerate(columns):
        places[word] = places.get(word, 0) | 1 << at
    bits = everything = (1 << len(columns)) - 1
    table = [(bits, 0)]
    for word in rows:
        shared = bits & places.get(word, 0)
        bits = ((bits + shared) | (bits - shared)) & everything
        table.append((bits, len(columns) - bits.bit_count()))
    return table


def _union_hits(answer: list[list[str]], reference: list[list[str]]) -> int:
    """Words of the reference's sentences that lie on a common subsequence with any sentence of the answer.

    A word counts no more often than it stands in the answer, as in rouge_score.
    """
    left, hits = Counter(word for sentence in answer for word in sentence), 0
    for sentence in reference:
        on_a_path = set().union(*(_path(sentence, other) for other in answer))
        for at in sorted(on_a_path):
            if left[sentence[at]] > 0:
                left[sentence[at]] -= 1
                hits += 1
    return hits


def _path(rows: list[str], columns: list[str]) -> set[int]:
    """Which of `rows` the longest common subsequence takes; of several, the one that rouge_score's walk finds."""
    table, taken = _lengths(rows, columns), set()
    i, j = len(rows), len(columns)
    while i and j:
        if rows[i - 1] == columns[j - 1]:
            i, j = i - 1, j - 1
            taken.add(i)
        elif _length(table[i][0], j - 1) > _length(table[i - 1][0], j):
            j -= 1
        else:
            i -= 1
    return taken


def _length(bits: int, columns: int) -> int:
    """The table's entry: zeros among the first `columns` bits."""
    return columns - (bits & ((1 << columns) - 1)).bit_count()
