"""*Generations*: every sealed run that `tritonmark history` tells of, across hardware and compilers."""

from __future__ import annotations

from typing import Any

from grafana.live import HISTORY
from grafana.sealed import (
    CHOICE,
    COLUMN,
    KIND,
    ONE_OF,
    ONE_RUN,
    ROW,
    WORK,
    against_cell,
    against_gpu,
    figure,
    limited,
    mean,
    metric,
    per_gpu,
    unit,
    valid,
)
from grafana.spec import Board, Panel, Query, Row, Variable
from loadgen.edge import history_names as names

NAME = "{{backend}} {{precision}}, {{hardware}} ({{preset}}, {{weights}})"
ONE = ("Of several runs of one kind their mean is shown; INVALID runs are left out. How sure a difference is, and "
       "whether prompts and answers were equally long, `tritonmark compare` says.")  # fmt: skip
CELLS = "Rows are GPUs with preset and weights, columns compilers: backend and precision."
TIMES = "suffix:×"


def bars(title: str, help_: str, unit_: str, expression: str, **more: Any) -> Panel:
    query = Query(expression, more.pop("legend", NAME))
    return Panel(title, f"{help_} {ONE}", unit_, (query,), "bars", **({"width": 12} | more))


def matrix(title: str, help_: str, unit_: str, expression: str) -> Panel:
    """GPUs down, compilers across, at the model, scenario and load that the board has chosen."""
    joined = f'label_join({expression}, "compiler", " ", {_quoted(COLUMN)})'
    joined = f'label_join({joined}, "row", ", ", {_quoted(ROW)})'
    query = Query(mean(joined, "row, compiler"), table=True)
    return Panel(title, f"{help_} {CELLS} {ONE}", unit_, (query,), "table", 12, pivot=("row", "compiler"))


def _quoted(labels: tuple[str, ...]) -> str:
    return ", ".join(f'"{label}"' for label in labels)


def sealed(name: str, **more: Any) -> Panel:
    """Bars of one line of METRICS; of a distribution its 99th percentile."""
    line = metric(name)
    title, text = line.label, f"{line.help[0].upper()}{line.help[1:]}."
    if line.unit == "ns":
        title, text = f"p99 {title}", f"{text} 99th percentile."
    return bars(title, text, unit(name), mean(figure(name)), **more)


def _of_limit(short: str) -> str:
    """p99 of each run as a share of its limit, INVALID runs included."""
    p99 = names.of_metric(metric(f"{short}_ns")).name
    limit = f'{names.LIMIT.name}{{metric="{short}", percentile="p99"}}'
    share = f'{p99}{{{CHOICE}, stat="p99"}} / on ({ONE_RUN}) group_left () {limit}'
    return f"max by (hardware, run, {WORK}) ({share})"


THROUGHPUT = Row("Throughput", (
    bars("tokens/s per GPU", "Output tokens per second and GPU. Published results are medians per accelerator.",
         unit("tokens_per_s"), mean(per_gpu("tokens_per_s"))),
    sealed("tokens_per_s"),
    matrix("tokens/s per GPU: hardware and compiler", "Output tokens per second and GPU.",
           unit("tokens_per_s"), per_gpu("tokens_per_s")),
    matrix("Requests/s per GPU: hardware and compiler", "Completed requests per second and GPU, for any family of "
           "models.", "reqps", per_gpu("qps")),
    bars("goodput", "Completed requests within every latency limit, per second; only of runs that have one.",
         "reqps", mean(limited(names.of_metric(metric("goodput_qps")))), width=24),
))  # fmt: skip

BY_GPU = "{{backend}} {{precision}}, {{gpu}} ({{preset}}, {{weights}})"
RATIO = Row("How much is hardware, how much compiler", (
    bars("tokens/s per GPU against the baseline GPU", "How many times as many tokens per second as the same model, "
         "scenario and compiler give on the baseline GPU: what the hardware brings.", TIMES,
         against_gpu(per_gpu, "tokens_per_s"), legend=BY_GPU),
    bars("p99 TPOT against the baseline GPU", "How many times as short a token takes as on the baseline GPU with the "
         "same compiler.", TIMES, against_gpu(figure, "tpot_ns"), legend=BY_GPU),
    matrix("tokens/s per GPU against one cell", "Every cell against the baseline GPU with the baseline backend in the "
           "same precision. Down a column only the hardware changes, along a row only the compiler.", TIMES,
           against_cell("tokens_per_s")),
    matrix("Requests/s per GPU against one cell", "The same for requests per second, which every family of models has.",
           TIMES, against_cell("qps")),
))  # fmt: skip

