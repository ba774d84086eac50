"""Sealed runs as text: for the terminal (also in a pipe), as GitHub Markdown and as JSON.

One run gets a table with a column a percentile, its interval and its limit; several runs get a column a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loadgen.edge import physics, report_data
from loadgen.edge.report_data import Row, Section, as_json
from loadgen.edge.report_telemetry import lines as telemetry_lines
from loadgen.edge.report_video import clip_lines
from loadgen.edge.store import Run

__all__ = ["as_json", "markdown", "text"]

PIPE_WIDTH = 120  # wide enough for three runs side by side
RUNS_ABREAST = 3
REMARKS = (("reasons", "INVALID because"), ("cautions", "Caution"), ("lacking", "Lacking for MLPerf length"))


def text(runs: Sequence[Run], console: Console | None = None) -> None:
    """Prints runs to `console` (default: standard output). Colours only on a terminal, and never with NO_COLOR."""
    console = console or Console()
    with _readable_width(console):
        for start in range(0, len(runs), RUNS_ABREAST):
            part = runs[start : start + RUNS_ABREAST]
            console.print()
            _table(part, console)
            for run in part:
                _verdict(run, console, named=len(runs) > 1)


@contextlib.contextmanager
def _readable_width(console: Console) -> Iterator[None]:
    """A pipe has no width: a fixed one keeps output the same everywhere."""
    if console.is_terminal:
        yield
        return
    before, console.width = console.width, max(PIPE_WIDTH, console.width)
    try:
        yield
    finally:
        console.width = before


def _table(runs: Sequence[Run], console: Console) -> None:
    title, differing = report_data.shared(runs)
    console.print(Text(title, style="bold"))
    one = len(runs) == 1
    found = report_data.sections(runs)
    columns = found[0].columns
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    for _ in range(len(columns) if one else len(runs)):
        table.add_column(justify="right", no_wrap=one, overflow="fold")
    if one:
        table.add_column(style="dim", justify="right", overflow="fold")
        table.add_column(style="dim", overflow="fold")
    for name, texts in differing:
        table.add_row(name, *(Text(t, style="bold") for t in texts))
    for section in found:
        if one:
            table.add_row()
        _section_rows(table, section, runs, len(columns))
    console.print(table, highlight=False)


def _section_rows(table: Table, section: Section, runs: Sequence[Run], columns: int) -> None:
    one = len(runs) == 1
    head = Text(section.title, style="bold")
    if one and section.columns:
        interval = f"95 % of {section.columns[-1]}" if any(r.intervals[0][-1] for r in section.rows) else ""
        limit = "limit" if any(r.notes[0] for r in section.rows) else ""
        table.add_row(head, *(Text(c, style="bold") for c in (*section.columns, interval, limit)))
    else:
        names = Text(" / ".join(section.columns), style="dim")
        table.add_row(head, *([names] * len(runs) if section.columns else []))
    for row in section.rows:
        if not one:
            table.add_row("  " + row.label, *(_coloured(row.text(i)) for i in range(len(runs))))
        elif section.columns:
            cells = (_coloured(row.cell(0, i)) for i in range(len(section.columns)))
            interval = row.intervals[0][-1] + row.unit if row.intervals[0][-1] else ""
            table.add_row("  " + row.label, *cells, interval, row.notes[0])
        else:
            _value_row(table, row, columns)


def _value_row(table: Table, row: Row, columns: int) -> None:
    """One value in the first columns of a one-run table; three values (p50/p99/max) have a column each."""
    cells = [row.cell(0, i) for i in range(len(row.cells[0]))]
    blank = [""] * (columns - len(cells))
    interval = row.intervals[0][0] if row.intervals else ""
    table.add_row("  " + row.label, *(_coloured(c) for c in cells), *blank, interval + row.unit if interval else "")


def _coloured(cell: str) -> Text:
    return Text(cell, style="red" if cell.startswith(report_data.FAILED) else "")


def _verdict(run: Run, console: Console, named: bool) -> None:
    verdict = run.document["verdict"]
    headline = Text(verdict["headline"], style="bold green" if run.valid else "bold red")
    if named:
        headline = Text.assemble((report_data.facts(run)["scenario"] + ": ", "bold"), headline)
    console.print()
    console.print(headline)
    for line in _lines(run):
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    for key, title in REMARKS:
        # Beside others a run's headline is enough to say what it lacks; alone it gets the advice too.
        for reason in () if named and key == "lacking" else verdict.get(key) or ():
            console.print(Padding(_remark(title, reason), (0, 0, 0, 2)))
    for error, count in report_data.errors(run):
        console.print(Padding(Text(f"{count:,} × {error}"), (0, 0, 0, 2)))


def _lines(run: Run) -> list[str]:
    """What stands below a verdict before its reasons."""
    return [*report_data.accuracy(run), *report_data.servers(run), *clip_lines(run), *physics.lines(run),
            *telemetry_lines(run)]  # fmt: skip


def _remark(title: str, reason: dict[str, Any]) -> Text:
    style = {"INVALID because": "red", "Caution": "yellow"}.get(title, "dim")
    return Text.assemble((f"{title} {reason['code']}: ", style), f"{reason['seen']}; needs {reason['limit']}.\n",
                         (f"  → {reason['advice']}", "dim"))  # fmt: skip


def markdown(runs: Sequence[Run]) -> str:
    """The same tables and verdicts for GitHub. Text of others cannot make markup or break a table."""
    title, differing = report_data.shared(runs)
    names = dict(differing).get("scenario") or [report_data.facts(r)["run"] for r in runs]
    out = [f"## {_md(title)}", ""]
    for section in report_data.sections(runs):
        percentiles = f" ({' / '.join(section.columns)})" if section.columns else ""
        out += [_md_row([section.title + percentiles, *names]), "|---" + "|---:" * len(runs) + "|"]
        if section.title.startswith("Latency from due"):
            out += [_md_row([name, *texts]) for name, texts in differing if name != "scenario"]
        out += [_md_row([row.label, *(row.text(i) for i in range(len(runs)))]) for row in section.rows]
        out.append("")
    for run in runs:
        out += _md_verdict(run)
    return "\n".join(out).rstrip() + "\n"


def _md_verdict(run: Run) -> list[str]:
    verdict = run.document["verdict"]
    out = [f"**{_md(report_data.facts(run)['scenario'])}: {_md(verdict['headline'])}**", ""]
    out += [f"- {_md(line)}" for line in _lines(run)]
    for key, title in REMARKS:
        for r in verdict.get(key) or ():
            code, seen, limit, advice = (_md(r[k]) for k in ("code", "seen", "limit", "advice"))
            out.append(f"- {title} {code}: {seen}; needs {limit}. → {advice}")
    out += [f"- {count:,} × {_md(error)}" for error, count in report_data.errors(run)]
    return [*out, ""]


def _md_row(cells: list[str]) -> str:
    return "| " + " | ".join(_md(c) for c in cells) + " |"


def _md(cell: str) -> str:
    """Escapes what Markdown or HTML would take as markup, on one line."""
    table = str.maketrans({c: "\\" + c for c in "\\`*_[]|#~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})
    return " ".join(str(cell).split()).translate(table)
