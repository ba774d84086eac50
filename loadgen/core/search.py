"""Which rate to try next: a search for the highest load that a server carries inside its limits.

`propose(plan, history)` is a pure function: given everything that was seen it names the next probe, or the answer. A
search that was interrupted is therefore continued by reading its history back, and what is still to come can be
rehearsed (`core.rehearsal`). Rates may be requests/s, or whole numbers of requests in flight.

    rough     short probes grow the rate by 2 until one fails, then halve that gap to 10 %. They only place the
              boundary: a probe that can't tell is repeated 4 times as long, at last as a full-length run.
    refine    full-length runs around that place, in steps of 3, 6, 12 ... % until one passes and one fails, then
              halving. Short probes flatter or slander a server (a queue needs time to grow, a schedule has bursts), so
              from here on only full-length runs are evidence. Near the boundary they pass or fail by luck as well:
              they are repeated there until the boundary is known to the precision (`core.belief`).
    confirm   a full-length run at the low end of where the boundary may be. If it fails, that counts as well: the
              boundary is lower than was believed, and another run, lower, has to confirm.

An answer is always a rate whose every full-length run passed, below every rate whose full-length run failed.

>>> propose(Plan(start=4, least=0.01, most=1000, full_s=60, probe_s=10, budget_s=1200), [])
Probe(rate=4, seconds=10, full=False, purpose='rough')
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from loadgen.core.belief import quantiles

GROWTH = 2.0
ROUGH = 1.1  # how near short probes bring the ends of the bracket
LENGTHEN = 4.0
OVERHEAD_S = 8.0  # of a run, before one was seen: start, warm-up, drain, seal
RISK = 0.01  # that the boundary lies below the answer
SHORT = 0.05  # that it lies further above than the precision
MOST_RUNS = 60  # of full length, of a server too noisy for the precision
DIGITS = 4  # of a rate, so that it is the same number in a journal, on a command line and in a report


class Outcome(StrEnum):
    """What a probe says about its rate. CLIENT: nothing, the load generator failed. BROKEN: no rate can pass."""

    PASS = "pass"
    FAIL = "fail"
    UNSURE = "unsure"
    CLIENT = "client"
    BROKEN = "broken"


@dataclass(frozen=True)
class Plan:
    """What is searched, and with what means. `whole`: rates are whole numbers (concurrency).

    A full-length run takes `full_s`, or longer where `full_queries` at its rate do. `budget_s` bounds the sum of what
    probes really cost. The answer is meant to lie within `precision` below the true boundary.
    """

    start: float
    least: float
    most: float
    full_s: float
    probe_s: float
    budget_s: float
    precision: float = 0.03
    whole: bool = False
    full_queries: int = 0

    def full_length_s(self, rate: float) -> float:
        return self.full_s if self.whole else max(self.full_s, math.ceil(self.full_queries / rate))

    def round(self, rate: float) -> float:
        """Down to a rate that can be written: a whole number, or four digits."""
        rate = min(max(rate, self.least), self.most)
        if self.whole:
            return math.floor(rate + 1e-9)
        step = 10.0 ** (math.floor(math.log10(rate)) - DIGITS + 1)
        return float(f"{math.floor(rate / step * (1 + 1e-12)) * step:.{DIGITS}g}")


@dataclass(frozen=True)
class Probe:
    """A run to make. `seconds` is its length; `full` where it must count by the scenario's own minimums."""

    rate: float
    seconds: float
    full: bool
    purpose: str


@dataclass(frozen=True)
class Observation:
    """What a probe came to, and the wall-clock seconds it cost."""

    rate: float
    seconds: float
    full: bool
    outcome: Outcome
    cost_s: float
    reason: str = ""
    requests: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Observation:
        """The inverse of `to_json`; other keys are ignored. Raises KeyError or ValueError on another document."""
        names = ("rate", "seconds", "full", "cost_s", "reason", "requests")
        return cls(**{name: data[name] for name in names}, outcome=Outcome(data["outcome"]))

    def answers(self, probe: Probe) -> bool:
        return (self.rate, self.seconds, self.full) == (probe.rate, probe.seconds, probe.full)


@dataclass(frozen=True)
class Done:
    """The end. `rate` is None when no full-length run passed. `failed` is the lowest rate whose full-length run failed.

    `code`: "found" (within the precision), "maximum" (the highest rate allowed passes), "budget", "noisy" (full-length
    runs contradict each other), "client" (the load generator was the bottleneck), "broken" (no rate can pass), "none"
    (not even the lowest rate passes).
    """

    rate: float | None
    code: str
    reason: str
    failed: float | None = None


Steps = Generator[Probe, Observation, Done]
Asking = Generator[Probe, Observation, Outcome]
Walking = Generator[Probe, Observation, None]


