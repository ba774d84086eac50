"""The front door: `tritonmark models | export | serve | run | sweep | search | report | check | submission | bench`.

Exit codes: 0 VALID or done; 3 INVALID; 2 bad input, in one line; 1 a bug.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import click
from rich.console import Console

import exporters.cli
import exporters.errors
import loadgen.cli
import loadgen.edge.errors
from exporters.catalogue import model_names
from exporters.doctor import doctor
from exporters.export import export_model
from exporters.machine import busy_share
from exporters.server import TritonServer
from exporters.stack_cli import init
from loadgen.core.scenario import Kind
from loadgen.edge import bench_end, report, report_html, scenarios
from loadgen.edge.about import tool_version
from loadgen.edge.command_options import arguments
from loadgen.edge.discovery import Discovery
from loadgen.edge.launch import Launched, launch
from loadgen.edge.store import Run

CALIBRATION = {"scenario": "concurrency", "concurrency": 16, "run_time": "4s", "warmup": 16}
SERVER_SHARE = 0.6  # of the calibrated throughput: busy, and with room for Poisson bursts
OFFLINE_SHARE = 1.5  # of it: batches of more than 16 are faster, and too few samples end before Offline's least time
BENCH_SCENARIOS = ("single_stream", "server", "offline")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tool_version(), prog_name="tritonmark")
def cli() -> None:
    """MLPerf-style load tests for NVIDIA Triton: how much of a speed-up is hardware, and how much compiler."""


@cli.command()
@click.option(
    "--model",
    default="phi-2-tiny",
    show_default=True,
    help="catalogue name; see `tritonmark models`",
    shell_complete=model_names,
)
@click.option("--backend", default="torch-eager", show_default=True)
@click.option("--weights", default="synthetic", show_default=True, help="synthetic, hub or a folder")
@click.option(
    "--preset",
    default="smoke",
    show_default=True,
    type=click.Choice(scenarios.PRESETS),
    help="smoke: about 10 s a scenario; mlperf: MLPerf's minimum durations and counts",
)
@click.option("--scenario", "names", multiple=True, help=f"repeatable  [default: {', '.join(BENCH_SCENARIOS)}]")
@click.option("--target-qps", type=float, help="arrival rate of server  [default: 0.6 of the calibrated throughput]")
@click.option("--run-time", help="least time of each scenario, such as 20s")
@click.option("--results", default="results", show_default=True, type=click.Path(path_type=Path))
@click.option("--repository", type=click.Path(path_type=Path), help="keep the model repository here")
def bench(names: tuple[str, ...], repository: Path | None, **options: object) -> None:
    """Export a model, serve it with the real Triton, run MLPerf scenarios, seal and report.

    The default needs no GPU, no Docker and no download, and takes under two minutes on an idle machine. Exit code: 0
    all runs VALID; 3 at least one is INVALID, and the last lines say why and what to do.
    """
    console = Console()
    others = busy_share()
    with tempfile.TemporaryDirectory(prefix="tritonmark-bench-") as scratch:
        launched = run_bench(
            names or BENCH_SCENARIOS, repository or Path(scratch, "models"), Path(scratch), console, **options
        )  # type: ignore[arg-type]
    runs = [x.run for x in launched]
    report.text(runs, console)
    page = Path(str(options["results"])) / "report.html"
    page.write_text(report_html.html(runs), encoding="utf-8")
    for run in runs:
        console.print(f"sealed in {run.folder}", highlight=False, soft_wrap=True)
    console.print(f"report in {page}", highlight=False, soft_wrap=True)
    known = (name for parameter in bench.params for name in parameter.opts)
    for line in bench_end.last_lines(runs, page, known, others):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    sys.exit(max(x.exit_code for x in launched))


def run_bench(
    names: tuple[str, ...], repository: Path, scratch: Path, console: Console, *, model: str, backend: str,
    weights: str, preset: str, target_qps: float | None, run_time: str | None, results: Path,
) -> list[Launched]:  # fmt: skip
    """Export → serve → calibrate → scenarios. What can be refused is refused before any work."""
    for name in names:
        scenarios.resolve(name, model, preset, {"target_qps": target_qps or 1.0})
    if not (repository / model).exists():
        step(console, f"export {model} ({backend}, {weights} weights)")
        export_model(model, backend, weights, repository)
    step(console, "serve with tritonserver")
    with TritonServer(repository, models=[model], log_path=results_log(results)) as server, found_at(results, server):
        common = {"host": server.http_url, "model": model, "preset": preset, "server_metrics": server.metrics_url}
        step(console, "warm up and calibrate: 16 requests in flight")
        ceiling = launch(arguments(common | CALIBRATION | {"preset": "smoke", "results": scratch}), console)
        capacity = calibrated(ceiling.run)
        launched = []
        for name in names:
            rate = {"server": target_qps or round(SERVER_SHARE * capacity, 2)}
            rate |= {"interactive": rate["server"], "offline": round(OFFLINE_SHARE * capacity, 2)}
            options = common | {
                "scenario": name,
                "run_time": run_time,
                "target_qps": rate.get(name),
                "results": results,
            }
            step(console, f"{name}" + (f" at {rate[name]:g} requests/s" if name in rate else ""))
            launched.append(launch(arguments(options), console))
            if launched[-1].interrupted:
                break
    return launched


@contextmanager
def found_at(results: Path, server: TritonServer) -> Iterator[None]:
    """Prometheus finds this server's page meanwhile, which is not on the port that is scraped anyway."""
    discovery = Discovery(results)
    page = urlsplit(server.metrics_url)
    discovery.write([{"targets": [page.netloc], "labels": {"job": "triton", "optional": "true"}}])
    try:
        yield
    finally:
        discovery.remove()


def calibrated(run: Run) -> float:
    """Requests/s that the server completed with 16 in flight. Raises UserError when it completed none."""
    assert run.scenario.kind is Kind.CONCURRENCY
    if not run.summary["qps"]:
        raise loadgen.edge.errors.UserError(
            f"the server answered no request in calibration: {run.document['verdict']['headline']}"
        )
    return float(run.summary["qps"])


def results_log(results: Path) -> Path:
    """Where the server's log of this bench goes. Raises UserError where nothing can be written."""
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise loadgen.edge.errors.UserError(
            f"cannot write to {results}: {error.strerror}; choose another --results"
        ) from error
    return results / "triton.log"


def step(console: Console, text: str) -> None:
    """One line of progress."""
    console.print(f"[bold]▸[/bold] {text}", highlight=False)


for command in (doctor, init, *exporters.cli.cli.commands.values(), *loadgen.cli.cli.commands.values()):
    cli.add_command(command)


def main() -> None:
    """Runs the command line; a user's mistake becomes one line and exit code 2."""
    try:
        cli(prog_name="tritonmark")
    except (exporters.errors.UserError, loadgen.edge.errors.UserError) as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
