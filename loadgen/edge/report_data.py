"""Sealed runs → the rows of text that every report format prints (`report` as text, `report_html` as a page).

`sections` turns runs into rows of text once, from the labels, units and help of METRICS, and every format prints those
rows; so a number is the same everywhere, and a new metric appears everywhere. Nothing here computes a metric: figures
are read from the sealed summary.

A percentile that lies among failed requests is printed as "failed", a figure that does not exist as "–".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from loadgen.core.metrics import METRICS, Metric, metrics_of, percentile_name
from loadgen.core.record import Outcome, Phase
from loadgen.core.scenario import Kind, Scenario
from loadgen.core.verdict import limited
from loadgen.edge import physics
from loadgen.edge.store import Run

MISSING, FAILED = "–", "failed"
SHOWN = (0.50, 0.90, 0.99)
RATES = ("1/s", "tokens/s", "frames/s", "ratio", "seconds_per_video")  # units, and one name, of what is throughput
SECONDS_FROM_NS = 100e9  # a row whose smallest value is above this is read in seconds
ERROR_TEXTS = 5  # as many different errors are listed
_DISTINCT_ERRORS = 10_000  # texts remembered while counting; an error with a unique id must not fill the memory


@dataclass(frozen=True)
class Row:
    """One line of a report: for each run a tuple of texts (one, or one a percentile) and of 95 % intervals ("" = none).

    `notes` has a text a run to print beside it, such as a limit. Units stand apart, so that percentiles share one.
    """

    label: str
    help: str
    unit: str
    cells: tuple[tuple[str, ...], ...]
    intervals: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def text(self, run: int) -> str:
        """All texts of one run with their unit: "52.6 / 53.6 / 71.5 ms"."""
        cells = self.cells[run]
        return " / ".join(cells) + (self.unit if any(c not in (MISSING, FAILED) for c in cells) else "")

    def cell(self, run: int, column: int) -> str:
        """One text of one run with its unit."""
        text = self.cells[run][column]
        return text if text in (MISSING, FAILED) else text + self.unit


@dataclass(frozen=True)
class Section:
    """Rows under one title. `columns` names the texts of a cell where there are several."""

    title: str
    help: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def sections(runs: Sequence[Run]) -> list[Section]:
    """Everything that a report prints in tables, a column a run, in reading order."""
    shown = tuple(percentile_name(p) for p in sorted({*SHOWN, *(r.scenario.percentile for r in runs)}))
    of_queries = any(r.scenario.samples_per_query > 1 for r in runs)  # elsewhere a query is a request
    known = metrics_of({r.scenario.family for r in runs})
    metrics = [m for m in known if of_queries or m.name not in ("query_ns", "queries")]
    metrics = [m for m in metrics if not m.of_power]
    distributions = [m for m in metrics if m.unit == "ns"]
    rates = [m for m in metrics if (m.unit in RATES or m.name in RATES) and _worth_showing(m, runs)]
    counts = [m for m in metrics if m.unit != "ns" and m.unit not in RATES and m.name not in RATES]
    from_send = [m for m in distributions if m.name.endswith("_sent_ns")]
    from_due = [m for m in distributions if m not in from_send]
    due = "the clock starts when the schedule wanted the request sent: waiting in client or server counts"
    send = "the clock starts when the bytes left: flatters a late client; for comparison only"
    from loadgen.edge.report_telemetry import sections as telemetry  # that file builds on this one

    return [
        Section("Latency from due time", due, shown, tuple(_distribution(m, runs, shown) for m in from_due)),
        Section("Latency from send time", send, shown, tuple(_distribution(m, runs, shown) for m in from_send)),
        Section("Throughput", "over the time from T0 to the last response", (), _values(rates, runs)),
        Section("Requests", "measured rows; warm-up is left out", (), _values(counts, runs)),
        *telemetry(runs),
        Section("Client self-audit", "what the load generator says of itself; worst worker", (), audit_rows(runs)),
    ]


def _worth_showing(metric: Metric, runs: Sequence[Run]) -> bool:
    """LoadGen's own figure is shown where it differs from the honest one."""
    honest = metric.name.removeprefix("loadgen_")
    return honest == metric.name or any(_rate(r, metric.name) != _rate(r, honest) for r in runs)


def _rate(run: Run, name: str) -> str:
    return number(run.summary.get(name), 4)


def _distribution(metric: Metric, runs: Sequence[Run], shown: tuple[str, ...]) -> Row:
    values = [v for r in runs for p in shown if (v := r.summary.get(metric.name, {}).get(p)) is not None]
    unit, scale = (" s", 1e9) if values and min(values) >= SECONDS_FROM_NS else (" ms", 1e6)
    cells, intervals, notes = [], [], []
    for run in runs:
        seen = run.summary.get(metric.name, {})
        cells.append(tuple(_latency(seen, p, scale) for p in shown))
        known = (run.summary.get("intervals") or {}).get(metric.name) or {}
        intervals.append(tuple(_interval(known.get(p), scale, 3) for p in shown))
        limit = dict(limited(run.scenario.limits)).get(metric.name)
        at = percentile_name(run.scenario.percentile)
        notes.append(f"{at} ≤ {number(limit / scale)}{unit}" if limit is not None else "")
    return Row(metric.label, metric.help, unit, tuple(cells), tuple(intervals), tuple(notes))


