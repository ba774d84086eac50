"""What to do: a scenario as resolved data, complete before the first request and sealed with the run.

Names and meanings are MLPerf LoadGen's (inference rules v6.1): *SingleStream* and *MultiStream* are closed loops of
one query at a time, *Server* (and *Interactive*, the same with tighter limits) is an open Poisson process, *Offline*
makes everything due at once. *Concurrency* is ours: a fixed number of requests in flight.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

UNIFORM, EQUAL_ISSUE = "uniform", "equal-issue"  # LoadGen's default, and its sample_concatenate_permutation
SAMPLE_ORDERS = (UNIFORM, EQUAL_ISSUE)


class Kind(StrEnum):
    """How slots come about. Interactive is a Server with other limits, so it has no kind of its own."""

    SINGLE_STREAM = "SingleStream"
    MULTI_STREAM = "MultiStream"
    SERVER = "Server"
    OFFLINE = "Offline"
    CONCURRENCY = "Concurrency"

    @property
    def equal_issue(self) -> bool:
        """True where LoadGen's equal issue changes which samples are asked for."""
        return self in (Kind.SERVER, Kind.OFFLINE, Kind.SINGLE_STREAM)

    @property
    def open_loop(self) -> bool:
        """True where due times are fixed before the run."""
        return self in (Kind.SERVER, Kind.OFFLINE)


@dataclass(frozen=True)
class Limits:
    """Latency limits in ns at the scenario's percentile; None means that there is no such limit."""

    ttft_ns: int | None = None
    tpot_ns: int | None = None
    e2e_ns: int | None = None


@dataclass(frozen=True)
class Minimums:
    """What a run must reach to count: duration, queries, and LoadGen's early-stopping test."""

    duration_ns: int = 0
    queries: int = 0
    early_stopping: bool = False


@dataclass(frozen=True)
class Seeds:
    """LoadGen's three random streams; values are announced for each MLPerf round."""

    qsl: int
    sample: int
    schedule: int


@dataclass(frozen=True)
class Clip:
    """What is asked of a video model in each request: `steps` of denoising, sizes in pixels, one seed for all."""

    frames: int
    height: int
    width: int
    steps: int
    guidance: float
    seed: int = 42  # MLPerf's text-to-video reference fixes one too


@dataclass(frozen=True)
class Scenario:
    """One scenario, with every default filled in.

    `minimums` decide VALID or INVALID of this run; `mlperf` holds the minimums of the MLPerf rules, so that a shorter
    preset can say exactly what it lacks. `target_qps` is the arrival rate of Server and the expected rate of Offline.

    `prompts` is `builtin`, `synthetic` or a file; `input_tokens` (synthetic prompts only) and `output_tokens` are
    length specs (see `lengths.parse`), drawn from `prompt_seed`. `salt_seed` None means a salt from the run's id.
    `library_size` is the number of prompts, 0 until they were loaded: equal issue pads counts to multiples of it.
    `clip` is set for a video model; its frames stand where a language model's tokens do.
    """

    name: str
    kind: Kind
    preset: str
    rules: str
    benchmark: str
    percentile: float
    limits: Limits
    minimums: Minimums
    mlperf: Minimums
    seeds: Seeds
    target_qps: float | None = None
    arrivals: str = "poisson"
    concurrency: int = 1
    samples_per_query: int = 1
    max_in_flight: int = 4096
    warmup: int = 4
    output_tokens: str = "64"
    timeout_s: float = 600.0
    prompts: str = "builtin"
    max_prompts: int | None = None
    tokenizer: str | None = None
    input_tokens: str | None = None
    prompt_seed: int = 0
    salt: bool = True
    salt_seed: int | None = None
    sample_order: str = UNIFORM
    library_size: int = 0
    keep_outputs: bool = False  # accuracy mode: each prompt once, answers kept, nothing asked of speed
    reference: str | None = None
    min_agreement: float | None = None
    clip: Clip | None = None

    @property
    def family(self) -> str:
        """`llm` or `video`: which metrics there are."""
        return "video" if self.clip else "llm"

    def to_json(self) -> dict[str, Any]:
        """As plain types, for `run.json` and for the message that workers receive."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scenario:
        """The inverse of `to_json`. Raises TypeError or KeyError on a document of another schema."""
        return cls(
            **{
                **data,
                "kind": Kind(data["kind"]),
                "output_tokens": str(data["output_tokens"]),  # a number in runs sealed before lengths were specs
                "limits": Limits(**data["limits"]),
                "minimums": Minimums(**data["minimums"]),
                "mlperf": Minimums(**data["mlperf"]),
                "seeds": Seeds(**data["seeds"]),
                "clip": Clip(**data["clip"]) if data.get("clip") else None,
            }
        )
