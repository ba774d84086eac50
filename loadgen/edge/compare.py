"""Sealed runs → a comparison: what may stand side by side, gains over a baseline with intervals, and the grid.

A *gain* is always above 1 where a run is better than the baseline: tokens/s of the run / of the baseline, latency of
the baseline / of the run. Runs are grouped into *tables* of one model and one load, in a table into *cells* (hardware,
backend, precision); runs of one cell are repeats of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from loadgen.core import bootstrap
from loadgen.core.bootstrap import Estimate
from loadgen.core.compare import AXES, MUST, NOTES, Mean, Ratio, differing, mean, ratio
from loadgen.core.dependence import Float
from loadgen.core.metrics import join, latency_columns
from loadgen.core.record import Rows
from loadgen.core.scenario import Kind
from loadgen.edge import store
from loadgen.edge.errors import UserError
from loadgen.edge.fingerprint import cell_of, fingerprint, hardware, load_of, model_of, rank
from loadgen.edge.store import Run


@dataclass(frozen=True)
class Figure:
    """What is compared: `column` of the rows at quantile `p` (None: the mean), or a rate or number of the summary."""

    name: str
    label: str
    unit: str
    column: str = ""
    p: float | None = None
    lower: bool = True  # is less better
    key: str = ""  # of the summary
    scale: float = 1.0


RATE = (Figure("throughput", "tokens/s", "tokens/s", "rate", lower=False),
        Figure("throughput", "videos/s", "videos/s", "rate", lower=False))  # fmt: skip
ENERGY = (Figure("energy", "tokens/J", "tokens/J", lower=False, key="tokens_per_joule"),
          Figure("energy", "J/video", "J", key="joules_per_video"))  # fmt: skip


def _latencies(column: str, label: str) -> list[Figure]:
    return [Figure(f"{column}_{n}", f"{label} {n}", "ms", f"{column}_ns", p, scale=1e6)
            for n, p in (("p50", 0.5), ("p99", 0.99))]  # fmt: skip


def figures(run: Run) -> list[Figure]:
    """What is compared between runs of this kind. A server's rate is set by its schedule; offline, latency is rank."""
    video = run.scenario.clip is not None
    out = [] if run.scenario.kind is Kind.SERVER else [RATE[video]]
    out += [] if video or run.scenario.kind is Kind.OFFLINE else _latencies("ttft", "TTFT")
    out += [] if video else _latencies("tpot", "TPOT")
    out += [] if run.scenario.kind is Kind.OFFLINE else _latencies("e2e", "E2E")
    return [*out, ENERGY[video]]


@dataclass
class Measured:
    """A run with its rows and its estimates; rows are read once, when first asked for."""

    run: Run
    facts: dict[str, str] = field(default_factory=dict)
    _found: dict[str, Estimate | None] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return str(self.run.document.get("run_id", self.run.folder.name))

    @cached_property
    def rows(self) -> Rows:
        """Measured rows in due order, without chunks. Raises UserError where the summary is not theirs."""
        rows = join(self.run.rows())
        mine = {"completed": int(rows.ok.sum()), "scheduled": len(rows)}
        for name, value in mine.items():
            if self.run.summary.get(name) != value:
                raise UserError(f"{self.run.folder}: run.json says {name} {self.run.summary.get(name)}, its rows are "
                                f"{value}; the run was changed after it was sealed")  # fmt: skip
        return rows

    @cached_property
    def columns(self) -> dict[str, Float]:
        return latency_columns(self.rows)

    def estimate(self, figure: Figure, seed: int = 0) -> Estimate | None:
        """The figure of this run on a logarithmic scale; None where it has none (too few, or failed)."""
        if figure.label not in self._found:
            self._found[figure.label] = self._estimate(figure, seed)
        return self._found[figure.label]

    def _estimate(self, figure: Figure, seed: int) -> Estimate | None:
        if figure.key:
            value = self.run.summary.get(figure.key)
            return Estimate(float(np.log(value))) if value else None
        if figure.column == "rate":
            ok = self.rows.ok
            video = self.run.scenario.clip is not None
            made = np.ones(int(ok.sum())) if video else self.rows.tokens_out[ok].astype(np.float64)
            return bootstrap.rate(self.rows.done_ns[ok], made, seed)
        values = self.values(figure.column)
        return bootstrap.mean(values, seed) if figure.p is None else bootstrap.quantile(values, figure.p, seed)

    def values(self, column: str) -> Float:
        """A latency of every row that has one, in due order; +inf where it failed."""
        values = self.columns[column]
        return values[~np.isnan(values)]