def _latency(seen: dict[str, Any], name: str, scale: float) -> str:
    if name not in seen:
        return MISSING
    return FAILED if seen[name] is None else number(seen[name] / scale)


def _values(metrics: Sequence[Metric], runs: Sequence[Run]) -> tuple[Row, ...]:
    return tuple(value_row(m, runs) for m in metrics)


def value_row(metric: Metric, runs: Sequence[Run]) -> Row:
    """The line of a metric that is one number for a run."""
    unit = {"1/s": " /s", "ratio": " %", "s": " s", "J": " J", "W": " W"}.get(metric.unit, "")
    cells, intervals = [], []
    for run in runs:
        value = run.summary.get(metric.name)
        pointless = metric.name.startswith("goodput") and not limited(run.scenario.limits)
        text = MISSING if pointless else number(value * 100 if unit == " %" and value is not None else value, 4)
        if metric.name == "failed" and value:
            text += f" ({outcomes(run)})"
        cells.append((text,))
        known = (run.summary.get("intervals") or {}).get(metric.name)
        intervals.append((_interval(known, 1.0, 4),))
    return Row(metric.label, metric.help, unit, tuple(cells), tuple(intervals))


def _interval(pair: list[float | None] | None, scale: float, digits: int) -> str:
    if not pair:
        return ""
    low, high = (None if x is None else x / scale for x in pair)
    return f"{number(low, digits)} to {'∞' if high is None else number(high, digits)}"


def outcomes(run: Run) -> str:
    """Failed requests by outcome: "2 error, 1 timeout"."""
    counts = run.summary["outcomes"]
    return ", ".join(f"{counts[o.value]:,} {o.value}" for o in Outcome if o is not Outcome.OK and counts.get(o.value))