class _StopError(Exception):
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


def propose(plan: Plan, history: Sequence[Observation]) -> Probe | Done:
    """The next probe after `history`, or the end. Observations that the plan has no use for are passed over."""
    return replay(plan, history)[1]


def replay(plan: Plan, history: Sequence[Observation]) -> tuple[Steps, Probe | Done]:
    """The steps of a search, `history` behind them, and what they ask for now; `advance` takes them on."""
    steps, unused = _Search(plan).steps(), list(history)
    asked = advance(steps)
    while isinstance(probe := asked, Probe) and (match := next((o for o in unused if o.answers(probe)), None)):
        unused.remove(match)
        asked = advance(steps, match)
    return steps, asked


def advance(steps: Steps, seen: Observation | None = None) -> Probe | Done:
    """What the steps ask for after `seen`, or at the beginning."""
    try:
        return next(steps) if seen is None else steps.send(seen)
    except StopIteration as end:
        done: Done = end.value
        return done


def excess_s(history: Sequence[Observation]) -> float:
    """Seconds that a run takes beyond its length: the most that one that passed took, or a guess."""
    return max(0.0, max((o.cost_s - o.seconds for o in history if o.outcome is Outcome.PASS), default=OVERHEAD_S))


class _Search:
    """The steps of one search, and what they have found so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seen: list[Observation] = []
        self.near: float | None = None  # where short probes could not tell
        self.length_s = plan.probe_s

    # What is known

    def _rates(self, outcome: Outcome, full: bool) -> list[float]:
        return [o.rate for o in self.seen if o.outcome is outcome and (o.full or not full)]

    def failed(self) -> float | None:
        """The lowest rate whose full-length run failed."""
        return min(self._rates(Outcome.FAIL, full=True), default=None)

    def passed(self, full: bool = True) -> float | None:
        """The highest rate that passed below all that failed; of full-length runs only, or of any."""
        failed = min(self._rates(Outcome.FAIL, full), default=math.inf)
        return max((r for r in self._rates(Outcome.PASS, full) if r < failed), default=None)

    # One probe

    def _cost_s(self, rate: float, seconds: float | None = None) -> float:
        return (seconds or self.plan.full_length_s(rate)) + excess_s(self.seen)

    def _ask(self, rate: float, seconds: float | None, purpose: str) -> Asking:
        """Asks for a probe of `seconds`, or of full length (None); again, once, when the client spoilt it."""
        full = seconds is None
        length = self.plan.full_length_s(rate) if seconds is None else seconds
        for _ in range(2):
            reserve = self._reserve_s(rate, full)
            if sum(o.cost_s for o in self.seen) + self._cost_s(rate, seconds) + reserve > self.plan.budget_s:
                raise _StopError("budget", "the budget ended before the boundary was narrowed down")
            seen = yield Probe(rate, length, full, purpose)
            self.seen.append(seen)
            if seen.outcome is Outcome.BROKEN:
                raise _StopError("broken", seen.reason)
            if seen.outcome is not Outcome.CLIENT:
                return seen.outcome
        raise _StopError("client", f"twice at {rate:g}: {seen.reason}")

    def _reserve_s(self, rate: float, full: bool) -> float:
        """What has to be left for one run that confirms, while no rate is confirmed and a lower one may be."""
        if not full:
            return self._cost_s(rate)
        hope = self.passed(full=False) if self.passed() is None else None
        if hope is None or hope >= rate:
            return 0.0
        longest = max(o.cost_s - o.seconds for o in self.seen)  # a run that fails drains its queue
        return self._cost_s(hope) + longest - excess_s(self.seen)

    # The parts of a search

    def steps(self) -> Steps:
        try:
            yield from self._rough()
            yield from self._refine()
            return (yield from self._confirm())
        except _StopError as stop:
            return (yield from self._salvage(stop))

    def _rough(self) -> Walking:
        """Short probes: by factors of 2 up or down from the start, then halving. Ends early where one can't tell."""
        rate = self.plan.round(self.plan.start)
        while self.near is None:
            yield from self._rough_probe(rate)
            low, high = self.passed(full=False), min(self._rates(Outcome.FAIL, full=False), default=None)
            if low is None and high is not None:
                if high <= self.plan.least:
                    raise _StopError("none", f"not even {high:g} passes: {self.seen[-1].reason}")
                rate = self.plan.round(high / GROWTH)
            elif low is not None and high is None:
                if low >= self.plan.most:
                    return
                rate = self.plan.round(low * GROWTH)
            elif low is not None and high is not None:
                rate = self._between(low, high)
                if high / low <= ROUGH or rate <= low:
                    return

    def _rough_probe(self, rate: float) -> Walking:
        while True:
            short = self.length_s <= self.plan.full_length_s(rate) / 2
            outcome = yield from self._ask(rate, self.length_s if short else None, "rough")
            if outcome is not Outcome.UNSURE:
                return
            self.length_s *= LENGTHEN
            if self.length_s > self.plan.full_length_s(rate) / 2:
                self.near = rate
                return

    def _refine(self) -> Walking:
        """Full-length runs, until one that passed and one that failed are no further apart than the precision."""
        step = self.plan.precision
        rate = self.near or self.passed(full=False) or self.plan.start
        while self.passed() is None:
            if (failed := self.failed()) is not None:
                if failed <= self.plan.least:
                    raise _StopError("none", f"not even {failed:g} passes: {self.seen[-1].reason}")
                rate, step = self._below(min(failed, rate), step), 2 * step
            yield from self._ask(rate, None, "refine")
        step = self.plan.precision
        while (low := self.passed()) is not None:
            high = self.failed()
            if low >= self.plan.most or (high is not None and self._close(low, high)):
                return
            if high is None:
                rough = min((r for r in self._rates(Outcome.FAIL, full=False) if r > low), default=self.plan.most)
                rate = min(self.plan.round(max(low * (1 + step), low + self.plan.whole)), self._between(low, rough))
                rate, step = (rate if rate > low else self.plan.round(low * (1 + step))), 2 * step
            else:
                rate = self._between(low, high)
            yield from self._ask(rate, None, "refine")

    def _confirm(self) -> Steps:
        """Runs at the middle of what the boundary may be, until it is known well enough; then one at the answer."""
        if (failed := self.failed()) is None:
            return Done(self.passed(), "maximum", "the highest rate that was allowed passes")
        while True:
            low, middle, high = self._boundary()
            answer = min(self.plan.round(low), self._under(failed))
            if (made := len(self._rates(Outcome.PASS, full=True) + self._rates(Outcome.FAIL, full=True))) >= MOST_RUNS:
                raise _StopError("noisy", f"{made} full-length runs contradict each other: make them longer")
            if high / answer <= 1 + self.plan.precision or self.plan.round(middle) <= answer:
                if (yield from self._ask(answer, None, "confirm")) is Outcome.PASS:
                    return Done(answer, "found", "confirmed by its own full-length run", failed)
                if answer <= self.plan.least:
                    raise _StopError("none", f"not even {answer:g} passes: {self.seen[-1].reason}")
            else:
                yield from self._ask(self.plan.round(middle), None, "refine")
            failed = self.failed() or failed

    def _boundary(self) -> tuple[float, ...]:
        """Low, middle and high estimate of the boundary, from the full-length runs."""
        runs = [o for o in self.seen if o.full and o.outcome in (Outcome.PASS, Outcome.FAIL)]
        requests = sum(o.requests for o in runs) / len(runs)
        trials = tuple((o.rate, o.outcome is Outcome.PASS) for o in runs)
        return quantiles(trials, requests, (RISK, 0.5, 1 - SHORT))

    def _salvage(self, stop: _StopError) -> Steps:
        """After a search that had to stop: the best rate confirmed so far, or one run to confirm a better one."""
        best, failed = self.passed(), self.failed()
        hope = self.passed(full=False) if best is None and stop.code in ("budget", "client") else None
        if best is not None and failed is not None and stop.code in ("budget", "noisy"):
            hope = min(self.plan.round(self._boundary()[0]), self._under(failed))
        if hope is not None and hope > (best or 0.0):
            spent = sum(o.cost_s for o in self.seen)
            if spent + self._cost_s(hope) <= self.plan.budget_s:
                seen = yield Probe(hope, self.plan.full_length_s(hope), True, "confirm")
                self.seen.append(seen)
        return Done(self.passed(), stop.code, stop.reason, self.failed())

    # Arithmetic of rates

    def _between(self, low: float, high: float) -> float:
        """The geometric middle; at least one above `low` for whole numbers that have room."""
        middle = math.sqrt(low * high)
        return self.plan.round(max(middle, low + 1) if self.plan.whole and high - low > 1 else middle)

    def _below(self, rate: float, step: float) -> float:
        lower = self.plan.round(rate / (1 + step))
        return self.plan.round(rate - 1) if self.plan.whole and lower >= rate else lower

    def _under(self, failed: float) -> float:
        """The highest rate below one that failed."""
        return self.plan.round(failed - 1 if self.plan.whole else failed * (1 - 10.0 ** (1 - DIGITS)))

    def _close(self, low: float, high: float) -> bool:
        between = self._between(low, high)
        return high / low <= 1 + self.plan.precision or between <= low or between >= high
