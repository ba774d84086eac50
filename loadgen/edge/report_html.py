"""Sealed runs as one self-contained HTML page: verdicts, figures, plots, and how to read them. No request leaves it."""

from __future__ import annotations

import html as escape
import json
from collections.abc import Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from loadgen.edge import report
from loadgen.edge.report_plots import figures
from loadgen.edge.store import Run

STYLE = (Path(__file__).parents[1] / "data" / "report.css").read_text(encoding="utf-8")
SCRIPT = (Path(__file__).parents[1] / "data" / "report.js").read_text(encoding="utf-8")


def html(runs: Sequence[Run]) -> str:
    """The page. Everything that came from outside is escaped, in markup as well as in the figures' JSON."""
    plots = {f"run{i}-{k}": figure for i, run in enumerate(runs) for k, figure in enumerate(figures(run))}
    heads = "".join(f"<h1>{esc(line)}</h1>" for line in dict.fromkeys(report.subject(r) for r in runs))
    sections = "".join(section(i, run, plots) for i, run in enumerate(runs))
    data = json.dumps(plots, allow_nan=False).replace("<", "\\u003c")  # a string could hold </script>
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Tritonmark: {esc(report.subject(runs[0]) if runs else "no runs")}</title><style>{STYLE}</style></head>
<body><header>{heads}</header><main>
<section>{"".join(banner(r) for r in runs)}</section>
<section class="scroll">{table(runs)}</section>
{sections}
<section>{reading()}</section>
</main><footer>Written by Tritonmark {esc(version(runs))}. Not an MLPerf result.</footer>
<script>{get_plotlyjs()}</script>
<script id="plots" type="application/json">{data}</script><script>{SCRIPT}</script>
</body></html>
"""


def esc(value: object) -> str:
    return escape.escape(str(value))


def version(runs: Sequence[Run]) -> str:
    return str(runs[0].document.get("client", {}).get("versions", {}).get("tritonmark", "")) if runs else ""


def banner(run: Run) -> str:
    """The verdict of one run with its reasons, cautions and what it lacks."""
    kind = "valid" if run.valid else "invalid"
    items = "".join(
        f'<li class="{kind_}"><b>{esc(f["code"])}</b> {esc(f["seen"])} <span>limit {esc(f["limit"])}</span> '
        f"<em>{esc(f['advice'])}</em></li>"
        for kind_, f in report.findings(run)
        if kind_ != "lacking"
    )
    return (
        f'<article class="verdict {kind}"><h2>{esc(report.title(run))}</h2><p>{esc(report.headline(run))}</p>'
        f"{f'<ul>{items}</ul>' if items else ''}</article>"
    )


def table(runs: Sequence[Run]) -> str:
    head = "".join(f"<th>{esc(report.title(r))}</th>" for r in runs)
    body = "".join(
        f'<tr title="{esc(line.help)}"><th>{esc(line.label)}</th>'
        f"{''.join(f'<td>{esc(c)}</td>' for c in line.cells)}</tr>"
        for line in report.lines(runs)
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def section(index: int, run: Run, plots: dict[str, object]) -> str:
    """Plots and fingerprint of one run."""
    own = [name for name in plots if name.startswith(f"run{index}-")]
    places = "".join(f'<div class="plot" id="{name}"></div>' for name in own) or "<p>No request was measured.</p>"
    shown = {k: v for k, v in run.document.items() if k not in ("summary", "verdict", "audit")}
    return (
        f"<section><h2>{esc(report.title(run))} <small>run {esc(run.document['run_id'])}</small></h2>"
        f'<div class="grid">{places}</div><details><summary>Fingerprint, scenario and client audit</summary>'
        f"<pre>{esc(json.dumps(shown | {'audit': run.document['audit']}, indent=1))}</pre></details></section>"
    )


def reading() -> str:
    """The formulas, from the table that computes them."""
    rows = "".join(
        f"<tr><th>{esc(report.BY_NAME[n].label)}</th><td>{esc(report.BY_NAME[n].help)}</td></tr>"
        for n in (*report.LATENCIES, *report.RATES)
    )
    return (
        "<h2>How to read this</h2><p>Latency counts from the moment the schedule wanted a request sent; “from send” "
        "hides what the client and its queue added and is shown for comparison only. Percentiles are MLPerf "
        "LoadGen's, over every scheduled request: a failed one counts as slower than any other.</p>"
        f'<table class="left">{rows}</table>'
    )
