"""`tritonmark search` and `tritonmark sweep`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from loadgen.core import early_stopping
from loadgen.core.scenario import EQUAL_ISSUE, Kind, Scenario
from loadgen.core.search import Done, Plan
from loadgen.core.sweep import order
from loadgen.edge import scenarios
from loadgen.edge.command_options import declare, scenario_names
from loadgen.edge.errors import UserError
from loadgen.edge.journal import Journal
from loadgen.edge.options import OPTIONS
from loadgen.edge.samples import PromptLibrary
from loadgen.edge.search import Interrupted, Prober, Search, clock
from loadgen.edge.sweep import Sweep, show

SEARCHED = (Kind.SERVER, Kind.CONCURRENCY)
SWEPT = {Kind.SERVER: "target_qps", Kind.OFFLINE: "target_qps", Kind.CONCURRENCY: "concurrency"}
PLAIN = click.Choice(["text", "json"])
ON_HOLD = "interrupted; run the same command again to go on ({path})"


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("scenario", metavar="SCENARIO", shell_complete=scenario_names)
@click.option("--max-qps", type=float, help="never try a higher rate")
@click.option("--max-concurrency", type=int, help="never try more requests in flight")
@click.option("--goodput", type=float, help="share of requests that must meet all limits jointly, such as 0.99")
@click.option("--budget", default="20m", show_default=True, help="most time that all probes may take together")
@click.option("--probe-time", default="10s", show_default=True, help="length of a short probe")
@click.option("--precision", type=float, default=0.03, show_default=True, help="how far below the boundary may it be")
@click.option("--restart", is_flag=True, help="begin anew, whatever was measured before")
@click.option("--format", "style", type=PLAIN, default="text", show_default=True)
@declare
def search(
    scenario: str, max_qps: float | None, max_concurrency: int | None, goodput: float | None, budget: str,
    probe_time: str, precision: float, restart: bool, style: str, locust_options: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Find the highest rate (SCENARIO server, interactive) or concurrency (concurrency) inside the latency limits.

    --target-qps or --concurrency say where to start. Exit code: 0 found and VALID, 3 nothing found, 2 bad input.
    """
    console = Console(stderr=style == "json")
    options["scenario"] = scenario.replace("-", "_")
    resolved = resolve(options)
    most = bound(resolved, max_qps, max_concurrency)
    if goodput is not None and not 0 < goodput < 1:
        raise UserError(f"--goodput is {goodput:g}; give a share between 0 and 1, such as 0.99")
    plan = planned(resolved, options, seconds(budget, "--budget"), seconds(probe_time, "--probe-time"), precision, most)
    facts = {"search": asdict(plan) | {"budget_s": None}, "goodput": goodput, **configuration(options, resolved)}
    with Journal.held("search", Path(options["results"]), facts | {"locust": locust_options}, restart) as journal:
        task = Search(Prober(options, locust_options, console), resolved, plan, journal, goodput)
        if journal.entries:
            task.say(f"going on with {len(journal.entries)} probes of {journal.path}; --restart would begin anew")
        try:
            done = task.run()
        except (Interrupted, KeyboardInterrupt):
            console.print(ON_HOLD.format(path=journal.path), highlight=False, soft_wrap=True)
            sys.exit(3)
    tell(task, done, style)
    sys.exit(0 if done.rate is not None else 3)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("scenario", metavar="SCENARIO", shell_complete=scenario_names)
