"""The grid of a comparison: GPUs × backends of one precision, its gains, and the headline in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loadgen.core.compare import WITHIN, Ratio, lend
from loadgen.core.decompose import Decomposition, Grid, additive, decompose
from loadgen.edge.compare import Cell, Figure, Table, figures
from loadgen.edge.fingerprint import BACKENDS


@dataclass(frozen=True)
class GridView:
    """A grid of one table and precision, with the decomposition against its baseline."""

    table: Table
    precision: str
    figure: Figure
    grid: Grid
    baseline: tuple[str, str]
    gains: Decomposition
    cells: dict[tuple[str, str], Cell]

    @property
    def title(self) -> str:
        return f"{self.table.title}, {self.precision}: {self.figure.label}"


def grids(table: Table, baseline: Cell) -> list[GridView]:
    """A grid for each precision that has at least two cells with a figure; the baseline's own precision first."""
    precisions = dict.fromkeys([baseline.facts["precision"], *(c.facts["precision"] for c in table.cells)])
    found = [_grid(table, precision, baseline) for precision in precisions]
    return [g for g in found if g is not None]


def _grid(table: Table, precision: str, baseline: Cell) -> GridView | None:
    figure = headline_figure(baseline)
    cells: dict[tuple[str, str], Cell] = {}
    means = {}
    for cell in table.cells:
        if cell.facts["precision"] != precision:
            continue
        key = (cell.facts["hardware"], cell.facts["backend"])
        if (found := cell.mean(figure)) is not None:
            cells[key] = cell
            means[key] = replace(found, log=-found.log) if figure.lower else found  # more is better in a grid
    if len(means) < 2:
        return None
    hardware = tuple(dict.fromkeys(h for h, _ in cells))
    backends = tuple(sorted({b for _, b in cells}, key=_backend))
    wanted = (baseline.facts["hardware"], baseline.facts["backend"])
    start = wanted if wanted in means else min(means, key=lambda c: (hardware.index(c[0]), backends.index(c[1])))
    means = dict(zip(means, lend(list(means.values())), strict=True))
    grid = Grid(hardware, backends, means)
    return GridView(table, precision, figure, grid, start, decompose(grid, start), cells)


def headline_figure(cell: Cell) -> Figure:
    """Throughput; of a server run, whose rate is set, the median latency."""
    known = figures(cell.repeats[0].run)
    return next((f for f in known if f.name == "throughput"), None) or next(f for f in known if f.name == "e2e_p50")


def _backend(name: str) -> Any:
    return (BACKENDS.index(name) if name in BACKENDS else len(BACKENDS), name)


def headline(views: Sequence[GridView]) -> str:
    """What the largest grid says, in one or two sentences."""
    if not views:
        return "Nothing could be compared: no two cells of one precision have the same figure."
    view = max(views, key=size)
    h0, b0 = view.baseline
    best = max(view.grid.cells, key=lambda c: view.grid.cells[c].log)
    what = f"{view.table.title}"
    if best == view.baseline:
        worst = min(view.grid.cells, key=lambda c: view.grid.cells[c].log)
        gain = view.grid.contrast([best], [worst])
        return f"{what}: nothing is faster than {b0} on {h0}; it is {words(gain)} {worst[1]} on {worst[0]}."
    h, b = best
    first = f"{what}: {b} on {h} is {words(view.gains.total[best])} {b0} on {h0}"
    sentence = first + _parts(view, best) + "."
    generations = [(g, view.gains.by_generation.get((g, b))) for g in view.grid.hardware] if b != b0 else []
    if len(view.grid.hardware) > 1 and generations:
        sentence += f" Compiler gain of {b} over {b0} by generation: "
        sentence += ", ".join(f"{g} {factor(r)}" for g, r in generations) + "."
    return sentence


def size(view: GridView) -> tuple[int, int]:
    """How much a grid says of both axes, and then in all."""
    return min(len(view.grid.hardware), len(view.grid.backends)), len(view.cells)


def _parts(view: GridView, best: tuple[str, str]) -> str:
    """The gain of the best cell, taken apart; says which hole is in the way where it cannot be."""
    (h0, b0), (h, b) = view.baseline, best
    if h == h0 or b == b0:
        return ""
    missing = [f"{backend} on {gpu}" for gpu, backend in ((h, b0), (h0, b)) if (gpu, backend) not in view.grid.cells]
    if missing:
        return f" (how much of it is hardware cannot be told: {' and '.join(missing)} was not measured)"
    gains = view.gains
    return (f": {factor(gains.hardware[h])} from the hardware, {factor(gains.compiler[b])} from the compiler, "
            f"{factor(gains.interaction[best])} only from both together")  # fmt: skip


def words(gain: Ratio | None) -> str:
    """ "2.1× (2.0 to 2.2) as fast as", or that it cannot be told."""
    if gain is None:
        return "(not measured) against"
    if gain.low is None:
        return f"{gain.ratio:.3g}× as fast (no interval: too little data) as"
    if not gain.separable:
        return f"not separable ({interval(gain)}) from"
    return f"{factor(gain)} as fast as"


def factor(gain: Ratio | None) -> str:
    """ "2.10× (2.01 to 2.19)"; a hole is "not measured"."""
    if gain is None:
        return "not measured"
    return f"{gain.ratio:.3g}×" + (f" ({interval(gain)})" if gain.low is not None else " (no interval)")


def interval(gain: Ratio) -> str:
    """ "2.01 to 2.19", with "within single runs" where repeats are missing."""
    if gain.low is None or gain.high is None:
        return ""
    more = ", one run each" if gain.basis == WITHIN else ""
    return f"{gain.low:.3g} to {gain.high:.3g}{more}"


def as_json(view: GridView) -> dict[str, Any]:
    """Plain types; a hole is null."""

    def plain(gain: Ratio | None) -> dict[str, Any] | None:
        return None if gain is None else ratio_json(gain)

    guess = additive(view.grid, view.baseline)
    sign = -1 if view.figure.lower else 1
    return {
        "title": view.title, "figure": view.figure.label, "unit": view.figure.unit, "precision": view.precision,
        "hardware": list(view.grid.hardware), "backends": list(view.grid.backends),
        "baseline": list(view.baseline), "holes": [list(c) for c in view.grid.holes],
        "cells": [{"hardware": h, "backend": b, "value": math.exp(sign * m.log) / view.figure.scale, "runs":
                   view.cells[h, b].run_ids, "gain": plain(view.gains.total[h, b])}
                  for (h, b), m in view.grid.cells.items()],
        "hardware_gain": {h: plain(r) for h, r in view.gains.hardware.items()},
        "compiler_gain": {b: plain(r) for b, r in view.gains.compiler.items()},
        "interaction": [{"hardware": h, "backend": b, "gain": plain(r)}
                        for (h, b), r in view.gains.interaction.items()],
        "compiler_gain_by_generation": [{"hardware": h, "backend": b, "gain": plain(r)}
                                        for (h, b), r in view.gains.by_generation.items()],
        "if_gains_only_multiplied": None if guess is None else {"hardware": guess[0], "compiler": guess[1]},
    }  # fmt: skip


def ratio_json(gain: Ratio) -> dict[str, Any]:
    """A gain as plain types."""
    return {"ratio": gain.ratio, "low": gain.low, "high": gain.high, "basis": gain.basis, "separable": gain.separable}
