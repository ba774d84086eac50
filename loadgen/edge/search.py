"""Searches on a real server: every probe is a sealed run, and a journal lets an interrupted search go on.

The journal (`edge.journal`) has the key of all that decides what a probe means: scenario with its overrides, model,
server, precision, probe time. What to try next follows from it alone (`core.search`), so a resumed search makes the
probes that an uninterrupted one would have made. The budget isn't in the key: more of it continues the same search.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from loadgen.core.evidence import assess
from loadgen.core.metrics import join
from loadgen.core.rehearsal import remaining
from loadgen.core.scenario import Kind, Scenario
from loadgen.core.search import Done, Observation, Outcome, Plan, Probe, propose
from loadgen.edge import launch as launching
from loadgen.edge.command_options import arguments
from loadgen.edge.errors import UserError
from loadgen.edge.journal import Journal
from loadgen.edge.store import Run

Launch = Callable[[list[str], Console], launching.Launched]
START = 0.8  # of the throughput with 16 in flight
STOPPED = "stopped by the user"  # how the load process words a Ctrl-C in audit.ended
CALIBRATION = {"scenario": "concurrency", "concurrency": 16, "preset": "smoke", "warmup": 16, "run_time": "4s",
               "target_qps": None, "min_queries": None, "sample_order": None}  # fmt: skip


class Interrupted(Exception):  # noqa: N818 - not an error: the user wanted it
    """Ctrl-C: the probe was cut and does not count; the journal has everything before it."""


@dataclass
class Prober:
    """Makes runs: `options` are those of `tritonmark run`, `extra` goes to Locust as it is."""

    options: dict[str, Any]
    extra: tuple[str, ...]
    console: Console
    launch: Launch = launching.launch

    def run(self, changes: dict[str, Any], limit_s: float | None = None) -> tuple[Run, float, bool]:
        """A sealed run with `changes` to the options, its cost in seconds, and whether `limit_s` cut it.

        Raises Interrupted where the user cut it, and whatever `launch` raises.
        """
        options = self.options | changes
        words = arguments(options)
        started = time.monotonic()
        with cut_after(limit_s) as late:
            run = self.launch([*words, *self.extra], self.console).run
        if not late.is_set() and str(run.document["audit"]["ended"] or "").startswith(STOPPED):
            raise Interrupted
        return run, time.monotonic() - started, late.is_set()


@contextmanager
def cut_after(limit_s: float | None) -> Iterator[threading.Event]:
    """Ends the run inside as Ctrl-C would, `limit_s` from now; the event says that it did."""
    late = threading.Event()

    def end() -> None:
        late.set()
        os.kill(os.getpid(), signal.SIGTERM)  # `launch` hands it to the load process, which seals

    if limit_s is None or threading.current_thread() is not threading.main_thread():
        yield late
        return
    timer = threading.Timer(limit_s, end)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # should it come before `launch` listens or after
    try:
        timer.start()  # a Ctrl-C in here must cancel it too: nothing ends while a timer runs
        yield late
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


@dataclass
class Search:
    """One search. `scenario` is resolved at any rate; `goodput` is a share or None; `plan.start` 0: measure it."""

    prober: Prober
    scenario: Scenario
    plan: Plan
    journal: Journal
    goodput: float | None = None

    @property
    def unit(self) -> str:
        return "in flight" if self.plan.whole else "requests/s"

    def history(self) -> list[Observation]:
        return [Observation.from_json(entry) for entry in self.journal.entries]

    def run(self) -> Done:
        """Probes until the core is done. Raises Interrupted, UserError (server gone, bad options)."""
        if not self.plan.start:
            self._calibrate()
        while isinstance(step := propose(self.plan, self.history()), Probe):
            self._announce(step)
            entry = self._probe(step)
            self.journal.append(entry)
            self.say(f"  {step.rate:g} {self.unit}: {entry['outcome'].upper()} ({entry['reason']})")
        self.journal.notes["answer"] = asdict(step)
        self.journal.save()
        return step

    def spent_s(self) -> float:
        return float(sum(e["cost_s"] for e in self.journal.entries))

    def say(self, text: str) -> None:
        self.prober.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _calibrate(self) -> None:
        """Where to start when nobody says: the throughput with 16 requests in flight."""
        found = self.journal.notes.get("calibration")
        if not found:
            self.say("calibrate: 16 requests in flight for 4 s")
            run, cost_s, _ = self.prober.run(CALIBRATION, self.plan.budget_s)
            if not run.summary["qps"]:
                raise UserError(f"the server answered no request in calibration: {run.document['verdict']['headline']}")
            found = {"qps": run.summary["qps"], "cost_s": cost_s, "run": str(run.folder)}
            self.journal.notes["calibration"] = found
            self.journal.save()
        budget = self.plan.budget_s - found["cost_s"]
        start = min(max(found["qps"] * START, self.plan.least), self.plan.most)
        self.plan = Plan(**asdict(self.plan) | {"start": start, "budget_s": budget})

    def _announce(self, probe: Probe) -> None:
        low, high = remaining(self.plan, self.history())
        left = min(high, max(0.0, self.plan.budget_s - self.spent_s()))
        length = "full length" if probe.full else f"{probe.seconds:g} s"
        self.say(f"▸ {probe.purpose} {probe.rate:g} {self.unit}, {length}; {clock(self.spent_s())} spent, "
                 f"{clock(min(low, left))} to {clock(left)} to go")  # fmt: skip

    def _probe(self, probe: Probe) -> dict[str, Any]:
        """One run, judged: the entry for the journal. A run that the budget cut says nothing about the server."""
        changes: dict[str, Any] = {"concurrency" if self.plan.whole else "target_qps": f"{probe.rate:.10g}"}
        if not probe.full:
            changes |= {"run_time": f"{probe.seconds:.0f}s", "min_queries": 1, "sample_order": None}
            if self.scenario.kind is Kind.SERVER:
                changes["sample_order"] = "uniform"  # equal issue would send whole passes over the library
        elif self.plan.full_queries > self.scenario.minimums.queries:
            changes["min_queries"] = self.plan.full_queries
        run, cost_s, cut = self.prober.run(changes, max(1.0, self.plan.budget_s - self.spent_s()))
        codes = [reason["code"] for reason in run.document["verdict"]["reasons"]]
        rows = join(run.rows())
        outcome, why = assess(run.summary, rows, codes, run.scenario, full=probe.full, goodput=self.goodput)
        if cut and outcome is Outcome.CLIENT:
            why = "cut at the end of the budget"
        seen = Observation(probe.rate, probe.seconds, probe.full, outcome, cost_s, why, len(rows))
        headline = run.document["verdict"]["headline"]
        return seen.to_json() | {"run": str(run.folder), "valid": run.valid, "verdict": headline}

    def answer_run(self, done: Done) -> str | None:
        """The folder of the run that confirmed the answer: the last full-length one at its rate."""
        runs = [e["run"] for e in self.journal.entries if e["full"] and e["rate"] == done.rate]
        return runs[-1] if runs else None


def clock(seconds: float) -> str:
    """75 → "1:15", 4000 → "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
