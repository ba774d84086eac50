"""How long a search will still take: it is rehearsed against made-up servers that agree with everything seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loadgen.core.search import GROWTH, ROUGH, Observation, Outcome, Plan, Probe, advance, excess_s, replay

MOST_RUNS = 16  # of full length in one rehearsal: a server that needs more can't be foretold anyway


def remaining(plan: Plan, history: Sequence[Observation], servers: int = 6) -> tuple[float, float]:
    """How many more seconds the search will take, from and to: the quickest and the slowest of the made-up servers.

    Their boundaries are spread evenly (in logarithm) over the rates that `history` leaves possible, and a bit beyond;
    their runs take as much longer than asked as those seen did. A rehearsal ends after 16 full-length runs.
    """
    low, high = _possible(plan, history)
    excess = excess_s(history)
    per_s = history[-1].requests / history[-1].seconds / history[-1].rate if history else 1.0

    def requests(probe: Probe) -> int:
        return round(per_s * probe.rate * probe.seconds)

    totals = []
    for k in range(servers):
        boundary = low * (high / low) ** ((k + 0.5) / servers)
        (steps, probe), total = replay(plan, history), 0.0
        runs = 0
        while isinstance(probe, Probe) and runs < MOST_RUNS:
            runs += probe.full
            near = not probe.full and abs(math.log(probe.rate / boundary)) < plan.precision
            outcome = Outcome.UNSURE if near else Outcome.PASS if probe.rate <= boundary else Outcome.FAIL
            cost = probe.seconds * max(1.0, min(GROWTH, probe.rate / boundary)) + excess  # an overload has to drain
            seen = Observation(probe.rate, probe.seconds, probe.full, outcome, cost, "", requests(probe))
            total, probe = total + cost, advance(steps, seen)
        totals.append(total)
    totals.sort()
    return totals[0], totals[-1]


def _possible(plan: Plan, history: Sequence[Observation]) -> tuple[float, float]:
    passed = [o.rate for o in history if o.outcome is Outcome.PASS]
    failed = [o.rate for o in history if o.outcome is Outcome.FAIL]
    near = [o.rate for o in history if o.outcome is Outcome.UNSURE]
    low = max(passed, default=min(failed, default=plan.start) / GROWTH**4)
    high = min(failed, default=max(passed, default=plan.start) * GROWTH**4)
    if near:
        low, high = max(low, near[-1] / ROUGH), min(high, near[-1] * ROUGH)
    low, high = max(min(low, high) * 0.97, plan.least), min(max(low, high) * 1.03, plan.most)
    return min(low, high), max(low, high)