@click.option("--rates", help="arrival rates, such as 1,2,4,8")
@click.option("--concurrencies", help="requests in flight, such as 1,2,4,8,16")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="runs at each point")
@click.option("--seed", type=int, default=0, show_default=True, help="of the order of the points")
@click.option("--in-order", is_flag=True, help="keep the order given")
@click.option("--restart", is_flag=True, help="begin anew, whatever was measured before")
@click.option("--format", "style", type=click.Choice(["text", "markdown", "json"]), default="text", show_default=True)
@declare
def sweep(
    scenario: str, rates: str | None, concurrencies: str | None, repeats: int, seed: int, in_order: bool,
    restart: bool, style: str, locust_options: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Measure the throughput-latency curve of SCENARIO at several --rates or --concurrencies.

    Points come in a random order, so that a drift of the machine does not look like an effect of the load.
    Exit code: 0 all VALID, 3 some INVALID, 2 bad input.
    """
    console = Console(stderr=style != "text")
    options["scenario"] = scenario.replace("-", "_")
    resolved = resolve(options)
    option = SWEPT.get(resolved.kind)
    given = {"target_qps": rates, "concurrency": concurrencies}
    if option is None or given.pop(option) is None or any(given.values()):
        use = {"target_qps": "--rates", "concurrency": "--concurrencies", None: "server, offline or concurrency"}[
            option
        ]
        raise UserError(f"a sweep of {resolved.name} needs {use} and nothing else")
    values = numbers(str(rates or concurrencies), option)
    points = order(values, repeats, None if in_order else seed)
    facts = {"sweep": option, "locust": locust_options, **configuration(options, resolved)}
    with Journal.held("sweep", Path(options["results"]), facts, restart) as journal:
        try:
            rows = Sweep(Prober(options, locust_options, console), option, points, journal).run()
        except (Interrupted, KeyboardInterrupt):
            console.print(ON_HOLD.format(path=journal.path), highlight=False, soft_wrap=True)
            sys.exit(3)
    show(rows, option, style, Console())
    sys.exit(0 if all(row["valid"] == row["repeats"] for row in rows) else 3)


def resolve(options: dict[str, Any]) -> Scenario:
    """The scenario at a rate of 1, if none is given: what is searched has no rate yet."""
    over = {o.override: options.get(o.dest) for o in OPTIONS if o.override}
    over |= {"target_qps": options.get("target_qps") or 1.0}
    over["duration_s"] = seconds(options["run_time"], "--run-time") if options.get("run_time") else None
    return scenarios.resolve(options["scenario"], options["model"], options["preset"], over)


def configuration(options: dict[str, Any], resolved: Scenario) -> dict[str, Any]:
    """What a probe means, but for its rate: part of the journal's key."""
    plain = {k: v for k, v in options.items() if k not in ("target_qps", "concurrency", "results", "processes")}
    return {"options": plain, "scenario": resolved.to_json() | {"target_qps": None, "concurrency": None}}


def bound(resolved: Scenario, max_qps: float | None, max_concurrency: int | None) -> float:
    """The highest rate or concurrency to try. Raises UserError for what cannot be searched."""
    if resolved.kind not in SEARCHED:
        raise UserError(f"{resolved.name} has nothing to search for; use server, interactive or concurrency")
    limits = resolved.limits
    if limits.ttft_ns is limits.tpot_ns is limits.e2e_ns is None:
        raise UserError(f"{resolved.name} has no latency limit for this model; give --ttft-ms, --tpot-ms or --e2e-ms")
    whole = resolved.kind is Kind.CONCURRENCY
    wrong, name = (max_qps, "--max-qps") if whole else (max_concurrency, "--max-concurrency")
    if wrong is not None:
        raise UserError(f"{name} does not bound the scenario {resolved.name}; leave it out")
    most = (max_concurrency or resolved.max_in_flight) if whole else (max_qps or 1e5)
    if most <= 0:
        raise UserError(f"the highest rate to try is {most:g}; it must be above 0")
    return most


def planned(
    resolved: Scenario, options: dict[str, Any], budget_s: float, probe_s: float, precision: float, most: float
) -> Plan:
    """Lengths and bounds. A full run holds enough queries for early stopping to pass at all."""
    whole, minimums = resolved.kind is Kind.CONCURRENCY, resolved.minimums
    full_s = minimums.duration_ns / 1e9
    if not 0.002 <= precision <= 0.5:
        raise UserError(f"--precision is {precision:g}; give a share from 0.002 to 0.5, such as 0.03")
    if budget_s < full_s + probe_s:
        need = clock(full_s + probe_s)
        raise UserError(
            f"--budget {clock(budget_s)} has no room for a probe and one full-length run, which take {need}"
        )
    queries = minimums.queries
    if minimums.early_stopping and not whole:
        queries = max(queries, early_stopping.min_queries(1, resolved.percentile))
    if resolved.sample_order == EQUAL_ISSUE:
        queries = max(queries, len(PromptLibrary(resolved.prompts, resolved)))
    least = 1 if whole else min(0.01, most)
    start = (options.get("concurrency") or resolved.concurrency) if whole else (options.get("target_qps") or 0.0)
    return Plan(min(start, most), least, most, full_s, probe_s, budget_s, precision, whole, queries)


def tell(task: Search, done: Done, style: str) -> None:
    """The answer, and how far it can be trusted."""
    probes, folder = len(task.journal.entries), task.answer_run(done)
    if style == "json":
        facts = {"probes": probes, "spent_s": task.spent_s(), "journal": str(task.journal.path), "run": folder}
        click.echo(json.dumps(asdict(done) | {"unit": task.unit} | facts, indent=1))
        return
    means = f"{done.code}: {done.reason}"
    if done.rate is None:
        task.say(f"no rate was found ({means})")
    else:
        fails = f"; {done.failed:g} fails" if done.failed is not None else ""
        task.say(f"{done.rate:g} {task.unit} ({means}){fails}")
        task.say(f"sealed in {folder}")
    task.say(f"{probes} probes in {clock(task.spent_s())}; journal {task.journal.path}")


def seconds(text: str, option: str) -> float:
    """ "90s", "20m", "1h30m" or "90" in seconds. Raises UserError naming the option."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    total = sum(int(n or 0) * unit for n, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if not total:
        raise UserError(f"{option} is {text!r}; give a time such as 30s, 10m or 1h30m")
    return float(total)


def numbers(text: str, option: str) -> Sequence[float]:
    """ "1,2,4" as numbers above 0; whole ones for concurrency. Raises UserError."""
    flag = "--concurrencies" if option == "concurrency" else "--rates"
    try:
        values = [float(word) for word in text.split(",")]
        if not all(0 < v < 1e9 and (option != "concurrency" or v == int(v)) for v in values):
            raise ValueError
    except ValueError:
        raise UserError(f"{flag} is {text!r}; give numbers above 0, such as 1,2,4,8") from None
    return list(dict.fromkeys(values))
