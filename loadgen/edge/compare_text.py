"""A comparison as text for the terminal and as GitHub Markdown: the same tables, made once as rows of text."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from loadgen.edge import physics
from loadgen.edge.compare import accuracy
from loadgen.edge.compare_grid import GridView, factor
from loadgen.edge.compare_report import Comparison, cost_rows, rows_of
from loadgen.edge.fingerprint import cell_of, fingerprint, load_of, model_of
from loadgen.edge.report_data import number

HOLE = "not measured"
WIDTH = 150


@dataclass(frozen=True)
class Block:
    """One table of text; `note` stands below its title."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def blocks(c: Comparison) -> list[Block]:
    """Everything, in reading order."""
    out = [block for view in c.views for block in grid_blocks(view)]
    for table, baseline, lines in c.tables:
        note = f"baseline {baseline.label} ({', '.join(baseline.run_ids)}); gains above 1 are better"
        out.append(Block(table.title, ["figure", "cell", "value", "baseline", "gain (95 %)"], rows_of(lines), note))
    out += [roofline_block(c), cost_block(c), accuracy_block(c), published_block(c), runs_block(c)]
    return [b for b in out if b.rows]


def grid_blocks(view: GridView) -> list[Block]:
    """The measured grid, and the gains by generation where there are several backends."""
    sign = -1.0 if view.figure.lower else 1.0

    def cell(h: str, b: str) -> str:
        found = view.grid.cells.get((h, b))
        return HOLE if found is None else f"{number(math.exp(sign * found.log) / view.figure.scale)} {view.figure.unit}"

    backends = list(view.grid.backends)
    out = [Block(view.title, ["GPU", *backends], [[h, *(cell(h, b) for b in backends)] for h in view.grid.hardware])]
    if len(backends) > 1 or len(view.grid.hardware) > 1:
        h0, b0 = view.baseline
        rows = []
        for h in view.grid.hardware:
            for b in backends:
                if (h, b) == view.baseline:
                    continue
                gains = view.gains
                rows.append([h, b, factor(gains.total[h, b]), factor(gains.hardware[h]) if h != h0 else "–",
                             factor(gains.compiler[b]) if b != b0 else "–",
                             factor(gains.interaction[h, b]) if h != h0 and b != b0 else "–",
                             factor(gains.by_generation[h, b]) if b != b0 else "–"])  # fmt: skip
        head = ["GPU", "backend", "whole gain", "hardware", "compiler", "both together", f"gain here over {b0}"]
        out.append(Block(f"Where the gain is from: {view.title}", head, rows,
                         f"against {b0} on {h0}; hardware × compiler × both together = whole gain"))  # fmt: skip
    return out


def roofline_block(c: Comparison) -> Block:
    rows = [[model_of(r), cell_of(fingerprint(r)), load_of(r), w.name, f"{w.measured_s * 1e3:.4g} ms",
             f"{w.limit.seconds * 1e3:.4g} ms", f"{w.share:.1%}", f"{w.mbu:.1%}",
             "–" if w.mfu is None else f"{w.mfu:.2%}", w.assumed, str(r.document["run_id"])]
            for r in c.runs for w in physics.works(r)]  # fmt: skip
    head = ["model", "cell", "load", "work", "measured", "limit", "of the limit", "MBU", "MFU", "assumed", "run"]
    return Block("How far from physics", head, rows)


def cost_block(c: Comparison) -> Block:
    unit = f" {c.currency}" if c.currency else ""
    rows = []
    for r in cost_rows(c):
        of = "M tokens" if r["cost_of"] > 1 else "video"
        even = "–" if r["break_even"] is None else f"{r['break_even']:.3g}{unit}/h with {r['break_even_with']}"
        rows.append([
            r["model"], r["cell"], f"{r['load']} ({r['slo']})", f"{number(r['per_s'])} {r['unit']}",
            number(r["watts"]), number(r["joules_each"]), number(r["per_s_per_watt"]),
            "–" if r["cost"] is None else f"{r['cost']:.3g}{unit} per {of}", even, r["run"],
        ])  # fmt: skip
    head = ["model", "cell", "at", "makes", "W", "J each", "per s and W", "cost", "break-even price", "run"]
    return Block("Energy and cost", head, rows, "the fastest VALID run inside latency limits, where a cell has one")


def accuracy_block(c: Comparison) -> Block:
    rows = []
    for a in accuracy(c.runs):
        share = "–" if a["token_agreement"] is None else f"{a['token_agreement']:.2%}"
        equal = "–" if a["equal"] is None else f"{a['equal']} of {a['samples']}"
        rows.append([a["model"], a["cell"], share, equal, a["run"]])
    return Block("Accuracy", ["model", "cell", "token agreement", "equal answers", "run"], rows)


def published_block(c: Comparison) -> Block:
    rows = [[p["round"], p["model"], p["scenario"], p["accelerator"], str(p["results"]), number(p["median"], 4),
             p["unit"]] for p in c.published]  # fmt: skip
    head = ["round", "model", "scenario", "accelerator", "results", "median per accelerator", "unit"]
    note = "other models, servers, settings and people: for orientation, never a ratio to a measured run"
    return Block("PUBLISHED by MLCommons, not measured here", head, rows, note)


def runs_block(c: Comparison) -> Block:
    rows = [[str(r.document["run_id"]), model_of(r), load_of(r), cell_of(fingerprint(r)),
             r.document["verdict"]["headline"]] for r in c.runs]  # fmt: skip
    return Block("Runs", ["run", "model", "load", "cell", "verdict"], rows)


def text(c: Comparison, console: Console) -> None:
    """Prints the comparison; assumptions of rooflines only in the other formats, where there is room."""
    with _width(console):
        console.print(Text(c.headline, style="bold"), soft_wrap=False)
        for mark in c.marks:
            console.print(Text(mark, style="bold red"))
        for block in blocks(c):
            console.print()
            console.print(Text(block.title, style="bold"))
            if block.note:
                console.print(Text(block.note, style="dim"))
            table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
            left_out = [i for i, name in enumerate(block.head) if name == "assumed"]
            for i, name in enumerate(block.head):
                if i not in left_out:
                    table.add_column(name, overflow="fold")
            for row in block.rows:
                table.add_row(*(Text(x) for i, x in enumerate(row) if i not in left_out))
            console.print(table, highlight=False)
        if c.notes:
            console.print()
            for note in c.notes:
                console.print(Text(f"Caution: {note}.", style="yellow"))


@contextlib.contextmanager
def _width(console: Console) -> Any:
    before = console.width
    if not console.is_terminal:
        console.width = max(WIDTH, before)
    try:
        yield
    finally:
        if not console.is_terminal:
            console.width = before


def markdown(c: Comparison) -> str:
    """For GitHub; text of others cannot break a table."""
    out = [f"**{_md(c.headline)}**", "", *(f"> **{_md(m)}**\n" for m in c.marks)]
    for block in blocks(c):
        out += [f"### {_md(block.title)}", *([_md(block.note), ""] if block.note else [""])]
        out += ["| " + " | ".join(map(_md, row)) + " |" for row in [block.head]]
        out.append("|" + "---|" * len(block.head))
        out += ["| " + " | ".join(map(_md, row)) + " |" for row in block.rows] + [""]
    out += [f"- {_md(note)}." for note in c.notes]
    return "\n".join(out).rstrip() + "\n"


def _md(cell: str) -> str:
    table = str.maketrans({c: "\\" + c for c in "\\`*_[]|#~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})
    return " ".join(str(cell).split()).translate(table)
