"""A comparison as one plain document, from which text, Markdown, JSON and the HTML page are made alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadgen.core.compare import BORROWED, NONE, WITHIN, Ratio
from loadgen.core.cost import break_even, cost_per, joules_each, per_joule
from loadgen.core.verdict import limited
from loadgen.edge import physics
from loadgen.edge.compare import Cell, Line, Table, accuracy, axes, by_load
from loadgen.edge.compare_grid import GridView, as_json, grids, headline, interval, ratio_json, size
from loadgen.edge.errors import UserError
from loadgen.edge.fingerprint import cell_of, fingerprint, hardware, load_of, model_of, rank
from loadgen.edge.report_data import limits, number
from loadgen.edge.report_telemetry import at_power_limit
from loadgen.edge.store import Run

LIMITED = 0.1  # share of samples at the power limit that is worth a word


@dataclass
class Comparison:
    """Everything that is shown. `marks` stand on top of every form: what was allowed that should not be quoted."""

    runs: list[Run]
    tables: list[tuple[Table, Cell, list[Line]]]
    views: list[GridView]
    prices: Mapping[str, float]
    currency: str
    marks: list[str]
    notes: list[str]
    published: list[dict[str, Any]]

    @property
    def headline(self) -> str:
        return headline(self.views)


def build(
    runs: Sequence[Run], found: Sequence[Table], baseline: str | None, prices: Mapping[str, float], currency: str,
    published: Sequence[dict[str, Any]] = (),
) -> Comparison:  # fmt: skip
    """Computes all lines and grids. Raises UserError where nothing stands beside anything, or no cell is a baseline."""
    pairs = [(t, t.baseline(baseline)) for t in found if len(t.cells) > 1]
    if not pairs:
        alone = "; ".join(f"{t.title}: only {t.cells[0].label}" for t in found[:4]) or "they are all accuracy runs"
        raise UserError(f"nothing to compare: no two runs of one model and load differ in hardware, backend or "
                        f"precision ({alone})")  # fmt: skip
    if all(cell is None for _, cell in pairs):
        labels = sorted({c.label for t, _ in pairs for c in t.cells})
        raise UserError(f"no cell is --baseline {baseline!r}; choose words of one of: {'; '.join(labels)}")
    done = [(t, cell, t.lines(cell)) for t, cell in pairs if cell is not None]
    views = sorted((v for t, cell, _ in done for v in grids(t, cell)), key=size, reverse=True)
    marks = [f"UNLIKE RUNS compared on request: {t.title} differ in {', '.join(t.unlike)}" for t in found if t.unlike]
    invalid = [str(r.document["run_id"]) for r in runs if not r.valid]
    marks += [f"INVALID RUNS compared on request: {', '.join(invalid)}"] if invalid else []
    notes = [f"{t.title}: left out, it has no cell {baseline!r}" for t, cell in pairs if cell is None]
    notes += _notes(found, done)
    return Comparison(sorted(runs, key=rank), done, views, prices, currency, marks, notes, list(published))


def _notes(found: Sequence[Table], done: Sequence[tuple[Table, Cell, list[Line]]]) -> list[str]:
    """Caveats in words."""
    out = []
    for table in found:
        differing = {n: v for n, v in table.notes.items() if n in ("server", "driver", "host")}
        out += [f"{table.title}: {name} differs ({' or '.join(v)})" for name, v in differing.items()]
        out += _capped(table) + _recoded(table) + _limited(table)
        if len(table.cells) == 1:
            out.append(f"{table.title}: only {table.cells[0].label}, nothing to compare it with")
    bases = {line.gain.basis for _, _, lines in done for line in lines if line.gain and line.figure.name != "energy"}
    if WITHIN in bases:
        out.append("some gains rest on one run each: their intervals do not contain how repeats differ, which is often "
                   "more; make at least two repeats")  # fmt: skip
    if BORROWED in bases:
        out.append("some cells have one run: its scatter is taken from the cell whose repeats differ most")
    if NONE in bases:
        out.append("some gains have no interval: a run is too short for that figure, or it lies among failures")
    if any(line.paired for _, _, lines in done for line in lines):
        out.append("gains marked ‖ are paired by slot: both runs had the same schedule and samples")
    if any(t.model and m.run.document.get("weights") == "synthetic" for t, _, _ in done for c in t.cells
           for m in c.repeats):  # fmt: skip
        out.append("weights are SYNTHETIC: speed is that of the architecture, answers mean nothing")
    return out


def _capped(table: Table) -> list[str]:
    """The same GPU with another power limit is another machine."""
    return [f"{table.title}: {gpu} ran with several power limits ({' or '.join(v)} W)"
            for gpu, v in _mixed(table, "hardware", "power limit").items()]  # fmt: skip


def _recoded(table: Table) -> list[str]:
    """The same backend exported by another version of its code: a gain between such runs is not the GPU's alone."""
    return [f"{table.title}: {backend} was served by different code ({' or '.join(v)})"
            for backend, v in _mixed(table, "backend", "code").items()]  # fmt: skip


def _mixed(table: Table, by: str, fact: str) -> dict[str, list[str]]:
    """Values of `fact` among runs of one value of `by`, where there are several."""
    seen: dict[str, set[str]] = {}
    for cell in table.cells:
        for m in cell.repeats:
            seen.setdefault(m.facts[by], set()).add(m.facts[fact])
    return {one: sorted(values) for one, values in seen.items() if len(values) > 1}


