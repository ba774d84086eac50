"""`tritonmark history`: sealed runs for Prometheus and Grafana."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.openmetrics.exposition import generate_latest

from loadgen.edge import hardware_catalogue, report_html, store
from loadgen.edge.errors import UserError
from loadgen.edge.history import History, Shown, metrics, of_published
from loadgen.edge.import_mlperf import read
from loadgen.edge.live_server import HISTORY_PORT, bound
from loadgen.edge.text_file import write

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@click.command()
@click.argument("results", default="results", type=click.Path(path_type=Path))
@click.option("--port", default=HISTORY_PORT, show_default=True, type=click.IntRange(0, 65535), help="0: a free one")
@click.option("--bind", default="127.0.0.1", show_default=True, help="address to listen on")
@click.option("--prices", type=click.Path(path_type=Path), help="TOML with your price per GPU-hour")
@click.option("--published", multiple=True, type=click.Path(path_type=Path),
              help="MLCommons' summary_results.json, shown beside as source=published; repeatable")  # fmt: skip
@click.option("--openmetrics", type=click.Path(path_type=Path),
              help="write all runs here (- for stdout) and end: for promtool tsdb create-blocks-from")  # fmt: skip
def history(
    results: Path, port: int, bind: str, prices: Path | None, published: tuple[Path, ...], openmetrics: Path | None
) -> None:
    """Serve the summary of every sealed run below RESULTS as gauges on /metrics, and its report on /report/RUN.

    Runs that are sealed or removed meanwhile appear and vanish with the next scrape.
    """
    if not results.is_dir():
        raise UserError(f"{results} is not a folder; give the one that holds sealed runs, such as results")
    if openmetrics is not None and published:
        raise UserError("--openmetrics gives each run the time when it ended, and --published results have none; "
                        "leave one of them out")  # fmt: skip
    price, currency = hardware_catalogue.prices(prices)
    others = of_published([row for path in published for row in read(path)])
    task = History(results, price, currency, others)
    tell(task)
    if openmetrics is not None:
        export(task.runs(), openmetrics)
        return
    serve(task, bind, port)


def tell(task: History) -> None:
    """Scans, and names on stderr what could not be read."""
    for path, reason in task.scan():
        click.echo(f"skipped: {path} {reason}", err=True)


def export(runs: list[Shown], out: Path) -> None:
    """OpenMetrics text, every sample at the end of its run. Raises UserError where `out` cannot be written."""

    class Timed:
        def collect(self) -> Iterable[Any]:
            return metrics(runs, timed=True)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Timed())  # type: ignore[arg-type]
    text = generate_latest(registry).decode()
    if str(out) == "-":
        click.echo(text, nl=False)
    else:
        write(out, text, "give --openmetrics another file")
        click.echo(f"{len(runs)} runs in {out}")


def serve(task: History, bind: str, port: int) -> None:
    """Answers until SIGINT or SIGTERM. Raises UserError where the port cannot be had."""
    lock = threading.Lock()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(task)  # type: ignore[arg-type]
    page = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/healthy":  # a container's health is asked often; a scan and a page of all runs are no answer to it
            start("200 OK", [("Content-Type", "text/plain")])
            return [b"ok\n"]
        with lock:  # scrapes are few, and a scan is for all
            tell(task)
            if path == "/metrics":
                return page(environ, start)
            folder = task.folder(unquote(path.removeprefix("/report/"))) if path.startswith("/report/") else None
        text = "/metrics, or /report/RUN for a run below the results"
        if folder is not None:
            try:
                body = report_html.html([store.load(folder)]).encode()
            except UserError as error:  # such as records that were changed after the run was sealed
                text = str(error)
            else:
                start("200 OK", [("Content-Type", "text/html; charset=utf-8")])
                return [body]
        start("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    try:
        server = bound(application, port, bind, tries=1)
    except OSError as error:
        raise UserError(
            f"cannot listen on {bind}:{port}: {error.strerror or error}; choose another --port or --bind"
        ) from None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start())
    click.echo(f"{len(task.runs())} sealed runs of {task.results} on http://{bind}:{server.server_port}/metrics")
    sys.stdout.flush()
    server.serve_forever()