LATENCY = Row("Latency", (
    *(sealed(name) for name in ("ttft_ns", "tpot_ns", "e2e_ns")),
    Panel("p99 of its limit", "99th percentile as a share of the scenario's limit, run by run. Over 100 % the run is "
          "INVALID; those are shown here too.", "percentunit",
          tuple(Query(_of_limit(m), f"{m.upper()}, {NAME}") for m in ("ttft", "tpot", "e2e")),
          "bars", 12, steps=((0.8, "orange"), (1, "red"))),
    matrix("p99 TTFT: hardware and compiler", "99th percentile of the time to the first token.", "s",
           figure("ttft_ns")),
    matrix("p99 TPOT: hardware and compiler", "99th percentile of the time per output token.", "s",
           figure("tpot_ns")),
))  # fmt: skip

MONEY = f"{KIND}, currency"
ENERGY = Row("Energy and cost", (
    sealed("tokens_per_joule"),
    matrix("tokens/J: hardware and compiler", "Output tokens per joule of the GPUs in use.", unit("tokens_per_joule"),
           figure("tokens_per_joule")),
    bars("Mean power", "Power of all GPUs in use, a mean over the measured time.", "watt",
         mean(figure("mean_power_watts"))),
    bars("Cost per million tokens", "Output tokens at your price per GPU-hour (--prices). GPUs without a price are "
         "absent.", "none", mean(valid(names.TOKEN_COST), MONEY), legend=f"{NAME}, {{{{currency}}}}"),
    bars("Share of the hardware's limit", "How near a run came to its roofline, and for which work.", "percentunit",
         mean(valid(names.SHARE), f"{KIND}, work"), legend=f"{{{{work}}}}: {NAME}", high=1),
    bars("Memory bandwidth used", "MBU: bytes that the roofline counts / time / peak bandwidth.", "percentunit",
         mean(valid(names.MBU), f"{KIND}, work"), legend=f"{{{{work}}}}: {NAME}", high=1),
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
    """One of what is left after the choices before it (ONE_OF); or some of it, at first all."""
    before = ONE_OF[: ONE_OF.index(name)] if name in ONE_OF else ONE_OF
    chosen = ", ".join(f'{b}="${b}"' for b in before)
    series = f"{names.VALID.name}{{{chosen}}}" if chosen else names.VALID.name
    return Variable(name, label, help_, f"label_values({series}, {name})", several=name not in ONE_OF)


OF_WORK = ", ".join(f'{label}="${label}"' for label in ONE_OF)

BOARD = Board(
    "tritonmark-generations", "Generations",
    "Sealed runs across hardware generations and compilers. `tritonmark history` serves them from results/, so they "
    "outlive Prometheus' memory; the time range does not matter.",
    (
        _choice("model", "Model", "Models that were measured or published."),
        _choice("scenario", "Scenario", "MLPerf's scenarios and this project's own."),
        _choice("load", "Load", "Rate, or requests in flight: figures at different loads are no comparison."),
        _choice("backend", "Backend", "Compilers: eager, compiled, TensorRT and so on."),
        _choice("precision", "Precision", "Of the weights."),
        _choice("source", "Source", "measured: sealed runs of your own; published: MLPerf results that you imported."),
        Variable("baseline", "Baseline GPU", "GPU that the ratios are taken against.",
                 f"label_values({names.INFO.name}{{{OF_WORK}}}, gpu)", several=False),
        Variable("compiler", "Baseline backend", "Backend that the matrices of ratios are taken against.",
                 f'label_values({names.INFO.name}{{{OF_WORK}, gpu="$baseline"}}, backend)', several=False,
                 first="torch-eager"),
        HISTORY,
    ),
    (THROUGHPUT, RATIO, LATENCY, ENERGY, VIDEO, RUNS), span="now-5m", refresh="1m",
)  # fmt: skip