def _limited(table: Table) -> list[str]:
    """Cells whose GPU worked at its power limit: a higher limit would change the gain."""
    out = []
    for cell in table.cells:
        share = max((at_power_limit(m.run) or 0.0 for m in cell.repeats), default=0.0)
        if share >= LIMITED:
            out.append(f"{table.title}: {cell.label} was held back by its power limit in up to {share:.0%} of samples")
    return out


def document(c: Comparison) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "schema": 1, "kind": "comparison", "headline": c.headline, "marks": c.marks, "notes": c.notes,
        "tables": [_table_json(*entry) for entry in c.tables],
        "grids": [as_json(v) for v in c.views],
        "roofline": [{"run": str(r.document["run_id"]), "cell": cell_of(fingerprint(r)), "model": model_of(r),
                      "load": load_of(r), "works": physics.as_json(r)} for r in c.runs if physics.works(r)],
        "cost": cost_rows(c), "accuracy": accuracy(c.runs),
        "runs": [{"run": str(r.document["run_id"]), "folder": str(r.folder), "valid": r.valid, "model": model_of(r),
                  "load": load_of(r), "cell": cell_of(fingerprint(r)), "verdict": r.document["verdict"]["headline"],
                  "records_sha256": r.document["records"]["sha256"], "fingerprint": fingerprint(r)} for r in c.runs],
        "published": c.published,
    }  # fmt: skip


def _table_json(table: Table, baseline: Cell, lines: list[Line]) -> dict[str, Any]:
    return {
        "title": table.title, "model": table.model, "load": table.load, "baseline": baseline.label,
        "compared": axes(table.cells), "differs_too": table.notes, "unlike": table.unlike,
        "cells": [{"cell": c.label, "runs": c.run_ids} for c in table.cells],
        "lines": [{"cell": x.cell, "figure": x.figure.label, "unit": x.figure.unit, "value": x.value,
                   "baseline": x.baseline, "gain": ratio_json(x.gain) if x.gain else None, "paired": x.paired,
                   "runs": x.runs, "baseline_runs": x.baseline_runs} for x in lines],
    }  # fmt: skip


def cost_rows(c: Comparison) -> list[dict[str, Any]]:
    """Energy and money of each cell of a model under a limit (SLO): of its fastest VALID run inside that limit.

    Runs without a limit stand by load, since the fastest of them would only be the one with the longest queue.
    """
    groups: dict[tuple[str, str, str, str], list[Run]] = {}
    for run in c.runs:
        limited_ = bool(limited(run.scenario.limits))
        if not run.scenario.keep_outputs and _made(run)[1] and (run.valid or not limited_):
            key = (model_of(run), limits(run), "" if limited_ else load_of(run), cell_of(fingerprint(run)))
            groups.setdefault(key, []).append(run)
    rows: list[dict[str, Any]] = []
    first: dict[tuple[str, ...], dict[str, Any]] = {}
    for (model, slo, load, cell), mine in sorted(groups.items(), key=lambda g: by_load((g[0][0], g[0][2]))):
        best = max(mine, key=lambda r: _made(r)[1])
        row = _cost_row(best, c.prices) | {"model": model, "slo": slo, "cell": cell}
        of = (model, slo, load, cell.partition(" · ")[2])  # the same backend on other GPUs
        if row["price_per_gpu_hour"] is not None:
            first.setdefault(of, row)
        rows.append(row | {"of": of})
    for row in rows:
        base = first.get(row.pop("of"))
        other = base is not None and base["hardware"] != row["hardware"]  # a GPU against itself has no break-even
        row["break_even"], row["break_even_with"] = None, None
        if base is not None and other:
            each, mine_ = base["per_s"] / base["gpus"], row["per_s"] / row["gpus"]
            row["break_even"] = break_even(base["price_per_gpu_hour"], each, mine_)
            row["break_even_with"] = base["cell"]
    return rows


def _cost_row(run: Run, prices: Mapping[str, float]) -> dict[str, Any]:
    total, per_s, unit, per = _made(run)
    where = hardware(run)
    price = prices.get(where.gpu.key) if where.gpu else None
    joules, watts = run.summary.get("energy_joules"), run.summary.get("mean_power_watts")
    return {
        "run": str(run.document["run_id"]), "load": load_of(run), "per_s": per_s, "unit": unit, "gpus": where.count,
        "hardware": where.gpu.key if where.gpu else where.name,
        "joules_each": joules_each(total, joules), "per_joule": per_joule(total, joules), "watts": watts,
        "per_s_per_watt": per_s / watts if watts else None, "price_per_gpu_hour": price,
        "cost": cost_per(per, per_s, price, where.count), "cost_of": per,
    }  # fmt: skip


def _made(run: Run) -> tuple[float, float, str, float]:
    """Tokens (or videos) made, per second, their unit, and how many of them a cost is for."""
    if run.scenario.clip is not None:
        return run.summary.get("completed") or 0, run.summary.get("qps") or 0.0, "videos/s", 1.0
    return run.summary.get("tokens_out") or 0, run.summary.get("tokens_per_s") or 0.0, "tokens/s", 1e6


def gain_text(gain: Ratio | None) -> str:
    """ "2.10×  2.01 to 2.19", "1.02×  0.98 to 1.06 not separable", "–"."""
    if gain is None:
        return "–"
    if gain.low is None:
        return f"{gain.ratio:.3g}× no interval"
    return f"{gain.ratio:.3g}× ({interval(gain)})" + ("" if gain.separable else " not separable")


def rows_of(lines: Sequence[Line]) -> list[list[str]]:
    """Cells of text for each line: figure, cell, value, baseline, gain."""
    return [[x.figure.label, x.cell, number(x.value), number(x.baseline),
             gain_text(x.gain) + (" ‖" if x.paired else "")] for x in lines]  # fmt: skip
