"""`tritonmark ab SCENARIO --host A --host B --model A --model B`."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console

from loadgen.edge.ab import Experiment
from loadgen.edge.command_options import arguments, scenario_names
from loadgen.edge.errors import UserError
from loadgen.edge.launch import launch
from loadgen.edge.options import OPTIONS
from loadgen.edge.search_cli import seconds
from loadgen.edge.store import Run

FIGURES = ("throughput", "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "e2e_p50", "e2e_p99")
OWN = ("scenario", "model", "salt_seed", "hardware")  # options that this command has itself


def declare(command: Any) -> Any:
    """The options of a run that both sides share."""
    for option in reversed([o for o in OPTIONS if o.dest not in OWN]):
        kind: Any = click.Choice(list(option.choices)) if option.choices else option.type
        command = click.option(option.flag, type=kind, default=option.default, help=option.help,
                               show_default=option.default is not None)(command)  # fmt: skip
    return command


@click.command()
@click.argument("scenario", metavar="SCENARIO", shell_complete=scenario_names)
@click.option("--host", "hosts", multiple=True, help="Triton's HTTP address: once for both sides, or A's and then B's")
@click.option("--model", "models", multiple=True, help="served model: once for both sides, or A's and then B's")
@click.option("--hardware", "labels", multiple=True, help="label of the server's hardware: once, or A's and then B's")
@click.option("--figure", default="throughput", show_default=True, type=click.Choice(FIGURES),
              help="what decides")  # fmt: skip
@click.option("--budget", default="20m", show_default=True, help="most time for all runs; two blocks are always made")
@click.option("--max-blocks", type=click.IntRange(min=2), default=12, show_default=True,
              help="most blocks of four runs")  # fmt: skip
@click.option("--run-time", help="length of each run, such as 30s (default: the preset's)")
@click.option("--processes", type=int, help="load workers on this machine")
@click.option("--salt-seed", type=int, default=1, show_default=True, help="the same for both sides: equal prompts")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
@declare
def ab(
    scenario: str, hosts: tuple[str, ...], models: tuple[str, ...], labels: tuple[str, ...], figure: str, budget: str,
    max_blocks: int, style: str, **options: Any,
) -> None:  # fmt: skip
    """Two servers or backends against each other, in turns (A B B A), until told apart or the budget is spent.

    Both must be up all the time. Exit code 0 also where they were not told apart; 2 for a run that is INVALID twice.
    """
    host, model = two(hosts, "--host", "http://127.0.0.1:8000"), two(models, "--model")
    label = two(labels, "--hardware", None)
    if (host[0], model[0]) == (host[1], model[1]):
        raise UserError("A and B are the same host and model; give --host or --model twice, A's first")
    if figure == "throughput" and scenario.replace("-", "_") in ("server", "interactive"):
        raise UserError("a server scenario's rate is set by --target-qps: choose another --figure, such as e2e_p50")
    console = Console(stderr=style == "json")

    def start(side: str, number: int) -> Run:
        which = "AB".index(side)
        told = {"scenario": scenario.replace("-", "_"), "host": host[which], "model": model[which],
                "hardware": label[which], **options}  # fmt: skip
        launched = launch(arguments(told), console)
        if launched.interrupted:
            raise UserError(f"interrupted; {number + 1} runs are sealed under {options['results']}")
        return launched.run

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    experiment = Experiment(start, figure, seconds(budget, "--budget"), max_blocks, say)
    seen = experiment.run()
    if style == "json":
        click.echo(json.dumps({
            "figure": figure, "a": {"host": host[0], "model": model[0]}, "b": {"host": host[1], "model": model[1]},
            "decided": seen.decided, "why": experiment.why, "blocks": seen.blocks, "ratio": seen.gain.ratio,
            "low": seen.gain.low, "high": seen.gain.high, "confidence": seen.confidence,
            "runs": {side: [str(r.folder) for r in runs] for side, runs in experiment.runs.items()},
        }, indent=1))  # fmt: skip
        return
    word = "B is better" if seen.gain.ratio > 1 else "A is better"
    say(f"{experiment.why}: {word if seen.decided else 'not separable'}; runs are sealed under {options['results']}")


def two(given: tuple[str, ...], flag: str, default: str | None = "") -> tuple[Any, Any]:
    """A's and B's value. Raises UserError for more than two, or for none where there is no default."""
    if len(given) > 2:
        raise UserError(f"{flag} was given {len(given)} times; give it once for both sides, or twice, A's first")
    if not given:
        if default == "":
            raise UserError(f"give {flag}: once for both sides, or twice, A's first")
        return default, default
    return given[0], given[-1]
