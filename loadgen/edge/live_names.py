"""What a running load test shows Prometheus: every family, its type, its labels and its buckets, in one list.

Families over requests come from METRICS (`Metric.live`): the metric's name in base units behind a prefix. The other
families tell where the run stands, how the client does and what the hardware does; no sealed metric stands behind them.

Labels are bounded: the six of the run, and a few fixed words. Error texts and prompts are never labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loadgen.core.metrics import METRICS, Metric, metrics_of
from loadgen.core.record import Outcome

PREFIX = "tritonmark_client_"
RUN_LABELS = ("scenario", "model", "backend", "precision", "hardware", "run")
LABEL_CHARS = 120  # of a label that a user may have written

# Every limit of the MLPerf rules but one (450 ms) is an edge, and neighbours are at most 1.5 apart, up to 10 minutes.
LATENCY_BUCKETS_S = tuple(float(f"{m}e{k}") for k in range(-3, 3) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)
                          if float(f"{m}e{k}") <= 600)  # fmt: skip
HEALTH_BUCKETS_S = tuple(float(f"{m}e{k}") for k in range(-4, 2) for m in (1, 2, 5) if float(f"{m}e{k}") <= 10)


@dataclass(frozen=True)
class Family:
    """One metric family. `labels` are those beside RUN_LABELS; `buckets` (s) belong to a histogram."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def with_samples(self, samples: list[list[Any]], run_labels: tuple[str, ...]) -> dict[str, Any]:
        """As plain types for the endpoint's process.

        A sample is [values of `labels`, value], of a histogram [values of `labels`, counts a bucket, sum in s].
        """
        return {
            "name": self.name, "kind": self.kind, "help": self.help, "labels": [*RUN_LABELS, *self.labels],
            "buckets": list(self.buckets), "samples": [[[*run_labels, *s[0]], *s[1:]] for s in samples],
        }  # fmt: skip


def of_metric(metric: Metric) -> Family:
    """The live family of a line of METRICS whose `live` is not empty."""
    name = PREFIX + metric.name.removesuffix("_ns")
    if metric.live == "histogram":
        return Family(f"{name}_seconds", "histogram", metric.help, (), LATENCY_BUCKETS_S)
    return Family(f"{name}_total", metric.live, metric.help)


def of_requests(family: str) -> list[tuple[Metric, Family]]:
    """The live lines of METRICS that runs of this family (`llm` or `video`) have."""
    return [(m, of_metric(m)) for m in metrics_of({family}) if m.live]


def _run(name: str, kind: str, help_: str, *labels: str) -> Family:
    return Family(PREFIX + name, kind, help_, labels)


REQUESTS = _run("requests_total", "counter", f"measured requests that ended: {', '.join(Outcome)}", "outcome")
OVER_LIMIT = _run("over_limit_total", "counter", "requests over that latency limit; failed ones are over", "metric")
LIMIT = _run("limit_seconds", "gauge", "latency limit in force at the percentile", "metric", "percentile")
HEALTH_LIMIT = _run("health_limit_seconds", "gauge", "p99 of a load worker's dispatch_lateness or loop_lag above which "
                    "the run is INVALID", "of")  # fmt: skip
VERDICT = _run("verdict_ok", "gauge", "1 while no failure and no latency makes the run INVALID; at the end the verdict")
PHASE = _run("phase", "gauge", "1 for the phase the run is in: warmup, measure, drain, seal, sealed", "phase")
IN_FLIGHT = _run("in_flight", "gauge", "requests between their dispatch and their end")
TARGET = _run("target_qps", "gauge", "requests per second asked for")
ACHIEVED = _run("achieved_qps", "gauge", "requests dispatched per second, over about the last 5 s")
SCHEDULED = _run("scheduled_requests", "gauge", "slots of an open-loop schedule")
SENT = _run("sent_requests_total", "counter", "slots dispatched so far, shed ones included")
WORKERS = _run("workers", "gauge", "load workers of the run")
LOST = _run("workers_lost", "gauge", "load workers that stopped answering")
ELAPSED = _run("elapsed_seconds", "gauge", "time since T0")
START = _run("start_time_seconds", "gauge", "Unix time of T0")
END = _run("end_time_seconds", "gauge", "Unix time of sealing; absent before")
INFO = _run("info", "gauge", "1; what the run is, and the folder of its report", "weights", "preset", "report")
RUN = (REQUESTS, OVER_LIMIT, LIMIT, HEALTH_LIMIT, VERDICT, PHASE, IN_FLIGHT, TARGET, ACHIEVED, SCHEDULED, SENT, WORKERS,
       LOST, ELAPSED, START, END, INFO)  # fmt: skip


