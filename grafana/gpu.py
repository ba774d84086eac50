"""What GPUs do, from whoever tells it: the load generator's own samples, else DCGM's exporter, else Triton.

The three have other names and units; everything is brought to watts, hertz, bytes, ratios (0 to 1) and the labels
`instance` (who told it) and `gpu`. Sources are not mixed: the second is asked only where the first says nothing.
"""

from __future__ import annotations

from grafana.spec import Panel, Query, Row
from loadgen.edge.live_names import GPU, HOST

OR = "\nor on () "
RUN = 'run="$run"'
EXPORTER = 'instance=~"$gpus"'
RATE = "[$__rate_interval]"
WARN, BAD = "orange", "red"


def fallback(*expressions: str) -> str:
    """The first of these that has any series."""
    return OR.join(expressions)


def own(column: str) -> str:
    return f"max by (instance, gpu) ({GPU[column].name}{{{RUN}}})"


def dcgm(field: str, scale: str = "", selector: str = EXPORTER) -> str:
    """A field of DCGM's exporter, with `scale` such as "* 1e6" for MHz."""
    return f"max by (instance, gpu) ({field}{{{selector}}}{' ' if scale else ''}{scale})"


def triton(metric: str, selector: str = EXPORTER) -> str:
    """A `nv_gpu_*` of Triton; its GPUs have a UUID in place of a number."""
    return f'max by (instance, gpu) (label_replace({metric}{{{selector}}}, "gpu", "$1", "gpu_uuid", "(.*)"))'


def _lines(*expressions: str) -> Query:
    return Query(fallback(*expressions), "GPU {{gpu}} ({{instance}})")


MHZ, PERCENT, MIB, NS = "* 1e6", "/ 100", "* 1048576", "/ 1e9"
POWER = ("DCGM_FI_DEV_POWER_USAGE", "nv_gpu_power_usage")
USE = ("DCGM_FI_DEV_GPU_UTIL", "nv_gpu_utilization")

TOTAL = fallback(*(f"sum({x})" for x in (own("power_w"), dcgm(POWER[0]), triton(POWER[1]))))


def _violation(field: str, reason: str) -> str:
    share = f"max by (instance, gpu) (rate({field}{{{EXPORTER}}}{RATE}) {NS})"
    return f'label_replace({share}, "reason", "{reason}", "", "")'


GPU_ROW = Row("GPU", (
    Panel("Power", "Power draw of each GPU, and the limit in force. At the limit a GPU works as it was sold; energy "
          "per token is in the sealed report.", "watt",
          (_lines(own("power_w"), dcgm(POWER[0]), triton(POWER[1])),
           Query(fallback(f"max({GPU['power_limit_w'].name}{{{RUN}}})", f"max(nv_gpu_power_limit{{{EXPORTER}}})"),
                 "limit", limit=True))),
    Panel("SM clock", "Clock of the multiprocessors. A fall under steady load is throttling, for power or for heat.",
          "hertz", (_lines(own("sm_clock_hz"), dcgm("DCGM_FI_DEV_SM_CLOCK", MHZ)),)),
    Panel("Throttling", "1 while the driver names this reason for lower clocks; from DCGM the share of time.",
          "percentunit",
          (Query(fallback(f"max by (instance, gpu, reason) ({GPU['throttle'].name}{{{RUN}}})",
                          f"({_violation('DCGM_FI_DEV_POWER_VIOLATION', 'power')} or "
                          f"{_violation('DCGM_FI_DEV_THERMAL_VIOLATION', 'thermal')})"),
                 "{{reason}}, GPU {{gpu}} ({{instance}})"),), high=1, steps=((0.01, WARN),)),
    Panel("Utilisation", "Share of time in which any kernel ran. 100 % does not mean that the GPU is full: see SM, "
          "tensor and memory activity.", "percentunit",
          (_lines(own("utilisation"), dcgm(USE[0], PERCENT), triton(USE[1])),), high=1),
    Panel("SM active", "Share of time in which a multiprocessor had a warp. Datacenter GPUs, by DCGM only.",
          "percentunit", (_lines(own("sm_active"), dcgm("DCGM_FI_PROF_SM_ACTIVE")),), high=1),
    Panel("Memory traffic", "Share of time in which GPU memory was read or written: near 100 %, decoding is bound by "
          "bandwidth. By DCGM only.", "percentunit",
          (_lines(own("dram_active"), dcgm("DCGM_FI_PROF_DRAM_ACTIVE")),), high=1),
    Panel("Tensor cores", "Share of time in which tensor cores were busy. By DCGM only.", "percentunit",
          (_lines(own("tensor_active"), dcgm("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE")),), high=1),
    Panel("GPU memory", "GPU memory in use: weights, KV cache and workspaces. Triton and engines reserve most of it at "
          "the start.", "bytes",
          (_lines(own("memory_used_bytes"), dcgm("DCGM_FI_DEV_FB_USED", MIB), triton("nv_gpu_memory_used_bytes")),)),
    Panel("Temperature", "Temperature of each GPU.", "celsius",
          (_lines(own("temperature_c"), dcgm("DCGM_FI_DEV_GPU_TEMP")),), steps=((83, WARN), (90, BAD))),
    Panel("Joules per output token", "Power of all GPUs / output tokens per second, now: lower is better. The sealed "
          "report integrates power over exactly the measured time.", "joule",
          (Query(f"({TOTAL}) / sum(rate(tritonmark_client_tokens_out_total{{{RUN}}}{RATE}))", "J/token"),)),
    Panel("CPU packages", "Power of the CPU packages of the server's host, where Linux lets this user read it (RAPL).",
          "watt", (Query(f"{HOST['power_w'].name}{{{RUN}}}", "CPU packages"),)),
    Panel("Host memory", "Memory in use on the server's host.", "bytes",
          (Query(fallback(f"max({HOST['host_memory_used_bytes'].name}{{{RUN}}})",
                          'max(nv_cpu_memory_used_bytes{instance=~"$server"})'), "host"),)),
))  # fmt: skip
