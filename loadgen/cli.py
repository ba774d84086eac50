"""Command line of the load generator: `tritonmark run`; `report` lives beside what it prints."""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console

from loadgen.edge import report
from loadgen.edge.check_cli import check
from loadgen.edge.launch import launch
from loadgen.edge.options import OPTIONS, Option
from loadgen.edge.report_cli import report as report_command
from loadgen.edge.search_cli import search, sweep
from loadgen.edge.submission import submission


@click.group()
def cli() -> None:
    """Load tests."""


def _declare(command: Any) -> Any:
    """Adds the run's options to a click command, in the order of the table."""
    for option in reversed(OPTIONS):
        command = click.option(option.flag, type=_click_type(option), default=option.default, help=option.help,
                               show_default=option.default is not None)(command)  # fmt: skip
    return command


def _click_type(option: Option) -> Any:
    return click.Choice(list(option.choices)) if option.choices else option.type


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("scenario_name", metavar="SCENARIO", required=False)
@click.option("--host", default="http://127.0.0.1:8000", show_default=True, help="Triton's HTTP address")
@click.option("--run-time", help="least time, such as 30s or 10m (default: the preset's)")
@click.option("--processes", type=int, help="load workers on this machine")
@_declare
@click.argument("locust_options", nargs=-1, type=click.UNPROCESSED)
def run(scenario_name: str | None, locust_options: tuple[str, ...], **options: Any) -> None:
    """Run one SCENARIO against a Triton server, seal it, print its report.

    Other options are handed to Locust: see `locust -f loadgen/llm.py --help`.
    Exit code: 0 VALID, 3 INVALID, 2 bad input.
    """
    options["scenario"] = (scenario_name or options["scenario"]).replace("-", "_")
    console = Console()
    launched = launch([*arguments(options), *locust_options], console)
    report.text([launched.run], console)
    click.echo(f"sealed in {launched.run.folder}")
    sys.exit(launched.exit_code)


def arguments(options: dict[str, Any]) -> list[str]:
    """{"target_qps": 4} → ["--target-qps", "4"], leaving out what is not set."""
    return [text for name, value in options.items() if value is not None
            for text in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip


for command in (report_command, check, submission, search, sweep):
    cli.add_command(command)
