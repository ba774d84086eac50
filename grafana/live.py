"""*Live run*: what the client feels, what Triton does and what the GPU does, on one time axis, for one run."""

from __future__ import annotations

from prometheus_client.utils import floatToGoString

from grafana.gpu import GPU_ROW, fallback
from grafana.spec import Board, Mark, Panel, Query, Row, Variable
from loadgen.core.metrics import METRICS, Metric
from loadgen.core.record import Outcome
from loadgen.edge import live_names as names

RUN = 'run="$run"'
RATE = "[$__rate_interval]"
WHOLE = "[$__range]"  # the last value in the shown time; a run's series end with it
SERVER = 'model="$model", instance=~"$server"'
GOOD, WARN, BAD = "green", "orange", "red"


def last(family: names.Family, more: str = "") -> str:
    """The family's last value in the shown time."""
    return f"last_over_time({family.name}{{{RUN}{more}}}{WHOLE})"


def series(family: names.Family, more: str = "") -> str:
    return f"{family.name}{{{RUN}{more}}}"


def rate(family: names.Family, more: str = "") -> str:
    return f"rate({series(family, more)}{RATE})"


def quantile(q: float, name: str, selector: str = RUN, by: str = "") -> str:
    """Quantile over the last moments; NaN while nothing ended."""
    return f"histogram_quantile({q:g}, sum by (le{by}) (rate({name}_bucket{{{selector}}}{RATE})))"


def completed(q: float, name: str) -> str:
    """Quantile of the requests that completed: failed ones count as slower than any, in the open last bucket, and a
    quantile that falls there is answered with that bucket's lower end, 600 s, which nobody measured."""

    def of(le: str) -> str:
        return f"sum by (le) (rate({name}_bucket{{{RUN}, le{le}}}{RATE}))"

    top = of(f'="{floatToGoString(names.LATENCY_BUCKETS_S[-1])}"')
    finite = of('!="+Inf"')
    return f'histogram_quantile({q:g}, {finite} or label_replace({top}, "le", "+Inf", "", ""))'


def latency(metric: Metric) -> Panel:
    """Percentiles of one line of METRICS against its limit, where it has one."""
    family, short = names.of_metric(metric), metric.name.removesuffix("_ns")
    limits = ()
    if short in ("ttft", "tpot", "e2e"):
        limit = series(names.LIMIT, f', metric="{short}"')
        limits = (Query(f"max by (percentile) ({limit})", "limit at {{percentile}}", limit=True),)
    lines = tuple(Query(completed(q, family.name), f"p{q * 100:g}") for q in (0.5, 0.9, 0.99))
    only = {"llm": " Text only.", "video": " Video only."}.get(metric.family, "")
    return Panel(
        metric.label,
        f"{_sentence(metric.help)}. Percentiles of the requests that completed in the last few seconds, as exact as "
        f"their buckets; how many failed stands above. The sealed report counts those as slower than any.{only}",
        "s", (*lines, *limits),
    )  # fmt: skip


def _share(short: str) -> str:
    """p99 of a run as a share of its limit, at most 2: where requests failed, p99 is a bucket without an upper end."""
    p99 = f"histogram_quantile(0.99, sum by (le) (tritonmark_client_{short}_seconds_bucket{{{RUN}}}))"
    limit = series(names.LIMIT, f', metric="{short}"')
    return f"clamp_max({p99} / on() group_right() max by (metric) ({limit}), 2)"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _counter(name: str) -> names.Family:
    return names.of_metric(next(m for m in METRICS if m.name == name))


