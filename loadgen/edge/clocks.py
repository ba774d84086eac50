"""What each worker's clock will show at T0, asked by messages there and back, as NTP does.

The clocks are CLOCK_MONOTONIC: a wall clock that is set in mid-run moves nothing. Of several questions the one with the
fastest way there and back counts. An offset is the worker's reading less the middle of that time, and is wrong by half
of it at most. On the conductor's own host the clock is the same one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gevent

ASKED, EVERY_S = 8, 0.02
ANSWERED_S = 2.0  # how long the first answer of a worker may take


def which() -> str:
    """Names this process's CLOCK_MONOTONIC: equal on one host unless a time namespace gives it an offset."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:
        return ""


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """A worker's "pong" to a conductor's "ping"."""
    return question | {"read_ns": time.monotonic_ns(), "clock": which()}


class Clocks:
    """`ask(question, worker)` sends a "ping"; its "pong" comes back through `heard`."""

    def __init__(self, ask: Callable[[dict[str, Any], int], None]) -> None:
        self._ask = ask
        self._own = which()
        self._known: dict[int, tuple[int, int]] = {}  # worker -> (round trip, offset) in ns

    def measure(self, workers: Iterable[int]) -> None:
        """Asks each worker a few times; returns when all have answered, or after ANSWERED_S."""
        workers, until = set(workers), time.monotonic() + ANSWERED_S
        for _ in range(ASKED):
            for worker in workers:
                self._ask({"worker": worker, "asked_ns": time.monotonic_ns()}, worker)
            if self._one_clock(workers):
                return
            gevent.sleep(EVERY_S)
        while workers - self._known.keys() and time.monotonic() < until:
            gevent.sleep(EVERY_S)

    def _one_clock(self, workers: set[int]) -> bool:
        """Are all known to run by the conductor's own clock? No answer can then be better."""
        return all(self._known.get(worker) == (0, 0) for worker in workers)

    def heard(self, pong: dict[str, Any]) -> None:
        now, asked = time.monotonic_ns(), pong["asked_ns"]
        trip, offset = now - asked, pong["read_ns"] - (asked + now) // 2
        if self._own and pong["clock"] == self._own:
            trip, offset = 0, 0
        self._known[pong["worker"]] = min((trip, offset), self._known.get(pong["worker"], (trip, offset)))

    def there(self, worker: int, ns: int) -> int | None:
        """What the worker's clock shows when this one shows `ns`; None for a worker that never answered."""
        known = self._known.get(worker)
        return None if known is None else ns + known[1]

    def error_ns(self, worker: int) -> int | None:
        """How far `there` may be off."""
        known = self._known.get(worker)
        return None if known is None else known[0] // 2

    @property
    def slowest_ns(self) -> int:
        """The longest of the fastest round trips."""
        return max((trip for trip, _ in self._known.values()), default=0)
