"""Due times: when each request of a run should be sent, fixed from seeds before the run begins.

A schedule is an int64 array of nanoseconds after the start of the run, never decreasing. Nothing here sleeps or
reads a clock, so the same seeds give the same traffic against every server, every generation and every compiler.

`loadgen_poisson` and `loadgen_server` give the arrivals of MLPerf LoadGen's Server scenario bit for bit. The formulas
were read from LoadGen 6.0.17 (`GenerateQueries` in loadgen.cc) and libstdc++ (`random.tcc`), and are tested against
the real thing. Closed-loop scenarios (SingleStream, MultiStream) have no due times: a query is due when the one
before it completed, so its due time is its send time and only the sample order is known beforehand.

>>> loadgen_poisson(1000.0, 3, seed=1).tolist()
[0, 5872724, 8569201]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loadgen.core.record import Int64

NS_PER_S = 1e9
SEED_MODULUS = 2**32  # std::mt19937 keeps only the low 32 bits of LoadGen's 64-bit seeds
_LAST_NS = 2.0**63
# numpy's vectorised log may differ from C's by a few units in the last place, and the product and quotient round too.
# A gap that lies this close to a whole nanosecond is worked out again with math.log, which is C's.
_DOUBT = 32 * 2.0**-53


def loadgen_poisson(target_qps: float, count: int, seed: int) -> Int64:
    """The first `count` arrivals of LoadGen's Server scenario: due times in ns, the first 0.

    Gaps are exponential with mean 1/target_qps seconds: two 32-bit words a, b of mt19937(seed) give
    u = (a + b * 2^32) / 2^64, and the gap is -ln(1 - u) / target_qps seconds, cut (not rounded) to whole ns.
    LoadGen never rescales, so the rate seen in a short run differs from `target_qps` (8 % at 100 queries is usual).

    Raises ValueError for a rate that is not finite and positive, a negative count or seed, or a schedule that does
    not fit in 2^63 ns.
    """
    _check_rate(target_qps)
    _check_count(count, "count")
    return _arrivals(_mt19937(seed), target_qps, count, start=0)[:count]


def loadgen_server(
    target_qps: float,
    min_duration_ns: int,
    min_queries: int,
    seed: int,
    *,
    dataset: int | None = None,
    max_queries: int = 0,
) -> Int64:
    """The whole Server schedule that LoadGen would make for these settings: due times in ns.

    LoadGen adds queries until one is due at or after `min_duration_ns` (that one is kept) and there are at least
    `min_queries`. `dataset` is the number of loaded samples when equal issue is on (sample_concatenate_permutation):
    the count then is the next whole multiple of it. `max_queries` cuts what is issued, as LoadGen does; 0 is no cut.
    Raises ValueError as `loadgen_poisson` does.
    """
    _check_rate(target_qps)
    for value, name in (
        (min_duration_ns, "min_duration_ns"),
        (min_queries, "min_queries"),
        (max_queries, "max_queries"),
    ):
        _check_count(value, name)
    if dataset is not None and dataset < 1:
        raise ValueError(f"dataset must hold at least 1 sample, got {dataset}")
    rng = _mt19937(seed)
    expected = target_qps * min_duration_ns / NS_PER_S
    block = max(min_queries, math.ceil(expected + 6 * math.sqrt(expected)), 1) + (dataset or 0)
    due = _arrivals(rng, target_qps, block, start=0)
    count = loadgen_count(due, min_duration_ns, min_queries, dataset)
    while count is None or count > len(due) - 1:  # the last element is where the next block starts
        more = _arrivals(rng, target_qps, block, start=int(due[-1]))
        due = np.concatenate((due[:-1], more))
        count = loadgen_count(due, min_duration_ns, min_queries, dataset)
    return due[: min(count, max_queries) if max_queries else count]


def loadgen_count(due_ns: Int64, min_duration_ns: int, min_queries: int, dataset: int | None = None) -> int | None:
    """How many of the arrivals `due_ns` LoadGen keeps; None when the list ends before the duration is met.

    The answer may exceed len(due_ns): it is then set by `min_queries` or by rounding up to whole data sets.
    """
    count = min_queries
    if min_duration_ns > 0:
        past = int(np.searchsorted(due_ns, min_duration_ns, "left"))
        if past == len(due_ns):
            return None
        count = max(count, past + 1)
    return count if dataset is None else -(-count // dataset) * dataset


def constant(target_qps: float, count: int) -> Int64:
    """`count` due times in ns at an even rate: k / target_qps seconds, each rounded by itself so that none drift."""
    _check_rate(target_qps)
    _check_count(count, "count")
    return _whole_ns(np.rint(np.arange(count) * NS_PER_S / target_qps))


def gamma(target_qps: float, count: int, shape: float, seed: int) -> Int64:
    """`count` due times in ns with gamma-distributed gaps of mean 1/target_qps s, the first 0.

    `shape` is what vLLM's benchmark calls burstiness: the gaps' coefficient of variation is 1 / sqrt(shape), so 1 is
    a Poisson process, below 1 comes in bursts, above 1 is more even. The stream is numpy's frozen legacy one, hence
    the same in every numpy; it is not LoadGen's, not even at shape 1. Raises ValueError for a shape that is not
    finite and positive, and as `loadgen_poisson` does.
    """
    _check_rate(target_qps)
    _check_count(count, "count")
    if not (math.isfinite(shape) and shape > 0):
        raise ValueError(f"shape must be a finite number above 0, got {shape}")
    gaps_s = _mt19937(seed).gamma(shape, 1.0 / (shape * target_qps), size=max(count - 1, 0))
    due_s = np.concatenate((np.zeros(min(count, 1)), np.cumsum(gaps_s)))
    return _whole_ns(np.rint(due_s * NS_PER_S))


def trace(due_s: Sequence[float]) -> Int64:
    """Recorded arrivals, in seconds from the start of the run, as due times in ns.

    Raises ValueError, naming the first bad entry, unless every time is finite, at least 0 and not before its
    predecessor.
    """
    seconds = np.asarray(due_s, dtype=np.float64)
    if seconds.ndim != 1:
        raise ValueError(f"a trace is one list of times, got {seconds.ndim} dimensions")
    bad = ~np.isfinite(seconds) | (seconds < 0)
    bad[1:] |= seconds[1:] < seconds[:-1]
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(f"trace entry {at} is {seconds[at]}: times must be finite, at least 0 and never decrease")
    with np.errstate(over="ignore"):
        return _whole_ns(np.rint(seconds * NS_PER_S))


def offline(count: int) -> Int64:
    """Every sample due at once, at 0 ns: LoadGen sends them as one query."""
    _check_count(count, "count")
    return np.zeros(count, dtype=np.int64)


def stripe(due_ns: Int64, worker: int, workers: int) -> tuple[Int64, Int64]:
    """(seq, due_ns) of the slots that `worker` of `workers` sends: every arrival k with k mod workers = worker.

    Each worker computes the whole schedule and keeps its stripe, so no arrival time travels between processes.
    """
    if not 0 <= worker < workers:
        raise ValueError(f"worker must be at least 0 and below workers, got worker {worker} of {workers}")
    seq = np.arange(worker, len(due_ns), workers, dtype=np.int64)
    return seq, due_ns[seq]


def _mt19937(seed: int) -> np.random.RandomState:
    """C++'s std::mt19937(seed). numpy's legacy seeding is the same recurrence; its newer seeding is not."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return np.random.RandomState(seed % SEED_MODULUS)


