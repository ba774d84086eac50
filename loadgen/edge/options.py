"""The options of a run, once: `locust -f loadgen/llm.py` and `tritonmark run` both take them from this table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loadgen.core.scenario import SAMPLE_ORDERS
from loadgen.edge import scenarios

DEFAULT = "default"  # the first of the choices of a select on the web page, where an option has no default of its own
PROGRESS_FD = "TRITONMARK_PROGRESS_FD"  # where a load process finds the pipe for its progress lines, if there is one


@dataclass(frozen=True)
class Option:
    """One option. `override` is its name for `scenarios.resolve`; None where it is not part of the scenario."""

    flag: str
    help: str
    type: type = str
    default: Any = None
    choices: Iterable[str] | None = None
    override: str | None = None

    @property
    def dest(self) -> str:
        return self.flag[2:].replace("-", "_")

    @property
    def form_choices(self) -> tuple[str, ...] | None:
        """Choices as Locust's parser and page have them: a page sends the first of a list that has no default."""
        if self.choices is None or self.default is not None:
            return self.choices and tuple(self.choices)
        return (DEFAULT, *self.choices)

    def of(self, options: Any) -> Any:
        """Its value among parsed options; None where the default is asked for by name."""
        value = getattr(options, self.dest)
        return None if value == DEFAULT and self.choices else value


OPTIONS: tuple[Option, ...] = (
    Option("--model", "model name in the Triton repository", default="phi-2-tiny"),
    Option("--scenario", "MLPerf scenario", default="server", choices=tuple(scenarios.names())),
    Option("--preset", "smoke (seconds) or mlperf (MLPerf's minimums)", default="smoke", choices=scenarios.PRESETS),
    Option("--target-qps", "arrival rate of server, expected rate of offline (1/s)", float, override="target_qps"),
    Option("--split", "shares of the servers, where --host names several: 2,1 (default: equal)"),
    Option("--concurrency", "requests in flight of the concurrency scenario", int, override="concurrency"),
    Option("--min-queries", "least number of queries (default: the preset's)", int, override="min_queries"),
    Option("--rules", "MLPerf round: seeds, benchmarks, limits (default v6.1)", choices=scenarios.RULES,
           override="rules"),
    Option("--benchmark", "MLPerf benchmark whose limits count (default: the nearest to the model)",
           choices=tuple(scenarios.benchmarks()), override="benchmark"),
    Option("--sample-order", "with replacement, or whole passes (default: the rules' for mlperf, else uniform)",
           choices=SAMPLE_ORDERS, override="sample_order"),
    Option("--output-tokens", "answer length: 64, uniform:8-64, normal:64,16, dist:BENCHMARK (default: the model's)",
           override="output_tokens"),
    Option("--clip", "video models: frames, height, width, steps, guidance, seed, such as frames=9,steps=4",
           override="clip"),
    Option("--max-in-flight", "cap of open requests: server sheds and counts, offline waits", int,
           override="max_in_flight"),
    Option("--warmup", "requests before the measurement (default 4; video 1)", int, override="warmup"),
    Option("--request-timeout", "seconds for a whole request (default 600; video 3600)", float, override="timeout_s"),
    Option("--arrivals", "arrivals of server (default poisson)", choices=scenarios.ARRIVALS, override="arrivals"),
    Option("--schedule-seed", "seed of the arrivals (default: MLPerf's of the round)", int, override="schedule_seed"),
    Option("--ttft-ms", "limit on time to first token, at the scenario's percentile", float, override="ttft_ms"),
    Option("--tpot-ms", "limit on time per output token", float, override="tpot_ms"),
    Option("--e2e-ms", "limit on end-to-end latency", float, override="e2e_ms"),
    Option("--prompts", "JSONL, JSON (ShareGPT) or Parquet file, or synthetic (default: the built-in library)",
           override="prompts"),
    Option("--max-prompts", "prompts taken of the file, or made (default: all; 1024 synthetic ones)", int,
           override="max_prompts"),
    Option("--input-tokens", "exact length of synthetic prompts: 128, uniform:64-256, normal:256,64, dist:BENCHMARK",
           override="input_tokens"),
    Option("--tokenizer", "tokenizer.json of the served model, for synthetic prompts", override="tokenizer"),
    Option("--prompt-seed", "seed of synthetic prompts and of drawn lengths (default 0)", int, override="prompt_seed"),
    Option("--salt", "a few tokens before each prompt, new in each run, against prefix caches (default on)",
           choices=("on", "off"), override="salt"),
    Option("--salt-seed", "salt from this seed and not from the run: equal prompts for an A/B pair", int,
           override="salt_seed"),
    Option("--reference", "accuracy: JSONL with prompts and the token ids they should give, from an export",
           override="reference"),
    Option("--min-agreement", "accuracy: least share of reference tokens before an answer leaves it, 0 to 1", float,
           override="min_agreement"),
    Option("--results", "folder for sealed runs", default="results"),
    Option("--gpu-probe", "JSON of `tritonmark probe-gpu`: measured bandwidth, sealed, and used for rooflines"),
    Option("--hardware", "label of the server's hardware (default: probed where the server is local)"),
    Option("--metrics-port", "Prometheus metrics of each load process: auto (first free from 9464), a port or off",
           default="auto"),
    Option("--metrics-bind", "address that metrics are served on; 0.0.0.0 for scrapers elsewhere", default="127.0.0.1"),
    Option("--telemetry", "power and clocks: auto, nvml, off, or the URL of a DCGM exporter's or Triton's metrics",
           default="auto"),
    Option("--telemetry-hz", "samples per second of NVML and host", float, default=5.0),
    Option("--gpus", "GPUs of the host that serve, such as 0,1: only they are described, and their energy counts"
           " (default: all are described, those that worked count)"),
    Option("--server-metrics", "Triton's metrics page: auto (HTTP port + 2, or 8002), a URL (one a server) or off",
           default="auto"),
)  # fmt: skip
