"""Command line of the load generator; each command but `run` lives in a file of its own."""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console

from loadgen.edge import report
from loadgen.edge.ab_cli import ab
from loadgen.edge.check_cli import check
from loadgen.edge.command_options import arguments, declare, scenario_names
from loadgen.edge.compare_cli import compare, gpus
from loadgen.edge.history_cli import history
from loadgen.edge.hosts_cli import hosts
from loadgen.edge.import_cli import import_
from loadgen.edge.launch import launch
from loadgen.edge.probe_gpu import probe_gpu
from loadgen.edge.report_cli import report as report_command
from loadgen.edge.search_cli import search, sweep
from loadgen.edge.submission import submission


@click.group()
def cli() -> None:
    """Load tests."""


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("scenario", metavar="SCENARIO", shell_complete=scenario_names)
@declare
def run(scenario: str, locust_options: tuple[str, ...], **options: Any) -> None:
    """Run one SCENARIO against a Triton server, seal it, print its report.

    Other options are handed to Locust: see `locust -f loadgen/llm.py --help`.
    Exit code: 0 VALID, 3 INVALID, 2 bad input.
    """
    console = Console()
    words = arguments({"scenario": scenario.replace("-", "_"), **options})
    launched = launch([*words, *locust_options], console)
    report.text([launched.run], console)
    click.echo(f"sealed in {launched.run.folder}")
    sys.exit(launched.exit_code)


for command in (report_command, check, submission, search, sweep, hosts):
    cli.add_command(command)
for command in (compare, gpus, history, import_, ab, probe_gpu):
    cli.add_command(command)
