"""The options of a run, once: `locust -f loadgen/llm.py` and `tritonmark run` both take them from this table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loadgen.edge import scenarios

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


OPTIONS: tuple[Option, ...] = (
    Option("--model", "model name in the Triton repository", default="phi-2-tiny"),
    Option("--scenario", "MLPerf scenario", default="server", choices=tuple(scenarios.names())),
    Option("--preset", "smoke (seconds) or mlperf (MLPerf's minimums)", default="smoke", choices=scenarios.PRESETS),
    Option("--target-qps", "arrival rate of server, expected rate of offline (1/s)", float, override="target_qps"),
    Option("--concurrency", "requests in flight of the concurrency scenario", int, override="concurrency"),
    Option("--min-queries", "least number of queries (default: the preset's)", int, override="min_queries"),
    Option("--output-tokens", "tokens asked of each request (default: the model's)", int, override="output_tokens"),
    Option("--max-in-flight", "cap of open requests: server sheds and counts, offline waits", int,
           override="max_in_flight"),
    Option("--warmup", "requests before the measurement (default 4)", int, override="warmup"),
    Option("--request-timeout", "seconds for a whole request (default 600)", float, override="timeout_s"),
    Option("--arrivals", "arrivals of server (default poisson)", choices=scenarios.ARRIVALS, override="arrivals"),
    Option("--schedule-seed", "seed of the arrivals (default: MLPerf's of the round)", int, override="schedule_seed"),
    Option("--ttft-ms", "limit on time to first token, at the scenario's percentile", float, override="ttft_ms"),
    Option("--tpot-ms", "limit on time per output token", float, override="tpot_ms"),
    Option("--e2e-ms", "limit on end-to-end latency", float, override="e2e_ms"),
    Option("--prompts", "JSONL file with a text a line (default: the built-in library)", override="prompts"),
    Option("--results", "folder for sealed runs", default="results"),
    Option("--hardware", "label of the server's hardware (default: probed where the server is local)"),
)  # fmt: skip
