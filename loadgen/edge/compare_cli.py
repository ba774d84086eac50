"""`tritonmark compare RUN…` and `tritonmark gpus`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import click
from rich.console import Console

from loadgen.edge import compare_report, compare_report_html, compare_text, hardware_catalogue
from loadgen.edge.compare import load_runs, tables
from loadgen.edge.errors import UserError
from loadgen.edge.import_mlperf import medians, read
from loadgen.edge.report_cli import find
from loadgen.edge.text_file import write


@click.command()
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--baseline", help="words of a cell's label, or a run's id or folder  [default: oldest GPU, no compiler]")
@click.option("--format", "kind", default="text", show_default=True,
              type=click.Choice(["text", "markdown", "json", "html"]))  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="write here  [default: comparison.html; else stdout]")
@click.option("--allow-unlike", is_flag=True, help="compare runs that differ in more, and mark the output")
@click.option("--allow-invalid", is_flag=True, help="compare INVALID runs too, and mark the output")
@click.option("--prices", type=click.Path(path_type=Path), help="TOML with your price per GPU-hour")
@click.option("--published", multiple=True, type=click.Path(path_type=Path),
              help="MLCommons' summary_results.json: a table of its own, marked; repeatable")  # fmt: skip
def compare(
    paths: tuple[Path, ...], baseline: str | None, kind: str, out: Path | None, allow_unlike: bool, allow_invalid: bool,
    prices: Path | None, published: tuple[Path, ...],
) -> None:  # fmt: skip
    """Gains between RUNs (sealed folders, or folders above them) with intervals: hardware, compiler, energy, cost."""
    price, currency = hardware_catalogue.prices(prices)
    rows = [row for path in published for row in read(path)]
    runs = load_runs(find(paths), allow_invalid)
    found = compare_report.build(runs, tables(runs, allow_unlike), baseline, price, currency, medians(rows))
    if kind == "text":
        body = io.StringIO()
        compare_text.text(found, Console(file=body, no_color=True) if out else Console())
        text = body.getvalue()
        if not out:
            return
    elif kind == "html":
        out, text = out or Path("comparison.html"), compare_report_html.html(found)
        click.echo(out)
    elif kind == "json":
        text = json.dumps(compare_report.document(found), indent=1, allow_nan=False)
    else:
        text = compare_text.markdown(found)
    write(out, text) if out else click.echo(text)


@click.command()
@click.option("--prices", type=click.Path(path_type=Path), help="check a file of prices, and show them")
def gpus(prices: Path | None) -> None:
    """List the GPUs of the catalogue: what their data sheets say, dense; "–" is unknown."""
    price, currency = hardware_catalogue.prices(prices)
    known = hardware_catalogue.catalogue()
    if not known:
        raise UserError("the catalogue is empty; install the package again")
    click.echo(f"{'key':14} {'GPU':18} {'year':4} {'GB/s':>6} {'BF16':>6} {'FP8':>6} {'W':>5} {'CC':>4}  per hour")
    for key, gpu in known.items():
        peaks = [f"{gpu.peaks[p]:6g}" if p in gpu.peaks else f"{'–':>6}" for p in ("bf16", "fp8")]
        power = f"{gpu.power_w:5g}" if gpu.power_w else f"{'–':>5}"
        cost = f"{price[key]:g} {currency}".strip() if key in price else "–"
        click.echo(f"{key:14} {gpu.name:18} {gpu.year} {gpu.bandwidth_gbs:6g} {' '.join(peaks)} {power} "
                   f"{gpu.capability:4.1f}  {cost}")  # fmt: skip
