"""Sample order without LoadGen at hand: golden values that LoadGen itself confirmed, and properties."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.core import sample_order

QSL, SAMPLE, _ = 2085463073848966840, 2747215439041700203, 16159082839903944936  # MLPerf v6.1
SEEDS = st.integers(min_value=0, max_value=2**64 - 1)
SIZES = st.integers(1, 60)


def test_golden() -> None:
    loaded = sample_order.loaded_set(10, 10, QSL)
    assert loaded.tolist() == [1, 5, 7, 6, 0, 8, 3, 2, 9, 4]
    drawn = sample_order.with_replacement(loaded, 12, SAMPLE, min_queries=100)
    assert drawn.tolist() == [8, 9, 8, 9, 6, 4, 5, 1, 3, 4, 7, 0]
    passes = sample_order.equal_issue(loaded, 20, SAMPLE, min_queries=15)
    assert passes.tolist() == [7, 2, 1, 0, 5, 6, 3, 4, 8, 9, 7, 8, 1, 2, 4, 0, 5, 9, 3, 6]
    rows = sample_order.multi_stream(loaded, 3, SAMPLE, min_queries=662, samples_per_query=4)
    assert rows.tolist() == [[0, 8, 3, 2], [0, 8, 3, 2], [6, 0, 8, 3]]
    offline = sample_order.offline_equal_issue(loaded, 11, SAMPLE)
    assert offline.tolist() == [1, 9, 7, 5, 2, 6, 0, 4, 3, 8, 6, 5, 7, 2, 9, 1, 0, 3, 4, 8]
    assert sample_order.offline(loaded, 12).tolist() == [1, 5, 7, 6, 0, 8, 3, 2, 9, 4, 1, 5]


@pytest.mark.parametrize(
    ("size", "head", "tail"),
    [
        (24_576, [8851, 6860, 15735, 16607, 4542, 8054], [21268, 1032, 7243]),
        (70_000, [3434, 25598, 53455, 6674, 518, 64165], [101, 41591, 1929]),
    ],
)
def test_large_shuffles_golden(size: int, head: list[int], tail: list[int]) -> None:
    """Below 65,536 samples std::shuffle makes two swaps from a draw, above it one."""
    loaded = sample_order.loaded_set(size, size, QSL)
    assert loaded[:6].tolist() == head and loaded[-3:].tolist() == tail
    assert (np.sort(loaded) == np.arange(size)).all()


@given(SIZES, SIZES, SEEDS)
def test_the_loaded_set_is_a_permutation_of_the_first_samples(total: int, performance: int, seed: int) -> None:
    loaded = sample_order.loaded_set(total, performance, seed)
    assert sorted(loaded.tolist()) == list(range(min(total, performance)))


@given(SIZES, st.integers(0, 300), SEEDS, st.integers(1, 200))
@settings(deadline=None)
def test_equal_issue_makes_whole_passes_and_begins_again(size: int, count: int, seed: int, need: int) -> None:
    loaded = sample_order.loaded_set(size, size, seed)
    order = sample_order.equal_issue(loaded, count, seed, need)
    assert len(order) == count
    for start in range(0, count - size + 1, size):
        assert sorted(order[start : start + size].tolist()) == list(range(size))
    period = -(-need // size) * size
    assert (order[period:] == order[: max(count - period, 0)]).all()


@given(SIZES, st.integers(0, 300), SEEDS, st.integers(0, 200), st.integers(0, 300))
@settings(deadline=None)
def test_fewer_queries_are_a_prefix(size: int, count: int, seed: int, need: int, fewer: int) -> None:
    loaded = sample_order.loaded_set(size, size, seed)
    order = sample_order.with_replacement(loaded, count, seed, need)
    assert set(order.tolist()) <= set(range(size))
    prefix = sample_order.with_replacement(loaded, min(count, fewer), seed, need)
    assert (prefix == order[:fewer]).all()


@given(SIZES, st.integers(0, 50), SEEDS, st.integers(1, 90))
@settings(deadline=None)
def test_multi_stream_rows_are_neighbours(size: int, queries: int, seed: int, width: int) -> None:
    loaded = sample_order.loaded_set(size, size, seed)
    rows = sample_order.multi_stream(loaded, queries, seed, 10, width)
    assert rows.shape == (queries, width)
    place = np.argsort(loaded)[rows]
    assert ((place - place[:, :1] - np.arange(width)) % size == 0).all()


def test_draws_are_uniform() -> None:
    loaded = np.arange(7, dtype=np.int64)
    seen = np.bincount(sample_order.with_replacement(loaded, 700_000, 11, 100))
    assert np.abs(seen - 100_000).max() < 5 * np.sqrt(100_000)


def test_a_rejected_word_is_drawn_again() -> None:
    """At bound 2^31 + 1 Lemire's method rejects almost every second word; both ways of drawing must agree."""
    bound = 2**31 + 1
    one, many = sample_order._Stream(5), sample_order._Stream(5)
    assert [one.below(bound) for _ in range(10_000)] == many.many_below(bound, 10_000).tolist()


@pytest.mark.parametrize(
    ("arguments", "effective"),
    [((1, 0, 100_000, 100), 100), ((100, 0, 100_000, 100), 200), ((1, 1000, 1_000_000, 300), 2100)],
)
def test_single_stream_equal_issue_pads_its_minimum(arguments: tuple[int, int, int, int], effective: int) -> None:
    assert sample_order.single_stream_min_queries(*arguments) == effective


def test_nonsense_is_refused() -> None:
    loaded = sample_order.loaded_set(3, 3, 1)
    none = np.empty(0, dtype=np.int64)
    for make in (
        lambda: sample_order.loaded_set(0, 1, 1),
        lambda: sample_order.loaded_set(1, 0, 1),
        lambda: sample_order.loaded_set(1, 1, -1),
        lambda: sample_order.with_replacement(none, 1, 1, 1),
        lambda: sample_order.with_replacement(loaded, -1, 1, 1),
        lambda: sample_order.with_replacement(loaded, 1, -1, 1),
        lambda: sample_order.with_replacement(loaded, 1, 1, -1),
        lambda: sample_order.equal_issue(loaded, 1, 1, 0),
        lambda: sample_order.multi_stream(loaded, 1, 1, 1, 0),
        lambda: sample_order.offline(none, 1),
        lambda: sample_order.single_stream_min_queries(1, 0, 0, 3),
        lambda: sample_order.single_stream_min_queries(1, 0, 1, 0),
    ):
        with pytest.raises(ValueError, match=r"at least|empty"):
            make()


def test_examples_in_the_docstring() -> None:
    assert doctest.testmod(sample_order).failed == 0
