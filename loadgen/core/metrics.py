"""Records → Summary. `METRICS` is the one table of names, units, directions and formulas.

Code, reports, docs and dashboards read this table; a metric that is not in it does not exist. Percentiles are
LoadGen's, `sorted[floor(n * p)]` without interpolation, over *every* measured row: a failed request counts as slower
than any that completed, so failures can never make a run look fast. An infinite percentile is None in a summary.

"from due" starts the clock when the schedule wanted the request sent (MLPerf's rule, no coordinated omission); "from
send" starts it when the bytes left, hides client and queueing delay, and is shown beside it for comparison only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from loadgen.core import clips
from loadgen.core.dependence import Float
from loadgen.core.honesty import beside
from loadgen.core.percentiles import PERCENTILES as PERCENTILES
from loadgen.core.percentiles import GapHistogram as GapHistogram
from loadgen.core.percentiles import Summary as Summary
from loadgen.core.percentiles import describe as describe
from loadgen.core.percentiles import percentile_name as percentile_name
from loadgen.core.record import NEVER, Bool, Int64, Outcome, Rows
from loadgen.core.scenario import Kind, Limits, Scenario
from loadgen.core.split import by_server

SMALL = ("seq", "query", "sample", "worker", "server", "tokens_out", "asked_out")  # columns that 32 bits hold


@dataclass(frozen=True)
class Context:
    """What formulas may ask for besides the rows."""

    kind: Kind
    limits: Limits
    joules: float | None = None  # of the devices in use over the window of `window_ns`; None: not measured
    watts: float | None = None

    def window_ns(self, rows: Rows) -> int:
        """From T0 to the last response of the run: the honest window, in which every counted token was made."""
        done = rows.done_ns[rows.ok]
        return int(done.max()) if len(done) else 0

    def loadgen_window_ns(self, rows: Rows) -> int:
        """LoadGen's window: for Server, to the completion of the query *scheduled* last; otherwise as `window_ns`."""
        ok = np.flatnonzero(rows.ok)
        if self.kind is not Kind.SERVER or not len(ok):
            return self.window_ns(rows)
        last = ok[np.lexsort((rows.seq[ok], rows.due_ns[ok]))[-1]]
        return int(rows.done_ns[last])


def ttft(rows: Rows) -> Int64:
    return (rows.first_ns - rows.due_ns)[_answered(rows)]


