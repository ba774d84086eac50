"""What LoadGen's verdict is computed from: its effective settings, and what happened to each sample.

One rule: requested settings become effective ones here and nowhere else (TestSettingsInternal of LoadGen 6.0.17).
"""

from __future__ import annotations

from dataclasses import dataclass

from loadgen.core.record import Int64
from loadgen.core.scenario import Kind

OFFLINE_SLACK = 1.1  # LoadGen makes this much more Offline work than the expected rate needs
UNLIMITED_NS = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """LoadGen's *effective* settings, as far as a verdict depends on them. Times in ns, `percentile` a fraction."""

    kind: Kind
    percentile: float = 0.99
    min_duration_ns: int = 0
    min_queries: int = 100
    min_samples: int = 100
    samples_per_query: int = 1
    target_qps: float = 1.0
    latency_limit_ns: int = 0
    ttft_limit_ns: int = UNLIMITED_NS
    tpot_limit_ns: int = UNLIMITED_NS
    tokens: bool = False


def effective(
    kind: Kind, *, percentile: float = 0.99, min_duration_ns: int = 0, min_queries: int = 100, target_qps: float = 1.0,
    samples_per_query: int = 8, latency_limit_ns: int = 0, ttft_limit_ns: int = UNLIMITED_NS,
    tpot_limit_ns: int = UNLIMITED_NS, tokens: bool = False, equal_issue: int = 0,
) -> Settings:  # fmt: skip
    """Requested settings → effective ones, as LoadGen's TestSettingsInternal does it.

    Offline makes one query of `max(min_queries, 1.1 * seconds * rate)` samples and forgets the percentile; only
    Server has a latency limit. `target_qps` of Single- and MultiStream is 1 / expected latency. `equal_issue` is the
    number of loaded samples when sample_concatenate_permutation is on, else 0: SingleStream then wants whole passes.
    """
    width = samples_per_query if kind is Kind.MULTI_STREAM else 1
    if kind is Kind.OFFLINE:
        width = max(min_queries, int(OFFLINE_SLACK * (min_duration_ns / 1e9) * target_qps))
        min_queries, percentile = 1, 0.99
    if kind is Kind.SINGLE_STREAM and equal_issue:
        min_queries = max(min_queries, int(2.0 * (min_duration_ns / 1e9) * target_qps))
        min_queries += equal_issue - min_queries % equal_issue
    limit = latency_limit_ns if kind is Kind.SERVER else 0
    return Settings(kind, percentile, min_duration_ns, min_queries, min_queries * width, width, target_qps, limit,
                    ttft_limit_ns, tpot_limit_ns, tokens)  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """What happened, one entry a sample in order of issue; all from LoadGen's clock, in ns.

    `due_ns` is from the start, `latency_ns` and `first_ns` from the due time. `issued_last_ns` is when the last query
    was issued, from the start. MultiStream's samples are whole queries in a row. `first_ns` and `tokens` are wanted in
    token mode (Offline needs no `first_ns`).
    """

    due_ns: Int64
    latency_ns: Int64
    issued_last_ns: int
    first_ns: Int64 | None = None
    tokens: Int64 | None = None

    def __len__(self) -> int:
        return len(self.latency_ns)
