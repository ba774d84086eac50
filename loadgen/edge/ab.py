"""An A/B experiment on real servers: runs in the order A B B A until the two are told apart or the budget is spent.

Both sides get the same scenario, seeds and salt, so that they answer the same prompts; every run is sealed like any
other, and `tritonmark compare` reads them later.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from loadgen.core.interleave import BLOCK, Look, look, order
from loadgen.edge.compare import Measured, figures
from loadgen.edge.errors import UserError
from loadgen.edge.store import Run

Start = Callable[[str, int], Run]  # side and number of the run → the sealed run
Say = Callable[[str], None]


@dataclass
class Experiment:
    """`figure` is a name of `compare.figures`; `start` makes a run of "A" or "B". `budget_s` bounds the whole."""

    start: Start
    figure: str
    budget_s: float
    max_blocks: int
    say: Say
    runs: dict[str, list[Run]] = field(default_factory=lambda: {"A": [], "B": []})
    logs: dict[str, list[float]] = field(default_factory=lambda: {"A": [], "B": []})
    seen: Look | None = None
    why: str = ""

    def run(self) -> Look:
        """Blocks of four runs until decided. Raises UserError when a run is INVALID twice or has no such figure.

        At least two blocks are made whatever the budget, since one shows no scatter.
        """
        begun, number = time.monotonic(), 0
        while True:
            for _ in range(BLOCK):
                side = order(number)
                self._one(side, number)
                number += 1
            self.seen = look(self.logs["A"], self.logs["B"])
            spent = time.monotonic() - begun
            self._report()
            if self.seen.decided:
                self.why = f"told apart after {self.seen.blocks} blocks"
                return self.seen
            block_s = spent / self.seen.blocks
            if self.seen.blocks >= max(2, self.max_blocks):
                self.why = f"not told apart in {self.seen.blocks} blocks, the most that were asked for"
                return self.seen
            if self.seen.blocks >= 2 and spent + block_s > self.budget_s:
                self.why = f"not told apart within the budget of {self.budget_s:.0f} s"
                return self.seen

    def _one(self, side: str, number: int) -> None:
        run = self.start(side, number)
        if not run.valid:  # a busy moment of the client must not cost the whole experiment
            self.say(f"{side}  {run.document['verdict']['headline']}: made again")
            run = self.start(side, number)
        if not run.valid:
            raise UserError(f"run {number + 1} ({side}) is INVALID twice: {run.document['verdict']['headline']}; "
                            f"it is in {run.folder}")  # fmt: skip
        known = {f.name: f for f in figures(run) if f.name != "energy"}
        if self.figure not in known:
            raise UserError(f"{run.scenario.name} has no --figure {self.figure}; one of: {', '.join(known)}")
        figure = known[self.figure]
        found = Measured(run).estimate(figure)
        if found is None:
            raise UserError(f"run {number + 1} ({side}) has no {figure.label}; it is in {run.folder}")
        self.runs[side].append(run)
        self.logs[side].append(-found.log if figure.lower else found.log)
        value = math.exp(found.log) / figure.scale
        self.say(f"{side}  {figure.label} {value:.4g} {figure.unit}  {run.document['run_id']}")

    def _report(self) -> None:
        assert self.seen
        gain = self.seen.gain
        if gain.low is None or gain.high is None:
            self.say(f"after {self.seen.blocks} block: B / A {gain.ratio:.4g}×, no interval yet")
        else:
            self.say(f"after {self.seen.blocks} blocks: B / A {gain.ratio:.4g}× ({gain.low:.4g} to {gain.high:.4g} at "
                     f"{self.seen.confidence:.2%}; above 1: B is better)")  # fmt: skip
