"""`tritonmark import mlperf FILE…`: published results as a table, JSON or Parquet."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

from loadgen.edge.errors import UserError
from loadgen.edge.import_mlperf import medians, plain, read
from loadgen.edge.report_data import number
from loadgen.edge.text_file import write


@click.group(name="import")
def import_() -> None:
    """Read results that others measured; they stay marked as published."""


@import_.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "kind", default="table", show_default=True, type=click.Choice(["table", "json", "parquet"]))
@click.option("--out", type=click.Path(path_type=Path), help="write here (needed for parquet)  [default: stdout]")
@click.option("--model", help="only models whose name begins with this")
@click.option("--at-most", type=click.IntRange(min=1), default=8, show_default=True,
              help="table: most accelerators of a system that counts")  # fmt: skip
def mlperf(files: tuple[Path, ...], kind: str, out: Path | None, model: str | None, at_most: int) -> None:
    """Read MLCommons' summary_results.json (v4.1, v5.1, v6.0).

    table: medians per accelerator of closed datacenter systems. json and parquet: every result, a row each.
    """
    rows = [r for path in files for r in read(path) if model is None or r.model.startswith(model)]
    if not rows:
        raise UserError(f"no result has a model that begins with {model!r}")
    if kind == "parquet":
        if out is None:
            raise UserError("--format parquet needs --out FILE")
        partial = out.with_name(out.name + ".tmp")
        try:
            pq.write_table(pa.Table.from_pylist(plain(rows)), partial, compression="zstd")
            partial.replace(out)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
        click.echo(f"{len(rows)} published results in {out}")
        return
    text = json.dumps(plain(rows), indent=1) if kind == "json" else table(rows, at_most)
    write(out, text + "\n") if out else click.echo(text)


def table(rows: list, at_most: int) -> str:  # type: ignore[type-arg]
    """Medians per accelerator, as text."""
    head = ["round", "model", "scenario", "accelerator", "results", "median", "min", "max", "per accelerator"]
    body = []
    for m in medians(rows, at_most):
        figures = [number(m[k], 4) for k in ("median", "min", "max")]
        body.append([m["round"], m["model"], m["scenario"], m["accelerator"], str(m["results"]), *figures, m["unit"]])
    widths = [max(len(r[i]) for r in [head, *body]) for i in range(len(head))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in [head, *body]]
    repeated = sum(bool(r.repeats) for r in rows)
    note = (
        f"PUBLISHED by MLCommons, not measured here: {len(rows)} results; medians of closed datacenter systems with at "
        f"most {at_most} accelerators; {repeated} that repeat a run under a second model name are left out"
    )
    return "\n".join([*lines, note])