def tpot(rows: Rows) -> Int64:
    """LoadGen's integer division; one-token answers have no TPOT."""
    some = _answered(rows) & (rows.tokens_out > 1)
    return ((rows.done_ns - rows.first_ns)[some] // (rows.tokens_out[some] - 1)).astype(np.int64)


def query_latency(rows: Rows) -> Int64:
    """Per query: from due to the end of its last sample. A query with a failed sample is left out here."""
    if np.array_equal(rows.query, rows.seq):  # one sample a query
        return (rows.done_ns - rows.due_ns)[rows.ok]
    queries, index = np.unique(rows.query, return_inverse=True)
    latency = np.full(len(queries), NEVER)
    np.maximum.at(latency, index, rows.done_ns - rows.due_ns)
    failed = np.zeros(len(queries), dtype=bool)
    failed[index[~rows.ok]] = True
    return latency[~failed]


def gaps(rows: Rows) -> Int64:
    """Times between consecutive responses of the same stream, pooled over completed rows, in ns."""
    if not len(rows.chunk_ns):
        return np.empty(0, dtype=np.int64)
    steps = np.diff(rows.chunk_ns)
    row_of_chunk = np.repeat(np.arange(len(rows)), np.diff(rows.chunk_offsets))
    keep = (row_of_chunk[1:] == row_of_chunk[:-1]) & rows.ok[row_of_chunk[1:]]
    return np.asarray(steps[keep])


def within_limits(rows: Rows, limits: Limits) -> Bool:
    """Rows that completed inside every limit that is set, jointly: the numerator of goodput."""
    good = rows.ok.copy()
    if limits.ttft_ns is not None:
        good &= (rows.first_ns != NEVER) & (rows.first_ns - rows.due_ns <= limits.ttft_ns)
    if limits.tpot_ns is not None:
        decode = np.where(rows.tokens_out > 1, (rows.done_ns - rows.first_ns) // np.maximum(rows.tokens_out - 1, 1), 0)
        good &= decode <= limits.tpot_ns
    if limits.e2e_ns is not None:
        good &= rows.done_ns - rows.due_ns <= limits.e2e_ns
    return good


def peak_in_flight(rows: Rows) -> int:
    """Most requests that were between send and done at one time."""
    sent = np.sort(rows.sent_ns[rows.sent_ns != NEVER])
    done = np.sort(rows.done_ns[(rows.sent_ns != NEVER) & (rows.done_ns != NEVER)])
    # at equal times an end comes before a start
    open_ = np.arange(1, len(sent) + 1) - np.searchsorted(done, sent, "right")
    return int(open_.max(initial=0))


def _answered(rows: Rows) -> Bool:
    return np.asarray(rows.ok & (rows.first_ns != NEVER))


def _rate(amount: float, window_ns: int) -> float | None:
    return amount / (window_ns / 1e9) if window_ns > 0 else None


Values = Int64 | float | int | None


@dataclass(frozen=True)
class Metric:
    """One line of the table: `unit` "ns" is a distribution over rows, everything else one number for the run.

    `family` is `llm` or `video` where only such runs have it. `of_responses` marks a formula that reads chunks: it is
    given one batch of rows after the other. `of_power` marks one that needs telemetry: a run without it lacks the line.
    `live` says what a running test shows Prometheus of it: "histogram", "counter" or "" (nothing).
    """

    name: str
    label: str
    unit: str
    better: str  # "lower", "higher" or "" where neither is better
    help: str
    formula: Callable[[Rows, Context], Values]
    family: str = ""
    of_responses: bool = False
    of_power: bool = False
    live: str = ""


METRICS: tuple[Metric, ...] = (
    Metric("ttft_ns", "TTFT", "ns", "lower", "time to first token: first response with a token − due",
           lambda r, c: ttft(r), "llm", live="histogram"),
    Metric("tpot_ns", "TPOT", "ns", "lower", "time per output token: (done − first) / (output tokens − 1), per request",
           lambda r, c: tpot(r), "llm", live="histogram"),
    Metric("itl_ns", "ITL", "ns", "lower",
           "inter-token latency: gaps between consecutive responses, pooled; a response may carry several tokens",
           lambda r, c: gaps(r), "llm", live="histogram"),
    Metric("start_ns", "Start", "ns", "lower", "first response, sent after text encoding, − due; queueing counts",
           lambda r, c: ttft(r), "video", live="histogram"),
    Metric("step_ns", "Step", "ns", "lower", "s/step: gap from one denoising step's response to the next, pooled",
           lambda r, c: clips.step_gaps(r), "video", True, live="histogram"),
    Metric("denoise_ns", "Denoise", "ns", "lower", "all denoising steps of a video",
           lambda r, c: clips.denoise(r), "video", True),
    Metric("decode_ns", "Decode", "ns", "lower", "last step − the video: VAE decoding, making and sending the answer",
           lambda r, c: clips.decode(r), "video", True),
    Metric("e2e_ns", "E2E", "ns", "lower", "end-to-end latency: done − due",
           lambda r, c: (r.done_ns - r.due_ns)[r.ok], live="histogram"),
    Metric("query_ns", "Query", "ns", "lower", "query latency: end of the query's last sample − due",
           lambda r, c: query_latency(r)),
    Metric("ttft_sent_ns", "TTFT from send", "ns", "lower", "first response with a token − send; hides client delay",
           lambda r, c: (r.first_ns - r.sent_ns)[_answered(r)], "llm", live="histogram"),
    Metric("e2e_sent_ns", "E2E from send", "ns", "lower", "done − send; hides client delay",
           lambda r, c: (r.done_ns - r.sent_ns)[r.ok], live="histogram"),
    Metric("qps", "QPS", "1/s", "higher", "completed requests / time from T0 to the last response",
           lambda r, c: _rate(int(r.ok.sum()), c.window_ns(r))),
    Metric("tokens_per_s", "tokens/s", "tokens/s", "higher",
           "output tokens of completed requests / time to the last response",
           lambda r, c: _rate(int(r.tokens_out[r.ok].sum()), c.window_ns(r)), "llm"),
    Metric("frames_per_s", "frames/s", "frames/s", "higher", "frames of completed videos / time to the last response",
           lambda r, c: _rate(int(r.tokens_out[r.ok].sum()), c.window_ns(r)), "video"),
    Metric("seconds_per_video", "s/video", "s", "lower", "time to the last response / completed videos",
           lambda r, c: c.window_ns(r) / 1e9 / int(r.ok.sum()) if r.ok.any() else None, "video"),
    Metric("loadgen_qps", "QPS (LoadGen)", "1/s", "higher",
           "LoadGen's figure: for Server (completed − 1) / completion time of the query scheduled last",
           lambda r, c: _rate(int(r.ok.sum()) - (c.kind is Kind.SERVER), c.loadgen_window_ns(r))),
    Metric("loadgen_tokens_per_s", "tokens/s (LoadGen)", "tokens/s", "higher",
           "LoadGen's figure: all tokens / completion time of the query scheduled last",
           lambda r, c: _rate(int(r.tokens_out[r.ok].sum()), c.loadgen_window_ns(r)), "llm"),
    Metric("goodput_qps", "goodput", "1/s", "higher", "requests inside all latency limits / time to the last response",
           lambda r, c: _rate(int(within_limits(r, c.limits).sum()), c.window_ns(r))),
    Metric("goodput_share", "goodput share", "ratio", "higher", "requests inside all latency limits / all scheduled",
           lambda r, c: float(within_limits(r, c.limits).mean()) if len(r) else None),
    Metric("duration_s", "duration", "s", "", "from T0 to the last response", lambda r, c: c.window_ns(r) / 1e9),
    Metric("scheduled", "scheduled", "requests", "", "measured rows: ok + error + timeout + shed + cut",
           lambda r, c: len(r)),
    Metric("queries", "queries", "queries", "", "measured queries", lambda r, c: len(np.unique(r.query))),
    Metric("completed", "completed", "requests", "higher", "rows with outcome ok", lambda r, c: int(r.ok.sum())),
    Metric("failed", "failed", "requests", "lower", "rows with any other outcome", lambda r, c: int((~r.ok).sum())),
    Metric("tokens_in", "tokens in", "tokens", "", "prompt tokens of completed requests, by the server's count",
           lambda r, c: int(r.tokens_in[r.ok & (r.tokens_in != NEVER)].sum()), live="counter"),
    Metric("tokens_out", "tokens out", "tokens", "higher",
           "output tokens of completed requests, by the server's count",
           lambda r, c: int(r.tokens_out[r.ok].sum()), "llm", live="counter"),
    Metric("frames_out", "frames", "frames", "higher", "frames of completed videos, by the server's count",
           lambda r, c: int(r.tokens_out[r.ok].sum()), "video", live="counter"),
    Metric("steps", "steps", "steps", "", "denoising steps of completed videos",
           lambda r, c: clips.steps(r), "video", True, live="counter"),
    Metric("tokens_per_response", "tokens/response", "tokens", "",
           "mean tokens in a response; 1 means that ITL is a true inter-token gap",
           lambda r, c: float(r.chunk_tokens.mean()) if len(r.chunk_tokens) else None, "llm"),
    Metric("energy_joules", "energy", "J", "lower",
           "energy of the GPUs in use (else the CPU packages) from T0 to the last response",
           lambda r, c: c.joules, of_power=True),
    Metric("mean_power_watts", "mean power", "W", "lower", "the same energy / that time, summed over devices",
           lambda r, c: c.watts, of_power=True),
    Metric("tokens_per_joule", "tokens/J", "tokens/J", "higher", "output tokens of completed requests / energy",
           lambda r, c: int(r.tokens_out[r.ok].sum()) / c.joules if c.joules else None, "llm", of_power=True),
    Metric("joules_per_video", "J/video", "J", "lower", "energy / completed videos",
           lambda r, c: c.joules / int(r.ok.sum()) if c.joules and r.ok.any() else None, "video", of_power=True),
    Metric("peak_in_flight", "peak in flight", "requests", "", "most requests between send and done",
           lambda r, c: peak_in_flight(r)),
)  # fmt: skip


def summarise(batches: Iterable[Rows], scenario: Scenario, servers: int = 1) -> tuple[Summary, Rows]:
    """Folds batches of rows into a summary; also returns the measured rows without their chunk lists.

    Memory: see `join`; it does not depend on the number of tokens, since chunks are folded batch by batch.
    """
    histogram, counts = GapHistogram(), np.zeros(2, dtype=np.int64)  # tokens, and responses that carried them
    context = Context(scenario.kind, scenario.limits)
    metrics = [m for m in metrics_of({scenario.family}) if not m.of_power]
    folded: dict[str, list[Any]] = {m.name: [] for m in metrics if m.of_responses}

    def measured() -> Iterator[Rows]:
        for batch in batches:
            rows = select(batch, batch.measured)
            histogram.add(gaps(rows))
            counts[:] += int(rows.chunk_tokens.sum()), len(rows.chunk_tokens)
            for metric in metrics:
                if metric.of_responses:
                    folded[metric.name].append(metric.formula(rows, context))
            yield rows

    rows = join(measured())
    tokens, responses = counts.tolist()
    summary: Summary = {}
    for metric in metrics:
        if metric.of_responses:
            parts = folded[metric.name]
            whole = np.concatenate(parts) if metric.unit == "ns" else sum(parts)
            summary[metric.name] = _described(metric, rows, whole) if metric.unit == "ns" else int(whole)
        elif metric.name == "itl_ns":
            summary[metric.name] = histogram.describe()
        elif metric.name == "tokens_per_response":
            summary[metric.name] = tokens / responses if responses else None
        elif metric.unit == "ns":
            summary[metric.name] = _described(metric, rows, np.asarray(metric.formula(rows, context)))
        else:
            summary[metric.name] = metric.formula(rows, context)
    columns = latency_columns(rows) if scenario.family == "llm" else {"e2e_ns": latency_columns(rows)["e2e_ns"]}
    summary |= beside(rows, columns, context.window_ns(rows), ordered=context.kind is not Kind.OFFLINE)
    if scenario.family == "video":  # what a row counts are frames
        summary["intervals"]["frames_per_s"] = summary["intervals"].pop("tokens_per_s")
        figures = summary["steady_state"]["summary"]
        figures["frames_per_s"] = figures.pop("tokens_per_s")
    summary["outcomes"] = {o.value: int(rows.ended(o).sum()) for o in Outcome}
    if servers > 1:
        summary["servers"] = by_server(rows, servers)
    return summary, rows


def metrics_of(families: set[str]) -> list[Metric]:
    """The lines of the table that runs of these families (`llm`, `video`) have."""
    return [m for m in METRICS if not m.family or m.family in families]


def power_figures(rows: Rows, scenario: Scenario, joules: float, watts: float) -> Summary:
    """The lines of the table that telemetry makes possible, for measured `rows`."""
    context = Context(scenario.kind, scenario.limits, joules, watts)
    return {m.name: m.formula(rows, context) for m in metrics_of({scenario.family}) if m.of_power}


def _described(metric: Metric, rows: Rows, values: Int64) -> Summary:
    return describe(values, 0 if metric.name == "step_ns" else _failures(metric.name, rows, len(values)))


def latency_columns(rows: Rows) -> dict[str, Float]:
    """TTFT, TPOT and E2E of every row in ns: +inf for a failed row, NaN where there is none (TPOT of one token)."""
    answered = _answered(rows)
    present = {"ttft_ns": answered, "tpot_ns": answered & (rows.tokens_out > 1), "e2e_ns": rows.ok}
    values = {"ttft_ns": ttft(rows), "tpot_ns": tpot(rows), "e2e_ns": (rows.done_ns - rows.due_ns)[rows.ok]}
    columns = {name: np.where(rows.ok, np.nan, np.inf) for name in present}
    for name, where in present.items():
        columns[name][where] = values[name]
    return columns


def _failures(name: str, rows: Rows, present: int) -> int:
    """How many infinite values stand behind `present` finite ones: failed rows, or queries with a failed sample."""
    if name == "query_ns":
        return len(np.unique(rows.query)) - present
    return int((~rows.ok).sum())


def select(rows: Rows, keep: Bool) -> Rows:
    """The rows where `keep` is true, chunks included."""
    lengths = np.diff(rows.chunk_offsets)
    chunk_keep = np.repeat(keep, lengths)
    columns = {f.name: getattr(rows, f.name)[keep] for f in fields(Rows) if not f.name.startswith("chunk_")}
    offsets = np.concatenate([[0], np.cumsum(lengths[keep])])
    return Rows(**columns, chunk_offsets=offsets, chunk_ns=rows.chunk_ns[chunk_keep],
                chunk_tokens=rows.chunk_tokens[chunk_keep])  # fmt: skip


def join(batches: Iterable[Rows]) -> Rows:
    """The rows of all batches as one, in due order, without their chunks. Raises ValueError when there is no batch.

    Memory: about 80 bytes a row. Columns grow in place and are sorted one after the other; small numbers have 32 bits.
    """
    columns: dict[str, Any] = {}
    n = 0
    for rows in batches:
        for name in (f.name for f in fields(Rows) if not f.name.startswith("chunk_")):
            values = getattr(rows, name)
            if name not in columns:
                columns[name] = np.empty(0, np.int32 if name in SMALL else values.dtype)
            if len(columns[name]) < n + len(values):  # memory that is not written yet does not exist yet
                grown = np.empty(2 * (n + len(values)), columns[name].dtype)
                grown[:n] = columns[name][:n]
                columns[name] = grown
            columns[name][n : n + len(values)] = values
        n += len(rows)
    if not columns:
        raise ValueError("no batches to join")
    order = np.lexsort((columns["seq"][:n], columns["due_ns"][:n]))
    for name in columns:
        columns[name] = columns[name][:n][order]
    empty = np.empty(0, dtype=np.int64)
    none = np.broadcast_to(np.int64(0), n + 1)  # takes no memory
    return Rows(**columns, chunk_offsets=none, chunk_ns=empty, chunk_tokens=empty)
