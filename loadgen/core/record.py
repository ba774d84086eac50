"""One row per slot, whether or not it succeeded: the contract between load, metrics, report and comparison.

A *slot* (due time and sample) becomes a *request*, a request becomes a `Record`, and everything later is a fold over
records. No derived value is stored: latencies, rates and verdicts are recomputed from these columns by `metrics.py`.

Times are integer nanoseconds of one monotonic clock, relative to the start T0 of the run, so `due_ns` of the first
slot is 0 and warm-up rows are negative. Python holds "never happened" as None, Parquet as null, numpy as `NEVER`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

SCHEMA_VERSION = 1
NEVER = int(np.iinfo(np.int64).min)

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class Outcome(StrEnum):
    """How a slot ended. Every slot has exactly one outcome, and only `OK` has a latency that may count as fast."""

    OK = "ok"
    ERROR = "error"  # refused, reset, HTTP error, error event, stream that ended early
    TIMEOUT = "timeout"
    SHED = "shed"  # never sent: the in-flight cap was reached
    CUT = "cut"  # in flight when the run was stopped


OUTCOMES = tuple(Outcome)  # their order is the code in numpy columns


class Phase(StrEnum):
    """Warm-up rows stay in the file and out of the summary."""

    WARMUP = "warmup"
    MEASURE = "measure"


@dataclass(frozen=True)
class Column:
    """One column of `records.parquet`: its name, its type in Arrow's words, and what it means."""

    name: str
    type: str
    meaning: str


SCHEMA: tuple[Column, ...] = (
    Column("seq", "int64", "slot number in the schedule of the whole run"),
    Column("query", "int64", "query the sample belongs to (MultiStream: 8 samples a query; otherwise = seq)"),
    Column("sample", "int64", "index into the prompt library"),
    Column("worker", "int16", "Locust worker that owned the slot"),
    Column("server", "int16", "server it went to: index into run.json's servers; 0 where there is one"),
    Column("phase", "string", "warmup or measure"),
    Column("due_ns", "int64", "when the schedule wanted the request sent"),
    Column("sent_ns", "int64", "when its first byte was handed to the socket (connect time lies before it)"),
    Column("first_ns", "int64", "arrival of the first response that carried a token; video: of the first response"),
    Column("done_ns", "int64", "arrival of the end of the stream, or of the failure"),
    Column("tokens_in", "int32", "prompt tokens as the server counted them"),
    Column("tokens_out", "int32", "output tokens (video: frames), summed from the server's count in each response"),
    Column("usage_out", "int32", "output tokens by the server's final usage; differs from tokens_out on a mismatch"),
    Column("asked_out", "int32", "output tokens (video: frames) the request asked for"),
    Column("asked_in", "int32", "prompt tokens the prompt was made to have; null for a text of any length"),
    Column("chunk_ns", "list<int64>", "arrival of each response that carried tokens; video: of every response"),
    Column("chunk_tokens", "list<int32>", "tokens in each of those responses; video: frames, 0 for a denoising step"),
    Column("outcome", "string", "ok, error, timeout, shed or cut"),
    Column("error", "string", "class and text of the failure"),
)


@dataclass(slots=True)
class Answer:
    """What a server said, kept in accuracy mode only: the pieces of its text, and its token ids."""

    text: list[str] = field(default_factory=list)
    token_ids: array[int] = field(default_factory=lambda: array("i"))


@dataclass(slots=True)
class KeptClip:
    """What is kept of the first few videos: a JPEG contact sheet, and what the server said of its stages."""

    jpeg: bytes
    facts: dict[str, float | int | str]


@dataclass(slots=True)
class Record:
    """A row while it is being made. `chunk_ns` and `chunk_tokens` are typed arrays: 12 bytes a token, no objects."""

    seq: int
    query: int
    sample: int
    worker: int
    phase: Phase
    due_ns: int
    asked_out: int
    asked_in: int | None = None
    server: int = 0
    sent_ns: int | None = None
    first_ns: int | None = None
    done_ns: int | None = None
    tokens_in: int | None = None
    tokens_out: int = 0
    usage_out: int | None = None
    chunk_ns: array[int] = field(default_factory=lambda: array("q"))
    chunk_tokens: array[int] = field(default_factory=lambda: array("i"))
    outcome: Outcome = Outcome.CUT
    error: str | None = None
    answer: Answer | None = None  # no column: accuracy mode writes it to a file of its own
    clip: KeptClip | None = None  # no column either


@dataclass(frozen=True)
class Rows:
    """Records as numpy columns, the form in which formulas read them.

    All arrays have one entry a row, except `chunk_ns` and `chunk_tokens`, which hold every response of row i at
    `chunk_offsets[i]:chunk_offsets[i + 1]`. `measured` and `ok` are what formulas ask of phase and outcome.
    """

    seq: Int64
    query: Int64
    sample: Int64
    worker: Int64
    server: Int64
    measured: Bool
    due_ns: Int64
    sent_ns: Int64
    first_ns: Int64
    done_ns: Int64
    tokens_in: Int64
    tokens_out: Int64
    usage_out: Int64
    asked_out: Int64
    asked_in: Int64
    outcome: npt.NDArray[np.int8]  # index into OUTCOMES
    chunk_offsets: Int64
    chunk_ns: Int64
    chunk_tokens: Int64

    def __len__(self) -> int:
        return len(self.seq)

    @property
    def ok(self) -> Bool:
        """Rows that completed."""
        return self.ended(Outcome.OK)

    def ended(self, outcome: Outcome) -> Bool:
        """Rows with this outcome."""
        return np.asarray(self.outcome == OUTCOMES.index(outcome))