def _worker(name: str, kind: str, help_: str, buckets: tuple[float, ...] = ()) -> Family:
    return Family(f"tritonmark_worker_{name}", kind, help_, ("worker",), buckets)


WORKER_IN_FLIGHT = _worker("in_flight", "gauge", "open requests of this load worker")
WORKER_SENT = _worker("sent_requests_total", "counter", "slots this load worker dispatched")
WORKER_LATENESS = _worker("dispatch_lateness_seconds", "histogram", "how late an open-loop slot was dispatched",
                          HEALTH_BUCKETS_S)  # fmt: skip
WORKER_LAG = _worker("loop_lag_seconds", "histogram", "how late the event loop wakes a greenlet", HEALTH_BUCKETS_S)
WORKER_CPU = _worker("cpu_seconds_total", "counter", "CPU time of the load worker's process since it began")
WORKER_CPU_RATIO = _worker("cpu_ratio", "gauge", "share of one core that the load worker uses, over the last second")
WORKER_MEMORY = _worker("resident_memory_bytes", "gauge", "resident memory of the load worker's process")
WORKER = (WORKER_IN_FLIGHT, WORKER_SENT, WORKER_LATENESS, WORKER_LAG, WORKER_CPU, WORKER_CPU_RATIO, WORKER_MEMORY)


def _gpu(name: str, help_: str, kind: str = "gauge", *labels: str) -> Family:
    return Family(f"tritonmark_gpu_{name}", kind, help_, ("gpu", *labels))


# column of telemetry.parquet → family; `throttle` is a bit mask, shown as a 0/1 gauge a reason
GPU: dict[str, Family] = {
    "power_w": _gpu("power_watts", "power draw"),
    "energy_j": _gpu("energy_joules_total", "the GPU's own energy counter", "counter"),
    "power_limit_w": _gpu("power_limit_watts", "power limit in force"),
    "utilisation": _gpu("utilization_ratio", "share of time in which a kernel was running"),
    "memory_used_bytes": _gpu("memory_used_bytes", "GPU memory in use"),
    "sm_clock_hz": _gpu("sm_clock_hertz", "clock of the multiprocessors"),
    "memory_clock_hz": _gpu("memory_clock_hertz", "clock of the memory"),
    "temperature_c": _gpu("temperature_celsius", "temperature of the GPU"),
    "sm_active": _gpu("sm_active_ratio", "share of time in which a multiprocessor had a warp (DCGM)"),
    "dram_active": _gpu("dram_active_ratio", "share of time in which memory was read or written (DCGM)"),
    "tensor_active": _gpu("tensor_active_ratio", "share of time in which tensor cores were busy (DCGM)"),
    "throttle": _gpu("throttled", "1 while the driver names this reason for lower clocks", "gauge", "reason"),
}
HOST: dict[str, Family] = {
    "cpu_utilisation": Family("tritonmark_host_cpu_ratio", "gauge", "busy share of all cores of the server's host"),
    "host_memory_used_bytes": Family(
        "tritonmark_host_memory_used_bytes", "gauge", "memory in use on the server's host"
    ),
    "power_w": Family("tritonmark_host_cpu_power_watts", "gauge", "power of all CPU packages of the server's host"),
}


def all_families() -> list[Family]:
    """Every family there can be, in the order of the documents."""
    return [*(of_metric(m) for m in METRICS if m.live), *RUN, *WORKER, *GPU.values(), *HOST.values()]


def run_labels(document: dict[str, Any], scenario: str) -> tuple[str, ...]:
    """Values of RUN_LABELS from what is known of a run before it starts."""
    hardware = (document.get("hardware") or {}).get("label", "unknown")
    values = (scenario, document.get("model"), document.get("backend"), document.get("precision"), hardware,
              document.get("run_id"))  # fmt: skip
    return tuple(str(v or "unknown")[:LABEL_CHARS] for v in values)
