"""The points of a sweep, their order, and the lines of its throughput-latency table."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = ("qps", "tokens_per_s", "goodput_qps", "goodput_share")  # None where a family has no such figure
LATENCIES = ("ttft_ns", "tpot_ns", "e2e_ns")


@dataclass(frozen=True)
class Point:
    """One run of a sweep: a rate or a concurrency, and which repeat of it (from 1)."""

    value: float
    repeat: int


def order(values: Sequence[float], repeats: int, seed: int | None) -> list[Point]:
    """Every value `repeats` times. Each pass is shuffled from `seed`, so that a drift of the machine falls on all
    values alike and not on the highest; None keeps the order given.
    """
    shuffle = random.Random(seed)
    points = []
    for repeat in range(1, repeats + 1):
        turn = [Point(value, repeat) for value in values]
        if seed is not None:
            shuffle.shuffle(turn)
        points += turn
    return points


def digest(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a run's summary that a table shows; latencies in ms, None where a percentile failed."""
    out: dict[str, float | None] = {name: summary.get(name) for name in COLUMNS}
    for name in LATENCIES:
        for p in ("p50", "p99"):
            ns = summary.get(name, {}).get(p)
            out[f"{name.removesuffix('_ns')}_{p}_ms"] = None if ns is None else ns / 1e6
    return out


def lines(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per value, ascending: medians over its repeats, how many of them were VALID, and their runs.

    A median is None where half or more of the repeats have none: a percentile among failures is worse than any.
    """
    out = []
    for value in sorted({e["value"] for e in entries}):
        mine = [e for e in entries if e["value"] == value]
        figures = {name: _median([e["figures"][name] for e in mine]) for name in mine[0]["figures"]}
        codes = sorted({code for e in mine for code in e["codes"]})
        out.append({"value": value, "repeats": len(mine), "valid": sum(bool(e["valid"]) for e in mine), "codes": codes,
                    "runs": [e["run"] for e in mine], **figures})  # fmt: skip
    return out


def _median(values: Sequence[float | None]) -> float | None:
    ascending = sorted(math.inf if v is None else v for v in values)
    middle = len(ascending) // 2
    value = ascending[middle] if len(ascending) % 2 else (ascending[middle - 1] + ascending[middle]) / 2
    return value if math.isfinite(value) else None