def _arrivals(rng: np.random.RandomState, qps: float, count: int, start: int) -> Int64:
    """`count` + 1 due times in ns: `start`, then `start` plus the running sum of `count` gaps drawn from `rng`."""
    gaps = _gaps_ns(rng.randint(0, SEED_MODULUS, size=2 * count, dtype=np.uint32), qps)
    if start + float(gaps.sum(dtype=np.float64)) >= _LAST_NS:
        raise ValueError(f"{count} arrivals at {qps} per second do not fit in 2^63 ns")
    due = np.empty(count + 1, dtype=np.int64)
    due[0] = start
    np.cumsum(gaps, out=due[1:])
    due[1:] += start
    return due


def _gaps_ns(words: npt.NDArray[np.uint32], qps: float) -> Int64:
    """std::exponential_distribution, then duration_cast<nanoseconds>, of two 32-bit words per gap."""
    u = (words[0::2] + words[1::2] * 2.0**32) / 2.0**64
    # The sum has 64 bits and a double 53, so it can round up to 1; libstdc++ steps back to the last double below.
    survival = 1.0 - np.minimum(u, math.nextafter(1.0, 0.0))
    with np.errstate(over="ignore"):
        gaps = -np.log(survival) / qps * NS_PER_S
    if not np.all(gaps < _LAST_NS):
        raise ValueError(f"at {qps} per second a gap does not fit in 2^63 ns")
    whole: Int64 = gaps.astype(np.int64)
    unsure = np.flatnonzero(np.floor(gaps * (1 - _DOUBT)) != np.floor(gaps * (1 + _DOUBT)))
    for at in unsure.tolist():
        whole[at] = int(-math.log(float(survival[at])) / qps * NS_PER_S)
    return whole


def _whole_ns(ns: npt.NDArray[np.float64]) -> Int64:
    if len(ns) and not ns[-1] < _LAST_NS:
        raise ValueError("the schedule does not fit in 2^63 ns")
    return ns.astype(np.int64)


def _check_rate(target_qps: float) -> None:
    if not (math.isfinite(target_qps) and target_qps > 0):
        raise ValueError(f"target_qps must be a finite number above 0, got {target_qps}")


def _check_count(value: int, name: str) -> None:
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
