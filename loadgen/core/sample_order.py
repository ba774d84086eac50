"""Which sample each query asks for, in LoadGen's order: a pure function of its seeds.

Two streams of std::mt19937 decide. `qsl_seed` shuffles the loaded samples (`loaded_set`). `sample_seed` then picks
among them. LoadGen pays for two shuffles from that second stream before it draws the first sample, whether it uses
them or not: one over the loaded set and one over every pass that equal issue would make. That is why functions here
want `min_queries` (the setting, not the number issued) even when they draw with replacement.

Read from LoadGen 6.0.17 (`GenerateLoadableSets`, `SampleDistribution*`, `GenerateQueries` in loadgen.cc) and
libstdc++ 11 and later (`std::shuffle`, `std::uniform_int_distribution`); an older or another C++ library orders
samples differently. Results are int64 arrays of indices into the data set.

>>> equal_issue(loaded_set(5, 5, qsl_seed=1), count=10, sample_seed=2, min_queries=10).tolist()
[2, 1, 0, 4, 3, 0, 1, 2, 3, 4]
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from loadgen.core.record import Int64

_WORD = 2**32
_PAIRS_BELOW = 2**16  # std::shuffle draws two swaps from one word while n * n < 2^32


class _Stream:
    """std::mt19937(seed) as 32-bit words, one at a time or many; drawn in blocks, since one call a word is slow."""

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self._rng = np.random.RandomState(seed % _WORD)  # legacy seeding is std::mt19937's
        self._block: list[int] = []
        self._at = 0

    def word(self) -> int:
        if self._at == len(self._block):
            self._block, self._at = self._draw(4096).tolist(), 0
        self._at += 1
        return self._block[self._at - 1]

    def words(self, count: int) -> Int64:
        """`count` words, beginning with what `word` has drawn and not handed out."""
        waiting = self._block[self._at : self._at + count]
        self._at += len(waiting)
        fresh = self._draw(count - len(waiting)).astype(np.int64)
        return np.concatenate((np.asarray(waiting, dtype=np.int64), fresh))

    def _draw(self, count: int) -> npt.NDArray[np.uint32]:
        return self._rng.randint(0, _WORD, size=count, dtype=np.uint32)

    def below(self, bound: int) -> int:
        """std::uniform_int_distribution(0, bound - 1): Lemire's nearly divisionless method, one word as a rule."""
        product = self.word() * bound
        if product % _WORD < bound:
            rejected = (_WORD - bound) % bound
            while product % _WORD < rejected:
                product = self.word() * bound
        return product // _WORD

    def many_below(self, bound: int, count: int) -> Int64:
        """`count` values of `below(bound)`. The bound is fixed, so a rejected word just drops out of the row."""
        rejected = (_WORD - bound) % bound
        parts, have = [np.empty(0, dtype=np.int64)], 0
        while have < count:
            products = self.words(count - have).astype(np.uint64) * np.uint64(bound)
            kept = products[(products & np.uint64(_WORD - 1)) >= rejected] >> np.uint64(32)
            parts.append(kept.astype(np.int64))
            have += len(kept)
        return np.concatenate(parts)

    def shuffle(self, items: list[int]) -> None:
        """std::shuffle in place, as libstdc++ does it: below 65,536 items one draw decides two swaps."""
        size = len(items)
        if size >= _PAIRS_BELOW:
            for at in range(1, size):
                to = self.below(at + 1)
                items[at], items[to] = items[to], items[at]
            return
        if size and size % 2 == 0:
            to = self.below(2)
            items[1], items[to] = items[to], items[1]
        for at in range(1 + (size + 1) % 2, size, 2):
            first, second = divmod(self.below((at + 1) * (at + 2)), at + 2)
            items[at], items[first] = items[first], items[at]
            items[at + 1], items[second] = items[second], items[at + 1]


def loaded_set(total: int, performance: int, qsl_seed: int) -> Int64:
    """The samples LoadGen keeps loaded in performance mode, in its order; shape (min(total, performance),).

    LoadGen 6.0 shuffles the first `performance` indices and never touches the others, so with
    performance < total this is always a permutation of 0 ... performance - 1.
    """
    if total < 1 or performance < 1:
        raise ValueError(f"total and performance must be at least 1, got {total} and {performance}")
    items = list(range(min(total, performance)))
    _Stream(qsl_seed).shuffle(items)
    return np.asarray(items, dtype=np.int64)


