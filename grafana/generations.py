"""*Generations*: every sealed run that `tritonmark history` tells of, across hardware and compilers."""

from __future__ import annotations

from typing import Any

from grafana.live import HISTORY
from grafana.sealed import (
    CHOICE,
    KIND,
    ONE_RUN,
    WORK,
    against_cell,
    against_gpu,
    best,
    figure,
    metric,
    per_gpu,
    unit,
    valid,
)
from grafana.spec import Board, Panel, Query, Row, Variable
from loadgen.edge import history_names as names

NAME = "{{hardware}}: {{backend}} {{precision}}, {{model}} {{scenario}}"
ONE = ("Of several runs of one kind the best is shown; INVALID runs are left out. Whether their prompts and answers "
       "were equally long is not asked here: `tritonmark compare` asks, and gives intervals.")  # fmt: skip
CELLS = ("Rows are GPUs, columns compilers: backend and precision. Choose one model and one scenario, otherwise a cell "
         "is the best of all that are chosen.")  # fmt: skip
TIMES = "suffix:×"


def bars(title: str, help_: str, unit_: str, expression: str, **more: Any) -> Panel:
    query = Query(expression, more.pop("legend", NAME))
    return Panel(title, f"{help_} {ONE}", unit_, (query,), "bars", **({"width": 12} | more))


def matrix(title: str, help_: str, unit_: str, expression: str, better: str = "higher") -> Panel:
    """GPUs down, compilers across."""
    joined = f'label_join({expression}, "compiler", " ", "backend", "precision")'
    query = Query(best(joined, better, "gpu, compiler"), table=True)
    return Panel(title, f"{help_} {CELLS} {ONE}", unit_, (query,), "table", 12, pivot=("gpu", "compiler"))


def sealed(name: str, **more: Any) -> Panel:
    """Bars of one line of METRICS; of a distribution its 99th percentile, run by run of the same load."""
    line = metric(name)
    text = f"{line.help[0].upper()}{line.help[1:]}."
    if line.unit != "ns":
        return bars(line.label, text, unit(name), best(figure(name), line.better), **more)
    by_load = best(figure(name), line.better, f"{KIND}, load")
    text += " 99th percentile, each load by itself."
    return bars(f"p99 {line.label}", text, unit(name), by_load, legend=f"{NAME} ({{{{load}}}})", **more)


def _of_limit(short: str) -> str:
    """p99 of each run as a share of its limit, INVALID runs included."""
    p99 = names.of_metric(metric(f"{short}_ns")).name
    limit = f'{names.LIMIT.name}{{metric="{short}", percentile="p99"}}'
    share = f'{p99}{{{CHOICE}, stat="p99"}} / on ({ONE_RUN}) group_left () {limit}'
    return f"max by (hardware, load, run, {WORK}) ({share})"


THROUGHPUT = Row("Throughput at the SLO", (
    bars("tokens/s per GPU", "Output tokens per second and GPU, of runs that kept their limits. Published results are "
         "medians per accelerator.", unit("tokens_per_s"), best(per_gpu("tokens_per_s"))),
    sealed("tokens_per_s"),
    matrix("tokens/s per GPU: hardware and compiler", "Output tokens per second and GPU, of runs that kept their "
           "limits.", unit("tokens_per_s"), per_gpu("tokens_per_s")),
    matrix("Requests/s per GPU: hardware and compiler", "Completed requests per second and GPU, for any family of "
           "models.", "reqps", per_gpu("qps")),
    sealed("goodput_qps", width=24),
))  # fmt: skip

BY_GPU = "{{gpu}}: {{backend}} {{precision}}, {{model}} {{scenario}}"
RATIO = Row("How much is hardware, how much compiler", (
    bars("tokens/s per GPU against the baseline GPU", "How many times as many tokens per second as the same model, "
         "scenario and compiler give on the baseline GPU: what the hardware brings.", TIMES,
         against_gpu(per_gpu, "tokens_per_s"), legend=BY_GPU),
    bars("p99 TPOT against the baseline GPU", "How many times as short a token takes as on the baseline GPU with the "
         "same compiler at the same load.", TIMES, against_gpu(figure, "tpot_ns"), legend=f"{BY_GPU} ({{{{load}}}})"),
    matrix("tokens/s per GPU against one cell", "Every cell against the baseline GPU with the baseline backend. Down a "
           "column only the hardware changes, along a row only the compiler.", TIMES, against_cell("tokens_per_s")),
    matrix("Requests/s per GPU against one cell", "The same for requests per second, which every family of models has.",
           TIMES, against_cell("qps")),
))  # fmt: skip

