"""Sealed runs → one HTML file that needs nothing else: no server, no network, no other file.

Everything a user or a server could have written (names, labels, error texts) is escaped. Behind that stands the page's
Content-Security-Policy: it allows no connection, and only the scripts whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from loadgen.core.metrics import METRICS, metrics_of
from loadgen.edge import physics, report_data, report_telemetry
from loadgen.edge.about import tool_version
from loadgen.edge.report_data import FAILED, Row, Section
from loadgen.edge.report_plots import COLOURS, distributions, over_time
from loadgen.edge.report_series import series
from loadgen.edge.report_video import clips_section
from loadgen.edge.store import Run

KEY_FIGURES = ("ttft_ns", "tpot_ns", "step_ns", "e2e_ns", "tokens_per_s", "frames_per_s", "seconds_per_video",
               "goodput_qps", "tokens_per_joule", "failed")  # fmt: skip
WHY = (("reasons", "Why it is INVALID"), ("cautions", "Cautions"))
ROOFLINE = "Roofline <small>what the hardware would allow</small>"
LACKING = (("lacking", "Lacking for MLPerf length"),)


def html(runs: Sequence[Run]) -> str:
    """The page. Memory: 37 bytes a row of the longest run; about 5 MB of text, most of it plotly.js."""
    found = [series(r) for r in runs]
    figures = {"distributions": distributions(runs, found)}
    figures |= {f"time{i}": over_time(r, i, s) for i, (r, s) in enumerate(zip(runs, found, strict=True))}
    figures |= {f"power{i}": report_telemetry.panel(r, i, s.end_s)
                for i, (r, s) in enumerate(zip(runs, found, strict=True)) if report_telemetry.has_panel(r)}  # fmt: skip
    title = report_data.shared(runs)[0]
    over_time_sections = [_run_section(r, i, s.by) + report_telemetry.section(r, i)
                          for i, (r, s) in enumerate(zip(runs, found, strict=True))]  # fmt: skip
    plots_and_table = [_distribution_section(runs), _table(runs), *over_time_sections]
    if len(runs) == 1:  # its table is long and its key figures stand above, so plots come first
        plots_and_table = [plots_and_table[0], *over_time_sections, plots_and_table[1]]
    body = [
        _header(runs),
        _key_figures(runs),
        _findings(runs, WHY),
        *(clips_section(r, f"{_name(r, runs)}: " if len(runs) > 1 else "") for r in runs),
        *plots_and_table,
        _listed(runs, "Servers", report_data.servers),
        _listed(runs, ROOFLINE, physics.lines),
        _findings(runs, LACKING),
        _how_to_read({r.scenario.family for r in runs}),
        _footer(runs),
    ]
    return page(title, body, figures)


def page(title: str, body: Sequence[str], figures: dict[str, Any]) -> str:
    """A self-contained page of escaped HTML parts, and of figures (by element id) that report.js draws."""
    scripts = [_plotly(), _asset("report.js")]
    data = f'<script type="application/json" id="figures">{_json(figures)}</script>'
    return "\n".join([
        "<!doctype html>", '<html lang="en">', '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)} – Tritonmark</title>", f"<style>{_asset('report.css')}</style>",
        *body, data, *(f"<script>{s}</script>" for s in scripts), "</html>", "",
    ])  # fmt: skip


def _asset(name: str) -> str:
    return (importlib.resources.files("loadgen") / "data" / "report" / name).read_text("utf-8")


def _plotly() -> str:
    """plotly.js as the plotly package carries it; importing the package would cost a second."""
    return (importlib.resources.files("plotly") / "package_data" / "plotly.min.js").read_text("utf-8")


def _policy(scripts: list[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    return ("default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src "
            + " ".join(f"'sha256-{h}'" for h in hashes))  # fmt: skip


def _json(value: Any) -> str:
    """JSON that cannot end its script element, whatever is in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _header(runs: Sequence[Run]) -> str:
    title = escape(report_data.shared(runs)[0])
    if any(r.document.get("weights") == "synthetic" for r in runs):
        title = title.replace("SYNTHETIC weights", '<span class="weights">SYNTHETIC weights</span>')
    if len(runs) == 1:
        head = _headline(runs[0])
        return f'<header><p class="soft">{title}</p><h1>{head}</h1></header>'
    count = sum(r.valid for r in runs)
    verdicts = []
    for i, run in enumerate(runs):
        state = "valid" if run.valid else "invalid"
        name = f'<i style="background:var(--c{i % COLOURS})"></i><a href="#run{i}">{_name(run, runs)}</a>'
        verdicts.append(f'<div class="verdict is-{state}">{name}: {_headline(run)}</div>')
    return (f'<header><p class="soft">{title}</p><h1>{count} of {len(runs)} runs VALID</h1>'
            f'<div class="verdicts">{"".join(verdicts)}</div></header>')  # fmt: skip


