"""Sweeps on a real server: a sealed run at each of several rates or concurrencies, resumable like a search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from loadgen.core.sweep import Point, digest, lines
from loadgen.edge.journal import Journal
from loadgen.edge.search import Prober, clock

LATENCIES = (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E"))


@dataclass
class Sweep:
    """`option` is the one that is varied: target_qps or concurrency."""

    prober: Prober
    option: str
    points: list[Point]
    journal: Journal

    def run(self) -> list[dict[str, Any]]:
        """Makes the runs that the journal lacks, and gives the table's lines. Raises as `Prober.run` does."""
        made = {(e["value"], e["repeat"]) for e in self.journal.entries}
        todo = [p for p in self.points if (p.value, p.repeat) not in made]
        for done, point in enumerate(todo):
            self._announce(point, len(todo) - done)
            run, cost_s, _ = self.prober.run({self.option: f"{point.value:.10g}"})
            verdict = run.document["verdict"]
            self.journal.append(
                {"value": point.value, "repeat": point.repeat, "cost_s": cost_s, "run": str(run.folder),
                 "valid": run.valid, "verdict": verdict["headline"], "codes": [r["code"] for r in verdict["reasons"]],
                 "figures": digest(run.summary)}
            )  # fmt: skip
        wanted = {(p.value, p.repeat) for p in self.points}
        return lines([e for e in self.journal.entries if (e["value"], e["repeat"]) in wanted])

    def _announce(self, point: Point, left: int) -> None:
        costs = [e["cost_s"] for e in self.journal.entries]
        time = f", {clock(min(costs) * left)} to {clock(max(costs) * left)} to go" if costs else ""
        text = f"▸ {self.option.replace('_', ' ')} {point.value:g}, repeat {point.repeat}; {left} runs left{time}"
        self.prober.console.print(text, highlight=False, markup=False, soft_wrap=True)


def header(option: str) -> list[str]:
    first = "concurrency" if option == "concurrency" else "rate/s"
    latencies = [f"{label} p50/p99 ms" for _, label in LATENCIES]
    return [first, "QPS", "tokens/s", *latencies, "goodput/s", "good", "verdict"]


def cells(line: dict[str, Any]) -> list[str]:
    """One line of the table as text."""
    latencies = [f"{number(line[f'{n}_p50_ms'])} / {number(line[f'{n}_p99_ms'])}" for n, _ in LATENCIES]
    share = line["goodput_share"]
    verdict = "VALID" if line["valid"] == line["repeats"] else "INVALID: " + ", ".join(line["codes"])
    if 0 < line["valid"] < line["repeats"]:
        verdict = f"VALID {line['valid']} of {line['repeats']}: " + ", ".join(line["codes"])
    return [f"{line['value']:g}", number(line["qps"]), number(line["tokens_per_s"]), *latencies,
            number(line["goodput_qps"]), "–" if share is None else f"{share:.1%}", verdict]  # fmt: skip


def show(rows: Sequence[dict[str, Any]], option: str, style: str, console: Console) -> None:
    """Prints the table as text, Markdown or JSON."""
    if style == "json":
        print(json.dumps({"option": option, "points": list(rows)}, indent=1), file=console.file)
    elif style == "markdown":
        head = header(option)
        print("| " + " | ".join(head) + " |\n|" + "---:|" * (len(head) - 1) + "---|", file=console.file)
        for row in rows:
            print("| " + " | ".join(cells(row)) + " |", file=console.file)
    else:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in header(option):
            table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=name != "verdict")
        for row in rows:
            table.add_row(*cells(row))
        wide = console if console.is_terminal else Console(file=console.file, width=140, no_color=True)
        wide.print(table)


def number(value: float | None) -> str:
    """Three digits are enough to compare; "–" where there is nothing."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
