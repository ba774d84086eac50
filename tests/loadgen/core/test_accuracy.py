"""Agreement with reference answers: divergence by hand."""

import doctest

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
    found = accuracy.agreement([([1, 2, 3, 4], [1, 9, 3, 4]), ([7, 8], [7, 8])])
    assert found["token_agreement"] == pytest.approx((1 + 2) / 6)
    assert (found["exact_match"], found["equal"]) == (0.5, 1)
    assert found["divergence"] == {"samples": 1, "earliest": 1, "p10": 1, "p50": 1}


def test_an_answer_that_goes_on_too_long_does_not_agree():
    assert accuracy.agreement([([1, 2, 3, 4], [1, 2])])["token_agreement"] == 0.5
    assert accuracy.agreement([([1, 2], [1, 2])])["divergence"]["p50"] is None


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        accuracy.agreement(iter([]))


def test_pairs_are_read_once_and_not_kept():
    def pairs():
        for k in range(1000):
            yield [1, 2, k], [1, 2, 7]

    found = accuracy.agreement(pairs())
    assert (found["samples"], found["equal"], found["divergence"]["p50"]) == (1000, 1, 2)


def test_example_in_the_docstring():
    assert doctest.testmod(accuracy).failed == 0
