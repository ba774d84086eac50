"""Agreement with reference answers: divergence by hand, ROUGE against values worked out on paper and a slow twin."""

import doctest
import random
from functools import lru_cache

import pytest

from loadgen.core import accuracy


@pytest.mark.parametrize(
    ("answer", "reference", "place"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 9, 3], 1), ([1], [1, 2], 1), ([1, 2], [1], 1), ([], [], None),
     ([], [1], 0), ([5], [6], 0)],
)  # fmt: skip
def test_first_divergence(answer, reference, place):
    assert accuracy.first_divergence(answer, reference) == place


def test_what_agrees_after_the_divergence_does_not_count():
    found = accuracy.agreement([[1, 2, 3, 4], [7, 8]], [[1, 9, 3, 4], [7, 8]])
    assert found["token_agreement"] == pytest.approx((1 + 2) / 6)
    assert found["exact_match"] == 0.5
    assert found["divergence"] == {"samples": 1, "earliest": 1, "p10": 1, "p50": 1}


def test_an_answer_that_goes_on_too_long_does_not_agree():
    assert accuracy.agreement([[1, 2, 3, 4]], [[1, 2]])["token_agreement"] == 0.5
    assert accuracy.agreement([[1, 2]], [[1, 2]])["divergence"]["p50"] is None


def test_rouge_on_paper():
    scores = accuracy.rouge("The quick brown fox jumps over the dog", "The brown quick fox leaps over the lazy dog.")
    # 8 and 9 words, 7 in common; bigrams 7 and 8: "over the" alone; longest common: the quick|brown fox over the dog
    assert scores["rouge1"] == pytest.approx(2 * 7 / 17)
    assert scores["rouge2"] == pytest.approx(2 * 1 / 15)
    assert scores["rougeL"] == pytest.approx(2 * 6 / 17)
    assert accuracy.rouge("same words", "same words") == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert set(accuracy.rouge("", "x").values()) == {0.0} == set(accuracy.rouge("x", "").values())
    assert accuracy.rouge("a a a", "a")["rouge1"] == pytest.approx(2 * 1 / 4)  # repeats are clipped
    assert accuracy.mean_rouge(["a b", "a"], ["a b", "c"])["rouge1"] == 0.5


def test_rouge_l_equals_the_textbook_recursion():
    rng = random.Random(3)

    for _ in range(60):
        mine, other = (tuple(rng.choices("abcde", k=rng.randint(1, 14))) for _ in range(2))

        @lru_cache(None)
        def common(i, j, mine=mine, other=other):
            if i == 0 or j == 0:
                return 0
            if mine[i - 1] == other[j - 1]:
                return common(i - 1, j - 1) + 1
            return max(common(i - 1, j), common(i, j - 1))

        expected = 2 * common(len(mine), len(other)) / (len(mine) + len(other))
        assert accuracy.rouge(" ".join(mine), " ".join(other))["rougeL"] == pytest.approx(expected)


@pytest.mark.parametrize("function", [accuracy.agreement, accuracy.mean_rouge])
def test_nothing_to_compare_is_refused(function):
    for answers, references in (([], []), (["a"], [])):
        with pytest.raises(ValueError, match="at least one"):
            function(answers, references)


def test_example_in_the_docstring():
    assert doctest.testmod(accuracy).failed == 0
