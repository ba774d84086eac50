"""Schedules without LoadGen at hand: golden values that LoadGen itself confirmed, and a plain reimplementation."""

from __future__ import annotations

import doctest
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.core import schedule

SEED_V61 = 16159082839903944936
RATES = st.floats(min_value=1e-3, max_value=1e8)
SEEDS = st.integers(min_value=0, max_value=2**64 - 1)
NONSENSE = [0.0, -1.0, math.nan, math.inf, -math.inf]


def mt19937(seed: int, count: int) -> list[int]:
    """The reference generator of Matsumoto and Nishimura, one word at a time."""
    state = [seed % 2**32]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) % 2**32)
    words = []
    for k in range(count):
        i = k % 624
        y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7FFFFFFF)
        state[i] = state[(i + 397) % 624] ^ (y >> 1) ^ (0x9908B0DF if y & 1 else 0)
        y = state[i]
        y ^= y >> 11
        y ^= y << 7 & 0x9D2C5680
        y ^= y << 15 & 0xEFC60000
        words.append(y ^ y >> 18)
    return words


def one_by_one(qps: float, count: int, seed: int) -> list[int]:
    words, due = mt19937(seed, 2 * count), [0]
    for a, b in zip(words[0::2], words[1::2], strict=True):
        u = min((a + b * 2.0**32) / 2.0**64, math.nextafter(1.0, 0.0))
        due.append(due[-1] + int(-math.log(1.0 - u) / qps * 1e9))
    return due[:count]


@given(RATES, st.integers(0, 700), SEEDS)
@settings(max_examples=40, deadline=None)
def test_poisson_is_the_plain_algorithm(qps: float, count: int, seed: int) -> None:
    due = schedule.loadgen_poisson(qps, count, seed)
    assert due.dtype == np.int64
    assert due.tolist() == one_by_one(qps, count, seed)


def test_poisson_golden() -> None:
    due = schedule.loadgen_poisson(100.0, 1_000_001, SEED_V61)
    assert due[:6].tolist() == [0, 18436540, 23015776, 35874399, 43004346, 46868412]
    assert [int(due[n]) for n in (100, 24_576, 1_000_000)] == [1090293182, 243869557211, 9999275889658]


def test_numpy_log_alone_would_be_a_nanosecond_off() -> None:
    """With AVX-512, numpy's log differs from C's at gap 353,175 of this stream, just below a whole nanosecond."""
    due = schedule.loadgen_poisson(0.01, 353_177, 7)
    assert due[353_176] - due[353_175] == 136089177609


def test_only_the_low_32_bits_of_a_seed_count() -> None:
    low = schedule.loadgen_poisson(5.0, 50, SEED_V61 % 2**32)
    assert (schedule.loadgen_poisson(5.0, 50, SEED_V61) == low).all()


