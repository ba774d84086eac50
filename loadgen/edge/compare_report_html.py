"""A comparison → one HTML file that needs nothing else, in the dress of a run's report; every figure names its runs.

Everything from outside is escaped, and the page's policy allows no connection and no script but its own.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

from loadgen.edge.about import tool_version
from loadgen.edge.compare_report import Comparison, document
from loadgen.edge.compare_report_plots import curves, heat_map, rooflines, slopes
from loadgen.edge.compare_text import Block, blocks
from loadgen.edge.fingerprint import model_of
from loadgen.edge.report_html import page

HEIGHT = "height:{}px"


def html(c: Comparison) -> str:
    """The page: headline, grids with heat map and slopes, curves, roofline, all tables, caveats, provenance."""
    figures: dict[str, Any] = {}
    body = [_header(c)]
    for i, view in enumerate(c.views):
        if len(view.grid.hardware) * len(view.grid.backends) > 1:
            body.append(_plot(f"heat{i}", f"{view.title}: gain over {view.baseline[1]} on {view.baseline[0]}",
                              "whole gain with its 95 % interval; an empty field was not measured",
                              90 + 62 * len(view.grid.hardware)))  # fmt: skip
            figures[f"heat{i}"] = heat_map(view)
        if len(view.grid.hardware) > 1:
            several = len(view.grid.backends) > 1
            note = "lines that run parallel: the compiler gain is the same on both" if several else ""
            body.append(_plot(f"slope{i}", f"{view.title} by generation", note, 320))
            figures[f"slope{i}"] = slopes(view)
    for i, model in enumerate(dict.fromkeys(model_of(r) for r in c.runs)):
        if found := curves(c, model):
            note = "each point is a run; limits in red"
            body.append(_plot(f"curve{i}", f"{model}: throughput and latency", note, 340))
            figures[f"curve{i}"] = found
    if roof := rooflines(c.runs):
        note = "lines: what each GPU allows; circles: decode, diamonds: other work"
        body.append(_plot("roofline", "Roofline", note, 380))
        figures["roofline"] = roof
    body += [_block(b) for b in blocks(c)]
    body += [_caveats(c), _footer(c)]
    return page("Comparison", body, figures)


def _header(c: Comparison) -> str:
    marks = "".join(f'<div class="verdict is-invalid">{escape(m)}</div>' for m in c.marks)
    synthetic = any(r.document.get("weights") == "synthetic" for r in c.runs)
    warn = ' · <span class="weights">SYNTHETIC weights</span>' if synthetic else ""
    count = f"{len(c.runs)} sealed runs, {sum(r.valid for r in c.runs)} VALID"
    return (f'<header><p class="soft">{count}{warn}</p><h1>{escape(c.headline)}</h1>'
            f'<div class="verdicts">{marks}</div></header>')  # fmt: skip


def _plot(id_: str, title: str, note: str, height: int) -> str:
    return (f"<h2>{escape(title)} <small>{escape(note)}</small></h2>"
            f'<div class="plot" id="{id_}" style="{HEIGHT.format(height)}"></div>')  # fmt: skip


def _block(b: Block) -> str:
    ids = {i for i, name in enumerate(b.head) if name == "run"}
    anchor = b.title == "Runs"
    head = "".join(f"<th>{escape(h)}</th>" for h in b.head)
    rows = []
    for row in b.rows:
        cells = [_cell(x, i in ids, anchor) for i, x in enumerate(row)]
        rows.append("<tr>" + "".join(cells) + "</tr>")
    note = f" <small>{escape(b.note)}</small>" if b.note else ""
    return (f'<h2>{escape(b.title)}{note}</h2><div class="wide"><table class="reasons"><tr>{head}</tr>'
            f"{''.join(rows)}</table></div>")  # fmt: skip


def _cell(text: str, run: bool, anchor: bool) -> str:
    if run and anchor:
        return f'<td id="run-{escape(text)}"><code>{escape(text)}</code></td>'
    if run:
        return f'<td><a href="#run-{escape(text)}"><code>{escape(text)}</code></a></td>'
    return f"<td>{escape(text)}</td>"


def _caveats(c: Comparison) -> str:
    items = "".join(f"<p>{escape(n)}.</p>" for n in c.notes)
    return (
        f"<h2>Validity and caveats</h2>{items}<p>A gain is above 1 where a run is better than the baseline. Intervals "
        "are 95 %, from the scatter between repeats where there are any, else from blocks of requests inside each run. "
        "A gain whose interval spans 1 is called not separable. The whole gain is the product of hardware, compiler "
        "and what only both give together, exactly, since all are ratios of the same cells.</p>"
    )


def _footer(c: Comparison) -> str:
    sealed = escape(json.dumps(document(c), indent=1, ensure_ascii=False))
    tool = escape(tool_version())
    return ("<footer><h2>Provenance</h2><details><summary>the comparison as JSON</summary>"
            f'<pre>{sealed}</pre></details><p class="soft">Tritonmark {tool}; this file is complete in itself</p>'
            "</footer>")  # fmt: skip