@dataclass
class Cell:
    """Repeats of one thing."""

    label: str
    facts: dict[str, str]
    repeats: list[Measured]

    @property
    def run_ids(self) -> list[str]:
        return [m.id for m in self.repeats]

    def mean(self, figure: Figure) -> Mean | None:
        """The figure over the repeats that have it; None unless all have."""
        found = [m.estimate(figure) for m in self.repeats]
        return mean([e for e in found if e]) if found and all(found) else None


@dataclass(frozen=True)
class Line:
    """One figure of one cell beside the baseline's; `gain` is above 1 where the cell is better."""

    cell: str
    figure: Figure
    value: float | None
    baseline: float | None
    gain: Ratio | None
    paired: bool
    runs: list[str]
    baseline_runs: list[str]


@dataclass
class Table:
    """Cells of one model under one load. `notes` name what else differs, `unlike` what must not."""

    model: str
    load: str
    cells: list[Cell]
    notes: dict[str, list[str]]
    unlike: dict[str, list[str]]

    @property
    def title(self) -> str:
        return f"{self.model}, {self.load}"

    def lines(self, baseline: Cell) -> list[Line]:
        """Every figure of every other cell against `baseline`."""
        others = [cell for cell in self.cells if cell is not baseline]
        out = []
        for figure in figures(baseline.repeats[0].run):
            means = self.means(figure)
            out += [line(cell, baseline, figure, means) for cell in others]
        return out

    def means(self, figure: Figure) -> list[Mean]:
        """The figure of every cell that has it."""
        return [found for cell in self.cells if (found := cell.mean(figure)) is not None]

    def baseline(self, wanted: str | None) -> Cell | None:
        """The cell whose label has all words of `wanted`, or that holds the run of that id; else the first (oldest)."""
        if wanted is None:
            return self.cells[0]
        for cell in self.cells:
            if wanted in cell.run_ids or any(wanted.rstrip("/") == str(m.run.folder) for m in cell.repeats):
                return cell
        words = wanted.lower().replace("·", " ").split()
        return next((c for c in self.cells if all(w in c.label.lower() for w in words)), None)


def line(cell: Cell, baseline: Cell, figure: Figure, means: Sequence[Mean]) -> Line:
    """`figure` of `cell` against `baseline`; without a gain where either has none. `means` are those of all cells."""
    mine, base = cell.mean(figure), baseline.mean(figure)
    gain, paired = None, None
    if mine and base:
        top, bottom = (baseline, cell) if figure.lower else (cell, baseline)
        sides = [[e for m in c.repeats if (e := m.estimate(figure))] for c in (top, bottom)]
        paired = _paired(top, bottom, figure) if all(m.runs == 1 for m in means) else None
        gain = ratio(sides[0], sides[1], paired, means)
    return Line(cell.label, figure, _value(mine, figure), _value(base, figure), gain, paired is not None,
                cell.run_ids, baseline.run_ids)  # fmt: skip


def _value(found: Mean | None, figure: Figure) -> float | None:
    return None if found is None else float(np.exp(found.log)) / figure.scale