NOW = Row("Run", (
    Panel("Verdict so far", "1 while no failure and no latency makes the run INVALID; after sealing, the verdict. "
          "Minimum length and the client's own health are judged at the end only.", "none",
          (Query(last(names.VERDICT), "verdict"),), "stat", 4, 4, base=BAD, steps=((1, GOOD),),
          words={"0": ("INVALID", BAD), "1": ("OK", GOOD)}),
    Panel("Phase", "Where the run stands: warmup, measure, drain, seal, sealed. Figures count from measure on.", "none",
          (Query(f"{last(names.PHASE)} == 1", "{{phase}}"),), "stat", 4, 4, named=True, base="blue"),
    Panel("Elapsed", "Time since T0, the start of the measured part.", "s",
          (Query(last(names.ELAPSED), "elapsed"),), "stat", 3, 4, base="blue"),
    Panel("Ended well", "Measured requests with outcome ok.", "none",
          (Query(last(names.REQUESTS, ', outcome="ok"'), "ok"),), "stat", 3, 4, base="blue"),
    Panel("Failed", "Share of measured requests that did not end ok: error, timeout, shed by the client's own cap, or "
          "cut off. Any failure makes a run INVALID.", "percentunit",
          (Query(f'sum(last_over_time({names.REQUESTS.name}{{{RUN}, outcome!="ok"}}{WHOLE})) / '
                 f"sum(last_over_time({names.REQUESTS.name}{{{RUN}}}{WHOLE}))", "failed"),),
          "stat", 3, 4, steps=((1e-9, BAD),)),
    Panel("Over the limit", "Share of measured requests over each latency limit. A limit at p99 allows 1 %.",
          "percentunit",
          (Query(f"{last(names.OVER_LIMIT)} / on(run) group_left() "
                 f"sum by (run) (last_over_time({names.REQUESTS.name}{{{RUN}}}{WHOLE}))", "{{metric}}"),),
          "stat", 4, 4, steps=((0.005, WARN), (0.01, BAD))),
    Panel("Workers lost", "Load workers that stopped answering; their part of the load is not sent.", "none",
          (Query(last(names.LOST), "lost"),), "stat", 3, 4, steps=((1, BAD),)),
    Panel("Run", "Which run this is, and the folder of its sealed report.", "none",
          (Query(last(names.INFO), table=True),), "table", 24, 4,
          columns={"model": "Model", "scenario": "Scenario", "backend": "Backend", "precision": "Precision",
                   "weights": "Weights", "hardware": "Hardware", "preset": "Preset", "run": "Run", "report": "Report"},
          link=("Run", "Open the report, once it is sealed", "${history:raw}/report/${__value.raw}")),
))  # fmt: skip

LATENCY = Row("Latency against its limit (client)", (
    *(latency(m) for m in METRICS if m.live == "histogram" and m.family == "llm"),
    *(latency(m) for m in METRICS if m.live == "histogram" and not m.family),
    Panel("p99 of its limit", "99th percentile of the whole run so far as a share of the limit in force, failed "
          "requests as slower than any. Over 100 % the run is INVALID; more than 200 % is drawn as 200 %.",
          "percentunit", tuple(Query(_share(m), "{{metric}}") for m in ("ttft", "tpot", "e2e")), high=None,
          steps=((0.8, WARN), (1, BAD))),
))  # fmt: skip

VIDEO = Row("Video (client)", (
    *(latency(m) for m in METRICS if m.live == "histogram" and m.family == "video"),
    Panel("Frames and steps", "Frames and denoising steps of completed videos per second.", "cps",
          (Query(rate(_counter("frames_out")), "frames"), Query(rate(_counter("steps")), "steps"))),
))  # fmt: skip

