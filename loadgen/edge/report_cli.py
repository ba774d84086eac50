"""`tritonmark report RUN…`: what sealed runs say, as text, Markdown, JSON or one HTML page."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import click
from rich.console import Console

from loadgen.edge import report as reports
from loadgen.edge import report_html
from loadgen.edge.errors import UserError
from loadgen.edge.store import load
from loadgen.edge.text_file import write


@click.command()
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "kind", default="text", show_default=True,
              type=click.Choice(["text", "markdown", "json", "html"]))  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), help="write here  [default: report.html beside the run; else stdout]"
)
@click.option("--last", type=click.IntRange(min=1), help="only the newest N runs")
def report(paths: tuple[Path, ...], kind: str, out: Path | None, last: int | None) -> None:
    """Show RUNs: folders of sealed runs, or folders above them.

    A run that was cut off is sealed first, as INVALID. Exit code: 0 if all are VALID, else 3.
    """
    runs = [load(folder) for folder in find(paths)[:last]]
    if kind == "text":
        body = io.StringIO()
        reports.text(runs, Console(file=body) if out else None)
        write(out, body.getvalue()) if out else None
    elif kind == "html":
        page = out or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
        write(page, report_html.html(runs))
        click.echo(page)
    else:
        text = json.dumps(reports.as_json(runs), indent=1) if kind == "json" else reports.markdown(runs)
        write(out, text) if out else click.echo(text)
    sys.exit(0 if all(r.valid for r in runs) else 3)


def find(paths: tuple[Path, ...]) -> list[Path]:
    """The folders of runs at or below `paths`, newest first (a run id begins with its time).

    Raises UserError for a path without any.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        found = [path] if is_run(path) else sorted({p.parent for p in path.rglob("*.json") if is_run(p.parent)})
        if not found:
            raise UserError(f"{path} holds no run; give a folder that `tritonmark run` made, or one above it")
        folders |= dict.fromkeys(found)
    return sorted(folders, key=lambda f: f.name, reverse=True)


def is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / "start.json").is_file()
