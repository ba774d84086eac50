"""One scenario over several servers: which slot goes where, and what each of them did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loadgen.core.percentiles import describe
from loadgen.core.record import Outcome, Rows


def pattern(shares: Sequence[int]) -> list[int]:
    """Servers in turn, each as often as its share: slot k goes to server `pattern[k % len(pattern)]`.

    Smooth weighted round robin (as nginx does it): the turns of a server are spread as evenly as they can be, and which
    server a slot goes to depends on nothing but its number.

    >>> pattern([2, 1, 1])
    [0, 1, 2, 0]
    """
    credit, turns = [0] * len(shares), []
    for _ in range(sum(shares)):
        credit = [c + share for c, share in zip(credit, shares, strict=True)]
        chosen = max(range(len(shares)), key=lambda i: credit[i])
        credit[chosen] -= sum(shares)
        turns.append(chosen)
    return turns


def by_server(rows: Rows, servers: int) -> list[dict[str, Any]]:
    """For each server: requests, how many failed, and percentiles of TTFT and E2E in ns (failed ones are slowest)."""
    out = []
    for server in range(servers):
        mine = rows.server == server
        ok = mine & rows.ok
        failed = int((mine & ~rows.ok).sum())
        out.append({
            "requests": int(mine.sum()), "failed": failed, "tokens_out": int(rows.tokens_out[ok].sum()),
            "ttft_ns": describe((rows.first_ns - rows.due_ns)[ok], failed),
            "e2e_ns": describe((rows.done_ns - rows.due_ns)[ok], failed),
        })  # fmt: skip
    return out


def only_of(rows: Rows, outcome: Outcome, servers: int) -> list[int]:
    """The servers that all rows with this outcome went to, where the others had none; else nothing."""
    those = sorted({int(s) for s in np.unique(rows.server[rows.ended(outcome)])})
    return those if len(those) < servers else []
