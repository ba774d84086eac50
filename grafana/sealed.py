"""PromQL over sealed runs, as `tritonmark history` serves them: choice, the best of each kind, ratios."""

from __future__ import annotations

from collections.abc import Callable

from loadgen.core.metrics import METRICS, Metric
from loadgen.edge import history_names as names

CHOSEN = ("model", "scenario", "backend", "precision", "source")
CHOICE = ", ".join(f'{label}=~"${label}"' for label in CHOSEN)
ONE_RUN = "run, hardware, model, scenario, load"  # of a published row `run` is the round, which has many
WORK = "model, scenario, backend, precision"  # what two kinds of hardware are compared on
KIND = f"hardware, gpu, {WORK}"
BASELINE = '{gpu="$baseline"}'
UNITS = {"ns": "s", "1/s": "reqps", "tokens/s": "suffix: tokens/s", "frames/s": "suffix: frames/s", "s": "s",
         "W": "watt", "tokens/J": "suffix: tokens/J", "J": "joule", "ratio": "percentunit"}  # fmt: skip


def metric(name: str) -> Metric:
    """The line of METRICS with this name. Raises StopIteration where there is none."""
    return next(m for m in METRICS if m.name == name)


def unit(name: str) -> str:
    """Grafana's unit of a line of METRICS."""
    return UNITS[metric(name).unit]


def figure(name: str, choice: str = CHOICE, gpu: str = "") -> str:
    """A line of METRICS for each chosen run that is VALID; of a distribution the 99th percentile."""
    line = metric(name)
    return valid(names.of_metric(line), f'{choice}, stat="p99"' if line.unit == "ns" else choice, gpu)


def per_gpu(name: str, choice: str = CHOICE, gpu: str = "") -> str:
    """The same divided by the number of GPUs; published results have only these."""
    return valid(names.per_gpu(metric(name)), choice, gpu)


def valid(family: names.Family, choice: str = CHOICE, gpu: str = "") -> str:
    """Values of chosen runs that are VALID, with their GPU as the catalogue names it. `gpu` may select that."""
    known = f"({names.INFO.name}{gpu} and on ({ONE_RUN}) {names.VALID.name} == 1)"
    return f"{family.name}{{{choice}}} * on ({ONE_RUN}) group_left (gpu) {known}"


def best(values: str, better: str = "higher", by: str = KIND) -> str:
    """Of the runs of one kind the best: the lowest or the highest value."""
    return f"{'min' if better == 'lower' else 'max'} by ({by}) ({values})"


def against_gpu(of: Callable[..., str], name: str) -> str:
    """How many times as good each kind of run is as the same work on the GPU $baseline. `of`: figure or per_gpu."""
    better = metric(name).better
    work = f"{WORK}, load" if better == "lower" else WORK  # a latency means something at one load only
    here, there = best(of(name), better, f"gpu, {work}"), best(of(name, gpu=BASELINE), better, work)
    if better == "lower":
        return f"{there} / on ({work}) group_right () {here}"
    return f"{here} / on ({work}) group_left () {there}"


def against_cell(name: str) -> str:
    """Throughput per GPU against one cell: the GPU $baseline with the backend $compiler."""
    choice = CHOICE.replace('backend=~"$backend"', 'backend="$compiler"')
    there = best(per_gpu(name, choice, BASELINE), by="model, scenario")
    return f"{best(per_gpu(name), by=f'gpu, {WORK}')} / on (model, scenario) group_left () {there}"