@given(RATES, st.integers(0, 300), SEEDS, st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_a_shorter_schedule_is_a_prefix(qps: float, count: int, seed: int, fewer: int) -> None:
    due = schedule.loadgen_poisson(qps, count, seed)
    assert (schedule.loadgen_poisson(qps, min(count, fewer), seed) == due[:fewer]).all()


@given(RATES, st.integers(0, 400), st.floats(0, 300), SEEDS, st.none() | st.integers(1, 200), st.integers(0, 50))
@settings(max_examples=80, deadline=None)
def test_server_is_loadgens_loop(
    qps: float, min_queries: int, expected: float, seed: int, dataset: int | None, max_queries: int
) -> None:
    """The loop of GenerateQueries, over arrivals already known to be right."""
    duration = int(expected / qps * 1e9)
    due = schedule.loadgen_poisson(qps, 5000, seed)
    need, made, previous = min_queries if dataset is None else -(-min_queries // dataset) * dataset, 0, 0
    while previous < duration or made < need:
        previous, made = int(due[made]), made + 1
        if dataset and made >= need and previous < duration:
            need += dataset
    made = min(made, max_queries) if max_queries else made
    got = schedule.loadgen_server(qps, duration, min_queries, seed, dataset=dataset, max_queries=max_queries)
    assert got.tolist() == due[:made].tolist()


def test_server_golden_counts() -> None:
    args = 4.0, 600 * 10**9
    assert len(schedule.loadgen_server(*args, 100, SEED_V61)) == 2468
    assert len(schedule.loadgen_server(*args, 100, SEED_V61, dataset=1000)) == 3000
    assert len(schedule.loadgen_server(*args, 24_576, SEED_V61, dataset=24_576)) == 24_576
    assert len(schedule.loadgen_server(*args, 0, SEED_V61, max_queries=7)) == 7
    assert len(schedule.loadgen_server(4.0, 0, 0, SEED_V61)) == 0


def test_constant_does_not_drift() -> None:
    due = schedule.constant(3.0, 3_000_001)
    assert due[:4].tolist() == [0, 333333333, 666666667, 1000000000]
    assert due[-1] == 10**15
    assert schedule.constant(3.0, 0).tolist() == []


@pytest.mark.parametrize("shape", [0.25, 1.0, 16.0])
def test_gamma_has_the_asked_mean_and_burstiness(shape: float) -> None:
    due = schedule.gamma(50.0, 200_000, shape, seed=3)
    gaps = np.diff(due) / 1e9
    assert due[0] == 0 and (np.diff(due) >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50.0, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(shape), rel=0.03)
    assert (schedule.gamma(50.0, 200_000, shape, seed=3) == due).all()
    assert [len(schedule.gamma(50.0, n, shape, 3)) for n in (0, 1, 2)] == [0, 1, 2]


def test_trace() -> None:
    assert schedule.trace([0.5, 0.5, 1.25]).tolist() == [500_000_000, 500_000_000, 1_250_000_000]
    assert schedule.trace([]).tolist() == []


@pytest.mark.parametrize(
    ("times", "entry"),
    [([-0.1], 0), ([0, math.nan], 1), ([0, 1, math.inf], 2), ([0, 2, 1, 0], 2), ([0, 1e300], None)],
)
def test_a_bad_trace_names_its_first_bad_entry(times: list[float], entry: int | None) -> None:
    with pytest.raises(ValueError, match="2\\^63" if entry is None else f"entry {entry} is"):
        schedule.trace(times)


def test_trace_refuses_a_table() -> None:
    with pytest.raises(ValueError, match="one list"):
        schedule.trace([[0.0], [1.0]])  # type: ignore[list-item]


def test_offline() -> None:
    assert schedule.offline(3).tolist() == [0, 0, 0]


@given(st.lists(st.integers(0, 10**12), max_size=60), st.integers(1, 9))
def test_stripes_are_a_partition(due: list[int], workers: int) -> None:
    whole = np.array(sorted(due), dtype=np.int64)
    parts = [schedule.stripe(whole, worker, workers) for worker in range(workers)]
    for worker, (seq, mine) in enumerate(parts):
        assert (seq % workers == worker).all() and (whole[seq] == mine).all()
    assert sorted(np.concatenate([seq for seq, _ in parts]).tolist()) == list(range(len(due)))
    sizes = [len(seq) for seq, _ in parts]
    assert max(sizes) - min(sizes) <= 1 and all(a >= b for a, b in pairwise(sizes))


@pytest.mark.parametrize(("worker", "workers"), [(-1, 2), (2, 2), (0, 0)])
def test_stripe_refuses_a_worker_that_is_not_there(worker: int, workers: int) -> None:
    with pytest.raises(ValueError, match="worker"):
        schedule.stripe(schedule.offline(4), worker, workers)


@pytest.mark.parametrize("qps", NONSENSE)
def test_a_rate_must_be_finite_and_positive(qps: float) -> None:
    for make in (
        lambda: schedule.loadgen_poisson(qps, 1, 1),
        lambda: schedule.loadgen_server(qps, 1, 1, 1),
        lambda: schedule.constant(qps, 1),
        lambda: schedule.gamma(qps, 1, 1.0, 1),
    ):
        with pytest.raises(ValueError, match="target_qps must be a finite number above 0"):
            make()


@pytest.mark.parametrize("shape", NONSENSE)
def test_a_shape_must_be_finite_and_positive(shape: float) -> None:
    with pytest.raises(ValueError, match="shape"):
        schedule.gamma(1.0, 1, shape, 1)


def test_counts_and_seeds_must_not_be_negative() -> None:
    for make in (
        lambda: schedule.loadgen_poisson(1.0, -1, 1),
        lambda: schedule.loadgen_poisson(1.0, 1, -1),
        lambda: schedule.loadgen_server(1.0, -1, 1, 1),
        lambda: schedule.loadgen_server(1.0, 1, -1, 1),
        lambda: schedule.loadgen_server(1.0, 1, 1, 1, max_queries=-1),
        lambda: schedule.loadgen_server(1.0, 1, 1, 1, dataset=0),
        lambda: schedule.offline(-1),
    ):
        with pytest.raises(ValueError, match="at least"):
            make()


@pytest.mark.parametrize("qps", [1e-300, 1e-9])
def test_a_schedule_longer_than_an_int64_of_nanoseconds_is_refused(qps: float) -> None:
    with pytest.raises(ValueError, match="2\\^63"):
        schedule.loadgen_poisson(qps, 1000, 1)


def test_examples_in_the_docstring() -> None:
    assert doctest.testmod(schedule).failed == 0