def with_replacement(loaded: Int64, count: int, sample_seed: int, min_queries: int) -> Int64:
    """Samples of `count` queries of Server or SingleStream: each uniform over `loaded`, repeats allowed."""
    _check(loaded, count, min_queries)
    stream, _ = _after_shuffles(len(loaded), len(loaded), sample_seed, min_queries)
    samples: Int64 = loaded[stream.many_below(len(loaded), count)]
    return samples


def equal_issue(loaded: Int64, count: int, sample_seed: int, min_queries: int) -> Int64:
    """Samples of `count` queries of Server or SingleStream with equal issue (sample_concatenate_permutation).

    Whole passes over `loaded`, each freshly shuffled from the one before. LoadGen makes ceil(min_queries / n) passes
    and, when the duration asks for more, begins again with the first: later passes are not fresh.
    Raises ValueError for min_queries = 0, with which LoadGen itself divides by zero.
    """
    _check(loaded, count, min_queries)
    if min_queries == 0:
        raise ValueError("equal issue needs min_queries of at least 1 (LoadGen crashes at 0)")
    _, passes = _after_shuffles(len(loaded), len(loaded), sample_seed, min_queries)
    samples: Int64 = loaded[passes[np.arange(count, dtype=np.int64) % len(passes)]]
    return samples


def multi_stream(loaded: Int64, queries: int, sample_seed: int, min_queries: int, samples_per_query: int = 8) -> Int64:
    """Samples of MultiStream, shape (queries, samples_per_query): a uniform start, then its neighbours in `loaded`.

    The row wraps around at the end of `loaded`. Equal issue changes only how many queries there are, not these.
    """
    _check(loaded, queries, min_queries)
    if samples_per_query < 1:
        raise ValueError(f"samples_per_query must be at least 1, got {samples_per_query}")
    size = len(loaded)
    # LoadGen lengthens the loaded set so that rows can run over its end, and equal issue shuffles the longer one.
    stream, _ = _after_shuffles(size, size + samples_per_query - 1, sample_seed, min_queries, stride=samples_per_query)
    starts = stream.many_below(size, queries)
    samples: Int64 = loaded[(starts[:, None] + np.arange(samples_per_query)) % size]
    return samples


def offline(loaded: Int64, count: int) -> Int64:
    """Samples of the one Offline query: `loaded` over and over, in its order."""
    _check(loaded, count, 1)
    samples: Int64 = loaded[np.arange(count, dtype=np.int64) % len(loaded)]
    return samples


def offline_equal_issue(loaded: Int64, count: int, sample_seed: int) -> Int64:
    """Samples of Offline with equal issue: `count` rounded up to whole passes, each shuffled from `loaded` afresh."""
    _check(loaded, count, 1)
    stream, _ = _after_shuffles(len(loaded), len(loaded), sample_seed, min_queries=1)
    parts = [np.empty(0, dtype=np.int64)]
    for _ in range(-(-count // len(loaded))):
        items = loaded.tolist()
        stream.shuffle(items)
        parts.append(np.asarray(items, dtype=np.int64))
    return np.concatenate(parts)


def single_stream_min_queries(min_queries: int, min_duration_ms: int, expected_latency_ns: int, dataset: int) -> int:
    """The min_queries that LoadGen puts in place of the setting for SingleStream with equal issue.

    Twice what the expected latency promises, if that is more, then up to the *next* multiple of `dataset`, which
    adds a whole pass when it already is one.
    """
    for value, name, least in (
        (min_queries, "min_queries", 0),
        (min_duration_ms, "min_duration_ms", 0),
        (expected_latency_ns, "expected_latency_ns", 1),
        (dataset, "dataset", 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    expected = int(2.0 * (min_duration_ms / 1000) * (1e9 / expected_latency_ns))
    wanted = max(min_queries, expected)
    return wanted + dataset - wanted % dataset


def _after_shuffles(size: int, pass_size: int, seed: int, min_queries: int, stride: int = 1) -> tuple[_Stream, Int64]:
    """The sample stream where LoadGen begins to draw from it, and the passes that equal issue would use."""
    stream = _Stream(seed)
    stream.shuffle(list(range(0, size, stride)))
    order = list(range(pass_size))
    passes: list[int] = []
    for _ in range(-(-min_queries // pass_size)):
        stream.shuffle(order)
        passes += order
    return stream, np.asarray(passes, dtype=np.int64)


def _check(loaded: Int64, count: int, min_queries: int) -> None:
    if len(loaded) == 0:
        raise ValueError("the loaded set is empty")
    if count < 0 or min_queries < 0:
        raise ValueError(f"count and min_queries must be at least 0, got {count} and {min_queries}")