def _headline(run: Run) -> str:
    word, rest = run.document["verdict"]["headline"].partition(" ")[::2]
    more = "".join(f"; {escape(line)}" for line in report_data.accuracy(run))
    return f'<span class="{"valid" if run.valid else "invalid"}">{escape(word)}</span> {escape(rest)}{more}'


def _name(run: Run, runs: Sequence[Run]) -> str:
    """The scenario, and what else differs where scenarios repeat."""
    differing = [n for n, texts in report_data.shared(runs)[1] if n not in ("load", "limits", "run", "preset")]
    return escape(" · ".join(report_data.facts(run)[n] for n in differing) or report_data.facts(run)["scenario"])


def _key_figures(runs: Sequence[Run]) -> str:
    """The few numbers of a single run that one looks for first, large."""
    if len(runs) > 1:
        return ""
    rows = {row.label: row for section in report_data.sections(runs) for row in section.rows}
    cards = []
    for metric in (m for m in METRICS if m.name in KEY_FIGURES and m.label in rows):
        row = rows[metric.label]
        at = len(row.cells[0]) - 1
        percentile = f"{report_data.sections(runs)[0].columns[at]} " if at else ""
        note = f", limit {row.notes[0].partition('≤ ')[2]}" if row.notes and row.notes[0] else ""
        value = row.cells[0][0].split(" ")[0] if metric.name == "failed" else row.cell(0, at)
        cards.append(f'<div title="{escape(metric.help)}"><b>{escape(value)}</b>'
                     f"<span>{percentile}{escape(metric.label + note)}</span></div>")  # fmt: skip
    return f'<div class="key">{"".join(cards)}</div>'


def _distribution_section(runs: Sequence[Run]) -> str:
    failed = sum(r.summary["failed"] for r in runs)
    stops = " A curve stops below 100 % by the share that failed." if failed else ""
    return ("<h2>Latency distributions <small>share of all requests that were at least as fast; solid from due time, "
            f"dashed from send time.{stops}</small></h2>"
            '<div class="plot distributions" id="distributions"></div>')  # fmt: skip