LOAD = Row("Load (client)", (
    Panel("Rate", "Requests dispatched per second over about 5 s, against the rate asked for. A gap means that the "
          "client cannot keep up, or, in a closed loop, that the server sets the pace.", "reqps",
          (Query(series(names.ACHIEVED), "achieved"), Query(series(names.TARGET), "target", limit=True))),
    Panel("Outcomes", f"Measured requests that ended per second, by outcome: {', '.join(Outcome)}.", "reqps",
          (Query(f"sum by (outcome) ({rate(names.REQUESTS)})", "{{outcome}}"),), stacked=True),
    Panel("In flight", "Requests between dispatch and end. Growth without end means that the server is slower than the "
          "arrivals.", "none", (Query(series(names.IN_FLIGHT), "in flight"),)),
    Panel("Tokens", "Tokens of completed requests per second, by the server's count.", "suffix: tokens/s",
          (Query(rate(_counter("tokens_out")), "out"), Query(rate(_counter("tokens_in")), "in"))),
    Panel("Progress", "Slots sent, shed ones included, against the slots of an open-loop schedule.", "none",
          (Query(series(names.SENT), "sent"), Query(series(names.SCHEDULED), "scheduled", limit=True))),
    Panel("Over the limit, per second", "Requests over each latency limit per second; failed ones are over.", "reqps",
          (Query(rate(names.OVER_LIMIT), "{{metric}}"),)),
))  # fmt: skip


def _mean_us(name: str) -> str:
    """Mean ms of a cumulative µs counter of Triton, per request."""
    return (f"sum(rate(nv_inference_{name}_duration_us{{{SERVER}}}{RATE})) / "
            f"sum(rate(nv_inference_request_success{{{SERVER}}}{RATE})) / 1e6")  # fmt: skip


FIRST_RESPONSE = "nv_inference_first_response_histogram_ms"
SERVER_ROW = Row("Triton", (
    Panel("Where the server's time goes", "Mean per request: queue, input, inference, output. For a streaming model "
          "inference ends when execute returns, long before the last token: see the runtime's own gauges then.", "s",
          tuple(Query(_mean_us(n), n.replace("_", " ")) for n in
                ("queue", "compute_input", "compute_infer", "compute_output")), stacked=True),
    Panel("Pending", "Requests that Triton holds and that no instance took yet.", "none",
          (Query(f"sum(nv_inference_pending_request_count{{{SERVER}}})", "pending"),)),
    Panel("Batch", "Mean batch: inferences per execution. Runtimes that batch by themselves show 1 here, and their "
          "batch under running sequences.", "none",
          (Query(f"sum(rate(nv_inference_count{{{SERVER}}}{RATE})) / "
                 f"sum(rate(nv_inference_exec_count{{{SERVER}}}{RATE}))", "batch"),)),
    Panel("Requests in the server", "Requests that succeeded and failed per second, by Triton's count.", "reqps",
          (Query(f"sum(rate(nv_inference_request_success{{{SERVER}}}{RATE}))", "success"),
           Query(f"sum by (reason) (rate(nv_inference_request_failure{{{SERVER}}}{RATE}))", "{{reason}}"))),
    Panel("Sequences in the runtime", "Sequences in the running batch and those that wait for room in it, as the "
          "served runtime counts them.", "none",
          (Query(f"sum(tritonmark_requests_running{{{SERVER}}})", "running"),
           Query(f"sum(tritonmark_requests_waiting{{{SERVER}}})", "waiting"))),
    Panel("KV cache", "Share of the KV cache that is in use. At 100 % sequences wait or are put back.", "percentunit",
          (Query(f"max(tritonmark_kv_cache_usage_ratio{{{SERVER}}})", "in use"),), high=1,
          steps=((0.9, WARN),)),
    Panel("Tokens in the runtime", "Tokens generated and prompt tokens accepted per second, cancelled requests "
          "included.", "suffix: tokens/s",
          (Query(f"sum(rate(tritonmark_tokens_out_total{{{SERVER}}}{RATE}))", "out"),
           Query(f"sum(rate(tritonmark_tokens_in_total{{{SERVER}}}{RATE}))", "in"))),
    Panel("First response (Triton 2.52 or later)", "Time to the first response as Triton sees it, without the network. "
          "Triton 2.51 and earlier do not have it; needs --metrics-config histogram_latencies=true.", "ms",
          tuple(Query(quantile(q, FIRST_RESPONSE, SERVER), f"p{q * 100:g}") for q in (0.5, 0.99))),
    Panel("Server's host", "Busy share of all cores of the server's host: by the load generator where the server is "
          "local, else by Triton.", "percentunit",
          (Query(fallback(f"max({series(names.HOST['cpu_utilisation'])})",
                          'max(nv_cpu_utilization{instance=~"$server"})'), "CPU"),), high=1,
          steps=((0.9, WARN),)),
))  # fmt: skip

