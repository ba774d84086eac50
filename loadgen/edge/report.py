"""Sealed runs → text, Markdown and JSON. The HTML page is made in `report_html.py` from the same tables.

Everything shown is in `run.json`; labels, units and meanings come from `METRICS`. A percentile that lies among failed
requests is shown as "failed", a figure that does not exist as "–".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadgen.core.metrics import METRICS, Metric
from loadgen.core.scenario import Kind
from loadgen.edge.store import Run

PERCENTILES = ("p50", "p90", "p99")
BY_NAME = {m.name: m for m in METRICS}
LATENCIES = ("ttft_ns", "tpot_ns", "itl_ns", "e2e_ns", "query_ns", "ttft_sent_ns", "e2e_sent_ns")
RATES = ("tokens_per_s", "loadgen_tokens_per_s", "qps", "loadgen_qps", "goodput_qps", "goodput_share")
COUNTS = ("scheduled", "completed", "failed", "tokens_out", "tokens_per_response", "peak_in_flight", "duration_s")
FROM_SEND = ("ttft_sent_ns", "e2e_sent_ns")


@dataclass(frozen=True)
class Line:
    """One line of the table: label, help, and a cell for each run."""

    label: str
    help: str
    cells: list[str]


def shown(name: str, runs: Sequence[Run]) -> bool:
    """MultiStream's query latency only where there is a MultiStream; LoadGen's window only where it differs."""
    if name == "query_ns":
        return any(r.scenario.kind is Kind.MULTI_STREAM for r in runs)
    if name.startswith("loadgen_"):
        return any(r.scenario.kind is Kind.SERVER for r in runs)
    return True


def lines(runs: Sequence[Run]) -> list[Line]:
    """The whole table, a cell per run: latencies at p50/p90/p99, rates, counts and the client's audit."""
    out = []
    for name in (n for n in LATENCIES if shown(n, runs)):
        metric = BY_NAME[name]
        start = "" if name in (*FROM_SEND, "tpot_ns", "itl_ns") else " from due"
        label = f"{metric.label}{start} {'/'.join(PERCENTILES)}"
        out.append(Line(label, metric.help, [latency(r.summary[name]) for r in runs]))
    for name in (n for n in (*RATES, *COUNTS) if shown(n, runs)):
        metric = BY_NAME[name]
        out.append(Line(metric.label, metric.help, [scalar(metric, r.summary[name]) for r in runs]))
    out.append(Line("client: lateness p50/p99/max", "dispatch − due, of the worst worker", [late(r) for r in runs]))
    out.append(Line("client: CPU, ceiling", "share of a core of the busiest worker; rate at which it needs all of it",
                    [busy(r) for r in runs]))  # fmt: skip
    return out


def latency(values: dict[str, Any]) -> str:
    """ "12.1 / 15.0 / 20.3 ms" """
    if not values["count"] and not values["failed"]:
        return "–"
    return " / ".join(ms(values.get(p)) for p in PERCENTILES) + " ms"


def ms(ns: float | None) -> str:
    """Nanoseconds as milliseconds, three digits; None, an infinite percentile, as "failed"."""
    if ns is None:
        return "failed"
    value = ns / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def scalar(metric: Metric, value: float | None) -> str:
    if value is None:
        return "–"
    if metric.unit == "ratio":
        return f"{value:.1%}"
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{number} {metric.unit}" if metric.unit in ("s", "1/s", "tokens/s") else number


def late(run: Run) -> str:
    workers = run.document["audit"]["workers"]
    if not workers or run.scenario.kind is not Kind.SERVER:
        return "–"
    return " / ".join(ms(max(w[f"lateness_{p}_ns"] for w in workers)) for p in ("p50", "p99", "max")) + " ms"


def busy(run: Run) -> str:
    audit = run.document["audit"]
    if not audit["workers"]:
        return "–"
    ceiling = audit["client_ceiling_qps"]
    return f"{max(w['cpu_share'] for w in audit['workers']):.0%}, {f'{ceiling:,.0f}/s' if ceiling else '–'}"


def title(run: Run) -> str:
    """Scenario with its rate, for the head of a column."""
    scenario = run.scenario
    rate = f" {scenario.target_qps:g}/s" if scenario.kind is Kind.SERVER else ""
    rate = f" {scenario.concurrency}" if scenario.kind is Kind.CONCURRENCY else rate
    return f"{scenario.name}{rate}"


def subject(run: Run) -> str:
    """What was measured, on what; synthetic weights are always said."""
    d = run.document
    weights = ", SYNTHETIC weights" if d["weights"] == "synthetic" else ""
    return f"{d['model']}, {d['backend']} {d['precision']}{weights}, on {d['hardware']['label']}"


def findings(run: Run) -> Iterable[tuple[str, dict[str, str]]]:
    """("reason" | "caution" | "lacking", finding) in the order of weight."""
    verdict = run.document["verdict"]
    for kind, key in (("reason", "reasons"), ("caution", "cautions"), ("lacking", "lacking")):
        for finding in verdict.get(key, []):
            yield kind, finding


def text(runs: Sequence[Run], console: Console | None = None) -> None:
    """Prints the table and the verdicts: one column a run."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, 110), no_color=True)
    for line in dict.fromkeys(subject(r) for r in runs):
        console.print(Text(line, style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column(title(run), justify="right", no_wrap=True)
    for line in lines(runs):
        table.add_row(line.label, *line.cells)
    console.print(table)
    for run in runs:
        console.print(Text.assemble((f"{title(run)}: ", "bold"), (headline(run), "green" if run.valid else "red")))
        for kind, finding in findings(run):
            if kind != "lacking":
                seen = f"  {finding['code']}: {finding['seen']} (limit {finding['limit']}). {finding['advice']}."
                console.print(Text(seen, style="" if kind == "reason" else "yellow"))


def headline(run: Run) -> str:
    return str(run.document["verdict"]["headline"])


def markdown(runs: Sequence[Run]) -> str:
    """GitHub tables and lists."""
    out = [f"**{cell(line)}**" for line in dict.fromkeys(subject(r) for r in runs)]
    out += ["", "| | " + " | ".join(cell(title(r)) for r in runs) + " |", "|---|" + "---:|" * len(runs)]
    out += [f"| {cell(line.label)} | " + " | ".join(cell(c) for c in line.cells) + " |" for line in lines(runs)]
    out.append("")
    for run in runs:
        out.append(f"- **{cell(title(run))}**: {cell(headline(run))} (run `{run.document['run_id']}`)")
        out += [f"  - {kind} `{f['code']}`: {cell(f['seen'])}; limit {cell(f['limit'])}; {cell(f['advice'])}"
                for kind, f in findings(run)]  # fmt: skip
    return "\n".join(out) + "\n"


def cell(value: str) -> str:
    """Text that cannot break a Markdown table or bring markup of its own."""
    return value.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """The sealed documents, with their folders."""
    return {"runs": [{"folder": str(r.folder), **r.document} for r in runs]}