def _paired(top: Cell, bottom: Cell, figure: Figure) -> Estimate | None:
    """Two single runs of one schedule, slot by slot; None where the schedules differ or slots have no value in one."""
    a, b = bottom.repeats[0], top.repeats[0]
    if not figure.column or figure.column == "rate" or len(a.rows) != len(b.rows):
        return None
    same_due = not a.run.scenario.kind.open_loop or np.array_equal(a.rows.due_ns, b.rows.due_ns)
    if not same_due or not np.array_equal(a.rows.sample, b.rows.sample):
        return None
    x, y = a.columns[figure.column], b.columns[figure.column]
    there = ~(np.isnan(x) | np.isnan(y))
    if figure.p is None:
        return bootstrap.paired_mean(x[there], y[there])
    return bootstrap.paired_quantile(x[there], y[there], figure.p)


def tables(runs: Sequence[Run], allow_unlike: bool = False) -> list[Table]:
    """Groups runs. Raises UserError, naming what differs, where runs of one load are unlike and that isn't allowed."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for run in sorted(runs, key=lambda r: (rank(r), str(r.document.get("run_id")))):
        if not run.scenario.keep_outputs:
            groups.setdefault((model_of(run), load_of(run)), []).append(Measured(run, fingerprint(run)))
    return [_table(*of, groups[of], allow_unlike) for of in sorted(groups, key=by_load)]


def by_load(of: tuple[str, str]) -> tuple[str, str, float]:
    """Order of (model, load): by model, scenario, and then the number, so that 8 in flight come before 64."""
    model, load = of
    name, _, number = load.removesuffix(" /s").rpartition(" ")
    return (model, name, float(number)) if number.replace(".", "", 1).isdigit() else (model, load, 0.0)


def _table(model: str, load: str, found: list[Measured], allow_unlike: bool) -> Table:
    facts = [m.facts for m in found]
    unlike = differing(facts, _must(found[0].run))
    if unlike and not allow_unlike:
        named = "; ".join(f"{name}: {' or '.join(values[:3])}" for name, values in unlike.items())
        raise UserError(f"{model}, {load}: these runs differ in more than what is compared ({named}); leave some out, "
                        "or compare them anyway with --allow-unlike, which marks the output")  # fmt: skip
    cells: dict[str, Cell] = {}
    for m in found:
        cells.setdefault(cell_of(m.facts), Cell(cell_of(m.facts), m.facts, [])).repeats.append(m)
    return Table(model, load, list(cells.values()), differing(facts, NOTES), unlike)


def _must(run: Run) -> tuple[str, ...]:
    """An offline run's cap is a window and its count the expected rate of each machine: they may differ."""
    loose = {Kind.OFFLINE: ("in flight", "duration")}.get(run.scenario.kind, ())
    return tuple(name for name in MUST if name not in loose)


def load_runs(folders: Sequence[Any], allow_invalid: bool = False, check: Callable[[Run], None] = store.verify_all,
              ) -> list[Run]:  # fmt: skip
    """Sealed runs, each verified. Raises UserError for a damaged one, and for INVALID ones unless they are allowed."""
    runs = [store.load(folder) for folder in folders]
    for run in runs:
        check(run)
    invalid = [r for r in runs if not r.valid]
    if invalid and not allow_invalid:
        more = f" (and {len(invalid) - 1} more)" if len(invalid) > 1 else ""
        raise UserError(f"{invalid[0].folder} is INVALID{more}: {invalid[0].document['verdict']['headline']}; "
                        "leave it out, or compare it anyway with --allow-invalid, which marks the output")  # fmt: skip
    return runs


def axes(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """What differs between cells: what is compared."""
    return differing([c.facts for c in cells], AXES)


def accuracy(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Token agreement of accuracy runs, by model and cell, to stand beside the speed."""
    out = []
    for run in runs:
        seen = run.summary.get("accuracy") or {}
        if run.scenario.keep_outputs and ("token_agreement" in seen or "rouge" in seen):
            out.append({"model": model_of(run), "cell": cell_of(fingerprint(run)), "hardware": hardware(run).name,
                        "run": str(run.document.get("run_id")), "token_agreement": seen.get("token_agreement"),
                        "equal": seen.get("equal"), "samples": seen.get("samples"),
                        "rouge": seen.get("rouge")})  # fmt: skip
    return out