HEALTH = Row("Client health", (
    Panel("Dispatch lateness", "How late slots were dispatched, 99th percentile of each load worker. Over 5 ms, or 1 % "
          "of the tightest limit where that is more, the run is INVALID: the client was the bottleneck.", "s",
          (Query(quantile(0.99, names.WORKER_LATENESS.name, by=", worker"), "worker {{worker}}"),
           Query(series(names.HEALTH_LIMIT, ', of="dispatch_lateness"'), "limit"))),
    Panel("Event-loop lag", "How late the event loop wakes a greenlet, 99th percentile of each load worker. Arrivals "
          "closer than this cannot be told apart; over the limit the run is INVALID.", "s",
          (Query(quantile(0.99, names.WORKER_LAG.name, by=", worker"), "worker {{worker}}"),
           Query(series(names.HEALTH_LIMIT, ', of="loop_lag"'), "limit"))),
    Panel("Client CPU", "Share of one core that each load worker uses. Over 85 % a worker adds latency of its own: use "
          "more workers.", "percentunit", (Query(series(names.WORKER_CPU_RATIO), "worker {{worker}}"),), high=1,
          steps=((0.6, WARN), (0.85, BAD))),
    Panel("Sent by each worker", "Slots that each load worker dispatches per second; they are dealt out in turn, so "
          "the lines lie together.", "reqps", (Query(rate(names.WORKER_SENT), "worker {{worker}}"),)),
    Panel("In flight by worker", "Open requests of each load worker.", "none",
          (Query(series(names.WORKER_IN_FLIGHT), "worker {{worker}}"),)),
    Panel("Client memory", "Resident memory of each load worker.", "bytes",
          (Query(series(names.WORKER_MEMORY), "worker {{worker}}"),)),
))  # fmt: skip

HISTORY = Variable("history", "History", "Where this browser reaches tritonmark history, which shows a run's report.",
                   text="http://127.0.0.1:9465")  # fmt: skip
BOARD = Board(
    "tritonmark-live", "Live run",
    "One load test as it runs: the client's latencies against their limits, Triton, GPUs and the client's own health.",
    (
        Variable("run", "Run", "A run that was scraped; the newest first.",
                 f"label_values({names.PHASE.name}, run)", several=False, newest=True),
        Variable("model", "Model", "The run's model, as Triton names it.",
                 f'label_values({names.PHASE.name}{{run="$run"}}, model)', several=False, hidden=True),
        Variable("server", "Triton", "Servers of that model.",
                 'label_values(nv_inference_count{model="$model"}, instance)'),
        Variable("gpus", "GPU exporter", "Whom to ask for power and clocks that the load generator has not sampled.",
                 'label_values({__name__=~"DCGM_FI_DEV_POWER_USAGE|nv_gpu_power_usage"}, instance)'),
        HISTORY,
    ),
    (NOW, LATENCY, LOAD, SERVER_ROW, GPU_ROW, HEALTH, VIDEO),
    (
        Mark("Run start", f"max by (run, scenario, model) (last_over_time({names.START.name}[$__range])) * 1000",
             "blue", "{{scenario}} of {{model}} begins: {{run}}"),
        Mark("Run end", f"max by (run, scenario, model) (last_over_time({names.END.name}[$__range])) * 1000",
             "purple", "{{scenario}} of {{model}} is sealed: {{run}}"),
    ),
)  # fmt: skip
