"""PromQL over sealed runs, as `tritonmark history` serves them: choice, the mean of each kind, ratios.

No aggregation may drop a label on which the work depends: 256 requests in flight are not 64, ten seconds are not ten
minutes. What the board chooses one of at a time (ONE_OF) is fixed; the rest stands in every `by (…)`.
"""

from __future__ import annotations

from collections.abc import Callable

from loadgen.core.metrics import METRICS, Metric
from loadgen.edge import history_names as names

ONE_OF = ("model", "scenario", "load")  # chosen one at a time
SOME_OF = ("backend", "precision", "source")
CHOICE = ", ".join([*(f'{label}="${label}"' for label in ONE_OF), *(f'{label}=~"${label}"' for label in SOME_OF)])
ONE_RUN = "run, hardware, model, scenario, load"  # of a published row `run` is the round, which has many
TASK = "model, scenario, load, weights, preset"
WORK = f"{TASK}, backend, precision"  # what two kinds of hardware are compared on
KIND = f"hardware, gpu, {WORK}"
ROW, COLUMN = ("gpu", "preset", "weights"), ("backend", "precision")  # labels that a matrix joins
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


def limited(family: names.Family) -> str:
    """Values of chosen runs that are VALID and had a latency limit to keep."""
    return f"{valid(family)} and on ({ONE_RUN}) {names.LIMIT.name}"


def mean(values: str, by: str = KIND) -> str:
    """Of the runs of one kind their mean: the best of n runs grows with n."""
    return f"avg by ({by}) ({values})"


def against_gpu(of: Callable[..., str], name: str) -> str:
    """How many times as good each kind of run is as the same work on the GPU $baseline. `of`: figure or per_gpu."""
    here, there = mean(of(name), f"gpu, {WORK}"), mean(of(name, gpu=BASELINE), WORK)
    if metric(name).better == "lower":
        return f"{there} / on ({WORK}) group_right () {here}"
    return f"{here} / on ({WORK}) group_left () {there}"


def against_cell(name: str) -> str:
    """Throughput per GPU against one cell: the GPU $baseline with the backend $compiler in the same precision."""
    choice = CHOICE.replace('backend=~"$backend"', 'backend="$compiler"')
    same = f"{TASK}, precision"
    there = mean(per_gpu(name, choice, BASELINE), by=same)
    return f"{mean(per_gpu(name), by=f'gpu, {WORK}')} / on ({same}) group_left () {there}"
