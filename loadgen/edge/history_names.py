"""What a sealed run shows Prometheus: every family and its labels, made from METRICS.

All are gauges, since a sealed run never changes. Labels are bounded: a fixed set for each run.
"""

from __future__ import annotations

from dataclasses import dataclass

from loadgen.core.metrics import METRICS, Metric
from loadgen.core.percentiles import PERCENTILES, percentile_name
from loadgen.edge.live_names import RUN_LABELS

PREFIX = "tritonmark_sealed_"
LABELS = (*RUN_LABELS, "source", "weights", "preset", "load")
STATS = ("mean", "min", *map(percentile_name, PERCENTILES), "max")
SCALED = ("qps", "tokens_per_s", "frames_per_s")  # METRICS that are shown per GPU as well
SUFFIXES = {"1/s": "", "tokens/s": "", "frames/s": "", "ratio": "_ratio", "requests": "_requests"}


@dataclass(frozen=True)
class Family:
    """One gauge. `labels` are those beside LABELS."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


def of_metric(metric: Metric) -> Family:
    """The family of a line of METRICS, in base units."""
    if metric.unit == "ns":
        return Family(f"{PREFIX}{metric.name.removesuffix('_ns')}_seconds", metric.help, ("stat",))
    return Family(PREFIX + _spelled(metric.name) + SUFFIXES.get(metric.unit, ""), metric.help)


def per_gpu(metric: Metric) -> Family:
    """The family of a line of METRICS in SCALED, divided by the number of GPUs."""
    return Family(f"{PREFIX}gpu_{_spelled(metric.name)}", f"per GPU: {metric.help}")


def _spelled(name: str) -> str:
    for short, long in (("_per_s", "_per_second"), ("_s", "_seconds")):
        if name.endswith(short):
            return name.removesuffix(short) + long
    return name


INFO = Family(f"{PREFIX}info", "1 for each run; report is a path of this server",
              ("gpu", "generation", "year", "report"))  # fmt: skip
VALID = Family(f"{PREFIX}valid", "1 where the verdict is VALID, 0 where it is INVALID")
START = Family(f"{PREFIX}start_time_seconds", "Unix time of T0")
END = Family(f"{PREFIX}end_time_seconds", "Unix time of the last response")
GPUS = Family(f"{PREFIX}gpus", "GPUs that served the run")
LIMIT = Family(f"{PREFIX}limit_seconds", "latency limit of the scenario", ("metric", "percentile"))
SHARE = Family(f"{PREFIX}limit_share_ratio", "share of the roofline's limit that was reached", ("work",))
MBU = Family(f"{PREFIX}mbu_ratio", "memory bandwidth utilisation by the roofline's bytes", ("work",))
MFU = Family(f"{PREFIX}mfu_ratio", "model FLOPs utilisation by the roofline's FLOPs", ("work",))
TOKEN_COST = Family(f"{PREFIX}cost_per_million_tokens", "by the price per GPU and hour that was given", ("currency",))
VIDEO_COST = Family(f"{PREFIX}cost_per_video", "by the price per GPU and hour that was given", ("currency",))
UNREADABLE = Family(f"{PREFIX}unreadable", "files under the results that are no sealed run; no labels")


def families() -> list[Family]:
    """Every family there can be, in the order of the documents."""
    scaled = [per_gpu(m) for m in METRICS if m.name in SCALED]
    return [INFO, VALID, START, END, GPUS, *map(of_metric, METRICS), *scaled, LIMIT, SHARE, MBU, MFU, TOKEN_COST,
            VIDEO_COST, UNREADABLE]  # fmt: skip