LATENCY = Row("Latency", (
    *(sealed(name) for name in ("ttft_ns", "tpot_ns", "e2e_ns")),
    Panel("p99 of its limit", "99th percentile as a share of the scenario's limit, run by run. Over 100 % the run is "
          "INVALID; those are shown here too.", "percentunit",
          tuple(Query(_of_limit(m), f"{m.upper()}, {NAME} ({{{{load}}}})") for m in ("ttft", "tpot", "e2e")),
          "bars", 12, steps=((0.8, "orange"), (1, "red"))),
    matrix("p99 TTFT: hardware and compiler", "99th percentile of the time to the first token, of the easiest load.",
           "s", figure("ttft_ns"), "lower"),
    matrix("p99 TPOT: hardware and compiler", "99th percentile of the time per output token, of the easiest load.", "s",
           figure("tpot_ns"), "lower"),
))  # fmt: skip

MONEY = f"{KIND}, currency"
ENERGY = Row("Energy and cost", (
    sealed("tokens_per_joule"),
    matrix("tokens/J: hardware and compiler", "Output tokens per joule of the GPUs in use.", unit("tokens_per_joule"),
           figure("tokens_per_joule")),
    bars("Mean power", "Power of all GPUs in use, a mean over the measured time.", "watt",
         best(figure("mean_power_watts"), "lower")),
    bars("Cost per million tokens", "Output tokens at your price per GPU-hour (--prices). GPUs without a price are "
         "absent.", "none", best(valid(names.TOKEN_COST), "lower", MONEY), legend=f"{NAME}, {{{{currency}}}}"),
    bars("Share of the hardware's limit", "How near a run came to its roofline, and for which work.", "percentunit",
         best(valid(names.SHARE), by=f"{KIND}, work"), legend=f"{{{{work}}}}: {NAME}", high=1),
    bars("Memory bandwidth used", "MBU: bytes that the roofline counts / time / peak bandwidth.", "percentunit",
         best(valid(names.MBU), by=f"{KIND}, work"), legend=f"{{{{work}}}}: {NAME}", high=1),
))  # fmt: skip

VIDEO = Row("Video", (
    sealed("frames_per_s", width=8),
    sealed("seconds_per_video", width=8),
    sealed("joules_per_video", width=8),
    sealed("start_ns"),
    sealed("step_ns"),
))  # fmt: skip


OWN = f'{CHOICE}, source="measured"'


def _column(expression: str) -> Query:
    return Query(f"max by (run) ({expression})", table=True)


def _p99(name: str) -> Query:
    return _column(f'{names.of_metric(metric(name)).name}{{{OWN}, stat="p99"}}')


def _plain(name: str) -> Query:
    return _column(f"{names.of_metric(metric(name)).name}{{{OWN}}}")


RUNS = Row("Runs", (
    Panel("Sealed runs", "Every chosen run of your own, INVALID ones included. Latencies are 99th percentiles. A run's "
          "name opens its report on the history server, whose address is above.", "none", (
              Query(f"{names.INFO.name}{{{OWN}}}", table=True),
              _column(f"{names.VALID.name}{{{OWN}}}"), _plain("tokens_per_s"), _plain("qps"), _p99("ttft_ns"),
              _p99("tpot_ns"), _p99("e2e_ns"), _plain("tokens_per_joule"),
          ), "table", 24, 12, joined="run",
          columns={"run": "Run", "Value #B": "Valid", "model": "Model", "scenario": "Scenario", "load": "Load",
                   "backend": "Backend", "precision": "Precision", "weights": "Weights", "hardware": "Hardware",
                   "generation": "Generation", "year": "Year", "Value #C": "tokens/s", "Value #D": "Requests/s",
                   "Value #E": "TTFT", "Value #F": "TPOT", "Value #G": "E2E", "Value #H": "tokens/J",
                   "report": "Report"},
          units={"TTFT": "s", "TPOT": "s", "E2E": "s", "tokens/s": unit("tokens_per_s"),
                 "tokens/J": unit("tokens_per_joule"), "Requests/s": "reqps"},
          link=("Run", "Open the report", "${history:raw}${__data.fields.Report}")),
))  # fmt: skip


def _choice(name: str, label: str, help_: str) -> Variable:
    return Variable(name, label, help_, f"label_values({names.VALID.name}, {name})")


BOARD = Board(
    "tritonmark-generations", "Generations",
    "Sealed runs across hardware generations and compilers. `tritonmark history` serves them from results/, so they "
    "outlive Prometheus' memory; the time range does not matter.",
    (
        _choice("model", "Model", "Models that were measured or published."),
        _choice("scenario", "Scenario", "MLPerf's scenarios and this project's own."),
        _choice("backend", "Backend", "Compilers: eager, compiled, TensorRT and so on."),
        _choice("precision", "Precision", "Of the weights."),
        _choice("source", "Source", "measured: sealed runs of your own; published: MLPerf results that you imported."),
        Variable("baseline", "Baseline GPU", "GPU that the ratios are taken against.",
                 f"label_values({names.INFO.name}, gpu)", several=False),
        Variable("compiler", "Baseline backend", "Backend that the matrices of ratios are taken against.",
                 f'label_values({names.INFO.name}{{gpu="$baseline"}}, backend)', several=False,
                 newest=True),
        HISTORY,
    ),
    (THROUGHPUT, RATIO, LATENCY, ENERGY, VIDEO, RUNS), span="now-5m", refresh="1m",
)  # fmt: skip
