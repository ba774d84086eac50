"""The options of a run as click options, for every command that starts runs, and back as words for Locust."""

from __future__ import annotations

from typing import Any

import click

from loadgen.edge import scenarios
from loadgen.edge.options import OPTIONS


def scenario_names(_context: Any, _parameter: Any, start: str) -> list[str]:
    """What a shell offers for a scenario's name that begins with `start`."""
    return [name for name in scenarios.names() if name.startswith(start)]


def declare(command: Any) -> Any:
    """Adds the run's options, but the scenario, which is an argument."""
    for option in reversed([o for o in OPTIONS if o.dest != "scenario"]):
        kind: Any = click.Choice(list(option.choices)) if option.choices else option.type
        command = click.option(option.flag, type=kind, default=option.default, help=option.help,
                               show_default=option.default is not None)(command)  # fmt: skip
    for flag, kind, text in (
        ("--processes", int, "load workers on this machine"),
        ("--run-time", str, "length of a full run, such as 60s (default: the preset's)"),
    ):
        command = click.option(flag, type=kind, help=text)(command)
    host = click.option("--host", default="http://127.0.0.1:8000", show_default=True, help="Triton's HTTP address")
    return host(click.argument("locust_options", nargs=-1, type=click.UNPROCESSED)(command))


def arguments(options: dict[str, Any]) -> list[str]:
    """{"target_qps": 4} → ["--target-qps", "4"], leaving out what is not set."""
    return [text for name, value in options.items() if value is not None
            for text in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
