"""*Fleet*: all hosts at once: which are up, what their Tritons and GPUs do, which runs are on, what is wrong."""

from __future__ import annotations

from grafana.gpu import MHZ, MIB, PERCENT, POWER, RATE, USE
from grafana.live import BOARD as LIVE
from grafana.spec import Board, Panel, Query, Row, Variable
from loadgen.edge import live_names as names
from loadgen.edge.live_names import GPU

WHERE = 'hardware=~"$hardware"'
BY_HOST = "by (host, hardware, instance)"
HOST = "{{host}} {{hardware}} {{instance}}"
UP_OR_DOWN = {"0": ("down", "red"), "1": ("up", "green")}


def per_host(*expressions: str) -> str:
    """Of each host the first of these that tells of it; hosts without an inventory count as one."""
    return "\nor on (host) ".join(expressions)


def _gpu(how: str, field: str, scale: str, nv: str, column: str) -> str:
    own = f"{how} {BY_HOST} ({GPU[column].name}{{{WHERE}}})"
    asked = f"{how} {BY_HOST} ({field}{{{WHERE}}}{' ' if scale else ''}{scale})"
    return per_host(asked, *([f"{how} {BY_HOST} ({nv}{{{WHERE}}})"] if nv else []), own)


NOW = Row("All hosts", (
    Panel("Firing alerts", "Alerts of prometheus/alerts.yml that fire now; the table below names them.", "none",
          (Query('count(ALERTS{alertstate="firing"}) or vector(0)', "firing"),), "stat", 4, 5, steps=((1, "red"),)),
    Panel("Active runs", "Load tests that are not sealed yet.", "none",
          (Query(f'count(count by (run) ({names.PHASE.name}{{phase!="sealed"}} == 1)) or vector(0)', "runs"),),
          "stat", 4, 5, base="blue"),
    Panel("Targets that answer", "Share of scrape targets that answered the last scrape, by job.", "percentunit",
          (Query("avg by (job) (up)", "{{job}}"),), "stat", 8, 5, high=1, base="red", steps=((1, "green"),)),
    Panel("Power of all GPUs", "Sum over all GPUs that DCGM's exporters, else Tritons, else load generators tell of.",
          "watt", (Query(f"sum({_gpu('sum', POWER[0], '', POWER[1], 'power_w')})", "power"),), "stat", 8, 5,
          base="blue"),
    Panel("Targets", "Every scrape target over time: whether it answers.", "none",
          (Query("up", "{{job}} {{host}} {{instance}}"),), "states", 12, 9, base="red", steps=((1, "green"),),
          words=UP_OR_DOWN),
    Panel("Alerts", "Alerts that fire or are pending now. Rules: prometheus/alerts.yml.", "none",
          (Query("ALERTS", table=True),), "table", 12, 9, low=None,
          columns={"alertname": "Alert", "alertstate": "State", "severity": "Severity", "job": "Job", "host": "Host",
                   "instance": "Target", "gpu": "GPU", "model": "Model", "run": "Run"}),
    Panel("Runs", "Load tests that were scraped in the shown time, and the phase each was last in. The run opens in "
          "*Live run*.", "none",
          (Query(f"last_over_time({names.PHASE.name}{{{WHERE}}}[$__range]) == 1", table=True),), "table", 24, 7,
          columns={"run": "Run", "scenario": "Scenario", "model": "Model", "backend": "Backend",
                   "precision": "Precision", "hardware": "Hardware", "phase": "Phase"},
          link=("Run", "Open in Live run", f"/d/{LIVE.uid}?var-run=${{__value.raw}}&${{__url_time_range}}")),
))  # fmt: skip

TRITON = Row("Triton of each host", (
    Panel("Requests", "Requests that succeeded per second, by host and model.", "reqps",
          (Query(f"sum by (host, hardware, instance, model) (rate(nv_inference_request_success{{{WHERE}}}{RATE}))",
                 "{{model}} " + HOST),)),
    Panel("Pending", "Requests that Triton holds and no instance took yet.", "none",
          (Query(f"sum {BY_HOST} (nv_inference_pending_request_count{{{WHERE}}})", HOST),)),
    Panel("Failures", "Requests that failed per second, by reason.", "reqps",
          (Query(f"sum by (host, instance, reason) (rate(nv_inference_request_failure{{{WHERE}}}{RATE}))",
                 "{{reason}} {{host}} {{instance}}"),)),
    Panel("Queue", "Mean time a request waits in Triton.", "s",
          (Query(f"sum {BY_HOST} (rate(nv_inference_queue_duration_us{{{WHERE}}}{RATE})) / "
                 f"sum {BY_HOST} (rate(nv_inference_request_success{{{WHERE}}}{RATE})) / 1e6", HOST),)),
    Panel("Sequences running", "Sequences in the running batches of this project's runtime.", "none",
          (Query(f"sum {BY_HOST} (tritonmark_requests_running{{{WHERE}}})", HOST),)),
    Panel("CPU", "Busy share of all cores of each Triton's host, by Triton.", "percentunit",
          (Query(f"max {BY_HOST} (nv_cpu_utilization{{{WHERE}}})", HOST),), high=1),
))  # fmt: skip

GPUS = Row("GPUs of each host", (
    Panel("Power", "Power of all GPUs of a host.", "watt",
          (Query(_gpu("sum", POWER[0], "", POWER[1], "power_w"), HOST),)),
    Panel("Utilisation", "Mean over a host's GPUs of the share of time in which a kernel ran.", "percentunit",
          (Query(_gpu("avg", USE[0], PERCENT, USE[1], "utilisation"), HOST),), high=1),
    Panel("GPU memory", "GPU memory in use, all GPUs of a host.", "bytes",
          (Query(_gpu("sum", "DCGM_FI_DEV_FB_USED", MIB, "nv_gpu_memory_used_bytes", "memory_used_bytes"), HOST),)),
    Panel("Lowest SM clock", "Clock of the slowest GPU of a host: with tensor parallelism the others wait for it.",
          "hertz", (Query(_gpu("min", "DCGM_FI_DEV_SM_CLOCK", MHZ, "", "sm_clock_hz"), HOST),)),
    Panel("Hottest GPU", "Temperature of the hottest GPU of a host.", "celsius",
          (Query(_gpu("max", "DCGM_FI_DEV_GPU_TEMP", "", "", "temperature_c"), HOST),),
          steps=((83, "orange"), (90, "red"))),
    Panel("Throttled by heat", "Share of time in which a host's GPUs were held back by temperature, by DCGM.",
          "percentunit",
          (Query(f"max {BY_HOST} (rate(DCGM_FI_DEV_THERMAL_VIOLATION{{{WHERE}}}{RATE}) / 1e9)", HOST),), high=1,
          steps=((0.01, "orange"),)),
))  # fmt: skip

BOARD = Board(
    "tritonmark-fleet", "Fleet", "All hosts: what answers, what is wrong, what Tritons and GPUs do, which runs are on.",
    (Variable("hardware", "Hardware", "Hosts with this hardware label; those without a label count as All only.",
              "label_values(hardware)"),),
    (NOW, TRITON, GPUS), LIVE.marks,
)  # fmt: skip