def _table(runs: Sequence[Run]) -> str:
    out = ['<h2>Figures <small>small print: 95 % interval</small></h2><div class="wide"><table>']
    if len(runs) > 1:
        for name, texts in report_data.shared(runs)[1]:
            out.append(f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{escape(t)}</td>" for t in texts) + "</tr>")
    found = report_data.sections(runs)
    out += [_table_section(s, len(runs), len(found[0].columns) if len(runs) == 1 else len(runs)) for s in found]
    return "".join([*out, "</table></div>"])


def _table_section(section: Section, runs: int, percentiles: int) -> str:
    one = runs == 1
    limits = any(n for r in section.rows for n in r.notes)
    head = section.columns if one else (" / ".join(section.columns),) * runs
    head = head or ("",) * percentiles  # an empty cell too carries its part of the line
    cells = "".join(f"<th>{escape(c)}</th>" for c in (*head, *(["limit" if limits else ""] if one else [])))
    out = [f'<tr class="head"><th title="{escape(section.help)}">{escape(section.title)}</th>{cells}</tr>']
    for row in section.rows:
        out.append(f'<tr><td title="{escape(row.help)}">{escape(row.label)}</td>')
        out.append(_one_run(row, limits) if one else "".join(_run_cell(row, i) for i in range(runs)))
        out.append("</tr>")
    return "".join(out)


def _one_run(row: Row, limits: bool) -> str:
    intervals = row.intervals[0] if row.intervals else ("",) * len(row.cells[0])
    cells = [_cell(row.cell(0, i), intervals[i]) for i in range(len(row.cells[0]))]
    return "".join([*cells, f"<td><small>{escape(row.notes[0])}</small></td>" if limits and row.notes else ""])


def _run_cell(row: Row, run: int) -> str:
    interval = row.intervals[run][-1] if row.intervals else ""
    last = f"{'p99 ' if len(row.cells[run]) > 1 else ''}{interval}" if interval else ""
    return _cell(row.text(run), last)


def _cell(text: str, interval: str) -> str:
    small = f"<br><small>{escape(interval)}</small>" if interval else ""
    kind = ' class="failed"' if FAILED in text else ""
    return f"<td{kind}>{escape(text)}{small}</td>"


def _run_section(run: Run, index: int, by: str) -> str:
    name = escape(report_data.facts(run)["scenario"])
    return (f'<section id="run{index}"><h2>{name} over time <small>latency by {by}; tokens as they arrived; drag to '
            f'zoom, double-click to go back</small></h2><div class="plot time" id="time{index}"></div>'
            "</section>")  # fmt: skip


def _findings(runs: Sequence[Run], kinds: tuple[tuple[str, str], ...]) -> str:
    """Reasons with their error texts and cautions (before any figure), or what is lacking (after them)."""
    out = []
    for run in runs:
        name = f"{escape(report_data.facts(run)['scenario'])}: " if len(runs) > 1 else ""
        verdict = run.document["verdict"]
        for key, title in kinds:
            if verdict.get(key):
                out.append(_remarks(name + title, verdict[key]))
            if key == "reasons" and (errors := report_data.errors(run)):
                rows = (f"<tr><td>{n:,} ×</td><td><code>{escape(text)}</code></td></tr>" for text, n in errors)
                out.append(f'<h2>{name}Errors</h2><table class="reasons">{"".join(rows)}</table>')
    return "".join(out)


def _remarks(title: str, reasons: list[dict[str, Any]]) -> str:
    rows = ("".join(f"<td>{escape(str(r[k]))}</td>" for k in ("code", "seen", "limit", "advice")) for r in reasons)
    return (f'<h2>{title}</h2><table class="reasons"><tr><th>code</th><th>seen</th><th>needs</th><th>what to do</th>'
            f"</tr>{''.join(f'<tr>{r}</tr>' for r in rows)}</table>")  # fmt: skip


def _listed(runs: Sequence[Run], title: str, lines: Callable[[Run], list[str]]) -> str:
    """Lines of each run under a title; nothing where there are none."""
    several = len(runs) > 1
    found = [(f"{_name(r, runs)}: " if several else "") + escape(line) for r in runs for line in lines(r)]
    items = "".join(f"<p>{line}</p>" for line in found)
    return f"<h2>{title}</h2>{items}" if found else ""


def _how_to_read(families: set[str]) -> str:
    """The formulas, from the table that computes them."""
    terms = "".join(f"<dt>{escape(m.label)}</dt><dd>{escape(m.help)}</dd>" for m in metrics_of(families))
    return (
        "<h2>How to read this</h2><p>Percentiles are LoadGen's, <code>sorted[floor(n · p)]</code> without "
        "interpolation, over every measured request; a failed request counts as slower than any that completed, and a "
        "percentile that lies among them reads “failed”. Latency counts from the time a request was <em>due</em>; "
        "“from send” hides what a late client or a queue before it added, and is there for comparison. Tokens are "
        f"counted by the server. INVALID means: do not quote these numbers.</p><dl>{terms}</dl>"
    )


def _footer(runs: Sequence[Run]) -> str:
    out = ["<footer><h2>Provenance</h2>"]
    for run in runs:
        records = run.document["records"]
        facts = {"run": run.document.get("run_id"), "started": run.document.get("started_utc"),
                 "rows": records["rows"], "sha256 of records.parquet": records["sha256"],
                 "seeds": run.document["scenario"]["seeds"], "hardware": run.document.get("hardware"),
                 "server": run.document.get("server"), "client": run.document.get("client"),
                 "scenario as resolved": run.document["scenario"]}  # fmt: skip
        terms = "".join(f"<dt>{escape(k)}</dt><dd>{escape(_flat(v))}</dd>" for k, v in facts.items())
        sealed = escape(json.dumps(run.document, indent=1, ensure_ascii=False))
        out.append(f"<dl>{terms}</dl><details><summary>run.json as sealed</summary><pre>{sealed}</pre></details>")
    return "".join(
        [
            *out,
            f'<p class="soft">Tritonmark {escape(tool_version())}; this file is complete in itself</p></footer>',
        ]
    )


def _flat(value: Any) -> str:
    """A nested document on one line: "kind Server, limits (ttft_ns 2000000000)"."""
    if isinstance(value, dict):
        return ", ".join(f"{k} ({_flat(v)})" if isinstance(v, dict) else f"{k} {_flat(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "; ".join(_flat(v) for v in value) or "none"
    return "–" if value is None else str(value)