def audit_rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    """The client's account of itself; of several workers the worst, as the verdict takes it."""
    audits = [r.document["audit"] for r in runs]

    def worst(name: str, scale: float = 1e6) -> Callable[[dict[str, Any]], str]:
        return lambda a: number(max((w[name] / scale for w in a["workers"]), default=None))

    def line(label: str, help_: str, unit: str, *texts: Callable[[dict[str, Any]], str]) -> Row:
        return Row(label, help_, unit, tuple(tuple(f(a) for f in texts) for a in audits))

    lateness = line("dispatch lateness p50/p99/max", "how late a request with a due time was handed to the client",
                    " ms", *(worst(f"lateness_{p}_ns") for p in ("p50", "p99", "max")))  # fmt: skip
    scheduled = tuple(
        c if r.scenario.kind is Kind.SERVER else (MISSING,) for r, c in zip(runs, lateness.cells, strict=True)
    )
    return (
        Row(lateness.label, lateness.help, lateness.unit, scheduled),
        line("loop lag p50/p99/max", "how late the event loop wakes: arrivals can be stamped late by as much", " ms",
             *(worst(f"loop_lag_{p}_ns") for p in ("p50", "p99", "max"))),
        line("CPU of the busiest worker", "share of one core", " %", worst("cpu_share", 0.01)),
        line("ceiling", "rate at which the busiest worker would need a whole core, times the workers", " /s",
             lambda a: number(a.get("client_ceiling_qps"))),
        line("rate requested/scheduled/sent", "asked for; what the seeded schedule came to; what was sent", " /s",
             *(lambda a, k=k: number(a.get(k), 4) for k in ("requested_qps", "scheduled_qps", "achieved_qps"))),
        Row("shed", "requests never sent, because the in-flight cap was reached", "",
            tuple((number(r.summary["outcomes"].get("shed", 0)),) for r in runs)),
    )  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits; whole numbers, and the digits before the point, are kept: 0.0526, 52.6, 1,333."""
    if value is None:
        return MISSING
    if isinstance(value, int) or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return f"{float(text):.{max(digits - 1 - _exponent(float(text)), 0)}f}" if value else "0"


def _exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])


def accuracy(run: Run) -> list[str]:
    """How far the answers equal the reference, and their ROUGE, a line each; none for a run without references."""
    seen, lines = run.summary.get("accuracy") or {}, []
    if "token_agreement" in seen:
        equal, share = f"{seen['equal']} of {seen['samples']}", seen["token_agreement"]
        lines.append(f"accuracy: {equal} answers equal the reference; token agreement {share * 100:.4g} %")
    if scores := seen.get("rouge"):
        names = (("1", "rouge1"), ("2", "rouge2"), ("L", "rougeL"), ("Lsum", "rougeLsum"))
        shown = ", ".join(f"{label} {scores[key] * 100:.2f}" for label, key in names if key in scores)
        of = f" over {scores['samples']:,} answers" if "samples" in scores else ""
        lines.append(f"accuracy: ROUGE {shown}{of}")
    return lines


def facts(run: Run) -> dict[str, str]:
    """What was run on what, in short words. Facts that runs share go into a title, others into the columns."""
    document, scenario = run.document, run.scenario
    weights = document.get("weights", "unknown")
    server = document.get("server") or {}
    return {
        "model": str(document.get("model", "unknown model")),
        "backend": f"{document.get('backend', 'unknown')} {document.get('precision', '')}".strip(),
        "weights": "SYNTHETIC weights" if weights == "synthetic" else f"{weights} weights",
        "hardware": str((document.get("hardware") or {}).get("label", "unknown hardware")),
        "server": f"{server.get('name', '')} {server.get('version', '')}".strip() or "unknown server",
        "preset": f"preset {scenario.preset}",
        "scenario": scenario.name.replace("_", " "),
        "load": load(scenario),
        "limits": limits(run),
        "run": str(document.get("run_id", run.folder.name)),
    }


def load(scenario: Scenario) -> str:
    """What a scenario puts on the server, by its kind: a rate is the load of Server alone, elsewhere an expectation."""
    if scenario.kind is Kind.SERVER:
        return f"{scenario.target_qps:g} /s {scenario.arrivals}"
    if scenario.kind is Kind.OFFLINE:
        return "all due at once"
    at_once = {Kind.CONCURRENCY: scenario.concurrency, Kind.MULTI_STREAM: scenario.samples_per_query}
    return f"{at_once.get(scenario.kind, 1)} in flight"


def limits(run: Run) -> str:
    """The latency limits in force: "p99 TTFT ≤ 2000 TPOT ≤ 100 ms"."""
    texts = [f"{name.removesuffix('_ns').upper()} ≤ {ns / 1e6:g}" for name, ns in limited(run.scenario.limits)]
    return f"{percentile_name(run.scenario.percentile)} {' '.join(texts)} ms" if texts else "no latency limit"


def shared(runs: Sequence[Run]) -> tuple[str, list[tuple[str, list[str]]]]:
    """The title (facts that all runs share) and the facts that differ, each with a text a run."""
    every = [facts(r) for r in runs]
    if len(runs) == 1:
        del every[0]["limits"]  # they stand in the table
    same = [name for name in every[0] if len({f[name] for f in every}) == 1]
    return " · ".join(every[0][n] for n in same), [(n, [f[n] for f in every]) for n in every[0] if n not in same]


def servers(run: Run) -> list[str]:
    """What each server of a run over several did, a line each."""
    return [
        f"server {where['url']}: {seen['requests']:,} requests, {seen['failed']:,} failed; p50 / p99 TTFT "
        f"{_latency(seen['ttft_ns'], 'p50', 1e6)} / {_latency(seen['ttft_ns'], 'p99', 1e6)} ms, "
        f"E2E {_latency(seen['e2e_ns'], 'p50', 1e6)} / {_latency(seen['e2e_ns'], 'p99', 1e6)} ms"
        for where, seen in zip(run.document.get("servers", []), run.summary.get("servers", []), strict=True)
    ]


def errors(run: Run) -> list[tuple[str, int]]:
    """The most frequent error texts of measured rows with their counts; the last entry sums up what is not listed."""
    if not run.summary["failed"]:
        return []
    counts: Counter[str] = Counter()
    rest = 0
    file = pq.ParquetFile(run.folder / "records.parquet")
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["phase", "outcome", "error"])
        failed = pc.and_(pc.equal(table["phase"], Phase.MEASURE.value), pc.not_equal(table["outcome"], "ok"))
        for entry in pc.value_counts(table.filter(failed)["error"]).to_pylist():
            text = (entry["values"] or "no text")[:300]
            if text in counts or len(counts) < _DISTINCT_ERRORS:
                counts[text] += entry["counts"]
            else:
                rest += entry["counts"]
    listed = counts.most_common(ERROR_TEXTS)
    rest += counts.total() - sum(n for _, n in listed)
    return [*listed, ("other errors", rest)] if rest else listed


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """The sealed documents, and beside each what a report derives from them: folder, headline facts, errors."""
    return {
        "schema": 1,
        "valid": all(r.valid for r in runs),
        "metrics": [{"name": m.name, "label": m.label, "unit": m.unit, "better": m.better, "help": m.help}
                    for m in METRICS],
        "runs": [
            {"folder": str(r.folder), "facts": facts(r), "document": r.document, "roofline": physics.as_json(r),
             "errors": [{"error": text, "count": count} for text, count in errors(r)]}
            for r in runs
        ],
    }  # fmt: skip
