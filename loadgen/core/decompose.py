"""How much of a speed-up is hardware, how much compiler, and how much only both together: a GPU × backend grid.

With y the logarithm of a cell's throughput and (h0, b0) the baseline cell,

    y(h, b) − y(h0, b0) = hardware(h) + compiler(b) + interaction(h, b)
    hardware(h) = y(h, b0) − y(h0, b0)        compiler(b) = y(h0, b) − y(h0, b0)
    interaction(h, b) = y(h, b) − y(h, b0) − y(h0, b) + y(h0, b0)

so the three gains multiply to the whole speed-up exactly. *Compiler gain by generation* is y(h, b) − y(h, b0) for each
h: it changes from one GPU to the next by the interaction. A gain that needs a cell which was not measured is None: a
hole is not filled in. `additive` says what the measured cells come to if there were no interaction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.core.compare import REPEATS, Mean, Ratio, contrast

Cell = tuple[str, str]  # hardware, backend


@dataclass(frozen=True)
class Grid:
    """Cells' mean logarithms of throughput (more is better); a cell that was not measured is not in `cells`."""

    hardware: tuple[str, ...]
    backends: tuple[str, ...]
    cells: Mapping[Cell, Mean]

    @property
    def holes(self) -> list[Cell]:
        """Cells that were not measured."""
        return [(h, b) for h in self.hardware for b in self.backends if (h, b) not in self.cells]

    def contrast(self, plus: Sequence[Cell], minus: Sequence[Cell]) -> Ratio | None:
        """exp(Σ y(plus) − Σ y(minus)) with its interval; None where one of the cells is a hole."""
        if any(c not in self.cells for c in (*plus, *minus)):
            return None
        if not set(plus) ^ set(minus):  # a cell against itself
            return Ratio(1.0, 1.0, 1.0, REPEATS, math.inf)
        return contrast([self.cells[c] for c in plus], [self.cells[c] for c in minus])


@dataclass(frozen=True)
class Decomposition:
    """Gains against the baseline cell; None where a hole is in the way. `by_generation` is the compiler gain on each
    GPU, `interaction` what it is there over what it is on the baseline GPU."""

    hardware: dict[str, Ratio | None]
    compiler: dict[str, Ratio | None]
    interaction: dict[Cell, Ratio | None]
    total: dict[Cell, Ratio | None]
    by_generation: dict[Cell, Ratio | None]


def decompose(grid: Grid, baseline: Cell) -> Decomposition:
    """All gains of a grid. Raises ValueError where the baseline is not one of its rows and columns."""
    h0, b0 = baseline
    if h0 not in grid.hardware or b0 not in grid.backends:
        raise ValueError(f"the baseline {h0}, {b0} is not in the grid")
    cells = [(h, b) for h in grid.hardware for b in grid.backends]
    return Decomposition(
        {h: grid.contrast([(h, b0)], [baseline]) for h in grid.hardware},
        {b: grid.contrast([(h0, b)], [baseline]) for b in grid.backends},
        {(h, b): grid.contrast([(h, b), baseline], [(h, b0), (h0, b)])
         for h, b in cells if h != h0 and b != b0},
        {c: grid.contrast([c], [baseline]) for c in cells},
        {(h, b): grid.contrast([(h, b)], [(h, b0)]) for h, b in cells if b != b0},
    )  # fmt: skip


def additive(grid: Grid, baseline: Cell) -> tuple[dict[str, float], dict[str, float]] | None:
    """Hardware and compiler gains (factors) by least squares over the measured cells, as if they only multiplied.

    None where the cells do not connect all rows and columns, so that some gain is not determined.
    """
    cells = list(grid.cells)
    names = [("h", h) for h in grid.hardware] + [("b", b) for b in grid.backends]
    place = {name: i for i, name in enumerate(names)}
    design = np.zeros((len(cells) + 1, len(names)))
    for i, (h, b) in enumerate(cells):
        design[i, place["h", h]] = design[i, place["b", b]] = 1.0
    # y = hardware + compiler leaves one number free: the last row only holds the solution in place
    design[-1, place["h", baseline[0]]] = 1.0
    y = np.array([grid.cells[c].log for c in cells] + [0.0])
    if np.linalg.matrix_rank(design) < len(names):
        return None
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    hardware = {h: float(np.exp(solution[place["h", h]] - solution[place["h", baseline[0]]])) for h in grid.hardware}
    compiler = {b: float(np.exp(solution[place["b", b]] - solution[place["b", baseline[1]]])) for b in grid.backends}
    return hardware, compiler
