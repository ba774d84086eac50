"""VALID or INVALID, with reasons and advice: LoadGen's checks, then the audit of the tool itself.

A reason says what was seen, the limit it broke and what to do next. Every run ends here, also one that was cut off or
in which every request failed. `Verdict.lacking` holds the same checks against MLPerf's own minimums, so that a short
preset says what it is missing instead of passing for an MLPerf-length run.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from loadgen.core.cautions import cautions
from loadgen.core.clips import frame_reasons
from loadgen.core.early_stopping import max_overlatency, min_queries
from loadgen.core.metrics import Summary, percentile_name, within_limits
from loadgen.core.reason import Reason as Reason
from loadgen.core.record import NEVER, Outcome, Rows
from loadgen.core.scenario import Kind, Limits, Minimums, Scenario
from loadgen.core.split import only_of

LATENESS_FLOOR_NS = 5_000_000  # a gevent timer on a shared machine is good to a few ms
LAG_FLOOR_NS = 10_000_000
CLOCK_LIMIT_NS = 5_000_000  # of what is not known about another host's clock
CPU_LIMIT = 0.85  # of one core; above it the Python client adds latency of its own
WORKER_TARGET_CPU = 0.6  # what advice sizes workers for


@dataclass(frozen=True)
class WorkerAudit:
    """What one load worker measured about itself during the measured window (times in ns)."""

    worker: int
    requests: int
    lateness_p50_ns: int
    lateness_p99_ns: int
    lateness_max_ns: int
    loop_lag_p50_ns: int
    loop_lag_p99_ns: int
    loop_lag_max_ns: int
    cpu_share: float  # CPU seconds / wall seconds, of one core
    max_rss_bytes: int  # most resident memory until the last response; sealing comes after
    clock_error_ns: int | None = None  # its T0 may be off by so much; 0 on the conductor's host
    silent_s: float = 0.0  # the conductor did not hear of it for so long


@dataclass(frozen=True)
class Audit:
    """The client's account of itself.

    `scheduled` slots should exist; `rows` arrived at the recorder. `wall_s` is the measured window of the dispatchers.
    `ended` is None for a run that finished by itself, else why it did not.
    """

    workers: tuple[WorkerAudit, ...]
    workers_expected: int
    scheduled: int
    rows: int
    wall_s: float
    requested_qps: float | None = None  # what the scenario asked for
    scheduled_qps: float | None = None  # what the seeded schedule came to: (slots - 1) / (last due - first due)
    achieved_qps: float | None = None  # what was sent: (sent - 1) / (last sent - first sent)
    ended: str | None = None
    left: tuple[int, ...] = ()  # workers that ended before the run did
    servers: tuple[str, ...] = ()  # where there are several

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"client_ceiling_qps": self.ceiling_qps}

    @property
    def ceiling_qps(self) -> float | None:
        """Rate at which the busiest worker would need a whole core, times the workers: the client's own limit."""
        busiest = max((w.cpu_share for w in self.workers), default=0.0)
        return self.rows / self.wall_s / busiest if busiest > 0 and self.wall_s > 0 else None

    @property
    def workers_needed(self) -> int:
        """Workers that would carry the requested rate at a comfortable CPU share."""
        cpu = sum(w.cpu_share for w in self.workers)
        done = self.rows / self.wall_s if self.wall_s > 0 else 0.0
        grow = max(1.0, self.requested_qps / done) if self.requested_qps and done > 0 else 1.0
        return max(len(self.workers) + 1, math.ceil(cpu * grow / WORKER_TARGET_CPU))


@dataclass(frozen=True)
class Verdict:
    """VALID when there are no reasons. `lacking` is empty where the run also meets MLPerf's minimums.

    `cautions` are remarks that LoadGen's rules don't know: they decide nothing.
    """

    preset: str
    reasons: tuple[Reason, ...] = ()
    lacking: tuple[Reason, ...] = field(default=())
    cautions: tuple[Reason, ...] = field(default=())

    @property
    def valid(self) -> bool:
        return not self.reasons

    @property
    def headline(self) -> str:
        """One line: the verdict, for which preset, and what it lacks for MLPerf length."""
        if not self.valid:
            return "INVALID: " + ", ".join(r.code for r in self.reasons)
        if not self.lacking:
            return f"VALID for preset {self.preset}; meets MLPerf's duration and query minimums"
        return f"VALID for preset {self.preset}; not MLPerf length: needs " + "; ".join(r.limit for r in self.lacking)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"valid": self.valid, "headline": self.headline}


def judge(summary: Summary, rows: Rows, scenario: Scenario, audit: Audit) -> Verdict:
    """The verdict on measured `rows` (no warm-up) and their `summary`."""
    reasons = [
        *_ending(rows, audit),
        *_failures(summary, rows, audit),
        *_constraints(summary, scenario),
        *_minimums(rows, summary, scenario, scenario.minimums),
        *([] if scenario.keep_outputs else _client(audit, scenario)),  # no speed is claimed
        *(frame_reasons(rows, summary["steps"], scenario.clip) if scenario.clip else _tokens(rows)),
    ]
    lacking = _minimums(rows, summary, scenario, scenario.mlperf)
    remarks = [] if scenario.keep_outputs else cautions(summary, rows, scenario, limited(scenario.limits))
    return Verdict(scenario.preset, tuple(reasons), tuple(lacking), (*remarks, *_apart(audit)))


def _apart(audit: Audit) -> list[Reason]:
    """Cautions about workers on other hosts."""
    found = []
    off = max(audit.workers, key=lambda w: w.clock_error_ns or 0, default=None)
    if off and (off.clock_error_ns or 0) > CLOCK_LIMIT_NS:
        seen = f"T0 of worker {off.worker} is known to ± {_ms(off.clock_error_ns or 0)}"
        advice = "its arrivals may be shifted by as much: bring load hosts nearer to the master"
        found.append(Reason("clock_error", seen, f"± {_ms(CLOCK_LIMIT_NS)}", advice))
    for worker in audit.workers:
        if worker.silent_s:
            seen = f"worker {worker.worker} was not heard of for {worker.silent_s:.1f} s"
            advice = "its rows are here, but its requests may have waited as well: look at the network"
            found.append(Reason("worker_silent", seen, "a message every 0.25 s", advice))
    return found


def _ending(rows: Rows, audit: Audit) -> list[Reason]:
    reasons = []
    if audit.ended:
        reasons.append(Reason("cut_off", audit.ended, "a run that ends by itself", "run it again to the end"))
    if audit.left:
        seen = f"worker {', '.join(map(str, audit.left))} of {audit.workers_expected} ended before the run did"
        reasons.append(Reason("worker_left", seen, "every worker to the end", "look at its log and run again"))
    if audit.rows < audit.scheduled:
        missing = audit.scheduled - audit.rows
        lost = audit.workers_expected - len(audit.workers)
        names = sorted(set(range(audit.workers_expected)) - {w.worker for w in audit.workers})
        which = f": {', '.join(map(str, names))}" if names else ""
        seen = (
            f"{missing} of {audit.scheduled} slots have no row ({lost} of {audit.workers_expected} workers lost{which})"
        )
        advice = "look at the load workers' logs and run again; a slot without a row may have been a slow one"
        reasons.append(Reason("missing_rows", seen, "a row for every slot", advice))
    return reasons


def _failures(summary: Summary, rows: Rows, audit: Audit) -> list[Reason]:
    if not len(rows):
        return [Reason("no_requests", "no request was measured", "at least 1", "check the server and the scenario")]
    outcomes = summary["outcomes"]
    reasons = []
    if outcomes["shed"]:
        reasons.append(
            Reason("shed", f"{outcomes['shed']} of {len(rows)} requests were never sent: in-flight cap reached", "0",
                   "lower the target QPS, or raise --max-in-flight if the client can carry more")
        )  # fmt: skip
    for name in ("error", "timeout"):
        if outcomes[name]:
            advice = "read the errors in the report and the server's log; lower the rate if the server is overloaded"
            seen = f"{outcomes[name]} of {len(rows)} requests"
            if only := only_of(rows, Outcome(name), len(audit.servers)):
                seen += f", all of them to {', '.join(audit.servers[n] for n in only)}"
            reasons.append(Reason(f"failed_{name}", seen, "0", advice))
    if outcomes["cut"]:
        advice = "the run was stopped before they ended: let it end by itself, or lower --request-timeout"
        reasons.append(Reason("unfinished", f"{outcomes['cut']} requests still in flight at the end", "0", advice))
    return reasons


def _constraints(summary: Summary, scenario: Scenario) -> list[Reason]:
    """LoadGen's performance constraints: `sorted[floor(n p)]` of each limited latency, equal allowed."""
    reasons = []
    advice = {
        "ttft_ns": "lower the target QPS; if TPOT has room, give prefill more of the server's batch",
        "tpot_ns": "lower the target QPS or the server's batch size; if TTFT has room, queue more before prefill",
        "e2e_ns": "lower the target QPS, or ask for fewer output tokens",
    }
    for metric, limit in limited(scenario.limits):
        seen = summary[metric].get(percentile_name(scenario.percentile))
        if summary["scheduled"] and (seen is None or seen > limit):
            label = f"{percentile_name(scenario.percentile)} {metric.removesuffix('_ns').upper()}"
            text = f"{label} {_ms(seen)}" if seen is not None else f"{label} lies among failed requests"
            reasons.append(Reason(f"{metric.removesuffix('_ns')}_limit", text, f"≤ {_ms(limit)}", advice[metric]))
    return reasons


def limited(limits: Limits) -> list[tuple[str, int]]:
    """Metric names and limits (ns) of the limits that are set."""
    pairs = [("ttft_ns", limits.ttft_ns), ("tpot_ns", limits.tpot_ns), ("e2e_ns", limits.e2e_ns)]
    return [(name, limit) for name, limit in pairs if limit is not None]


def run_length_ns(rows: Rows, kind: Kind) -> int:
    """What LoadGen compares with min_duration: Offline the longest latency, otherwise the last due (issue) time."""
    if not len(rows):
        return 0
    if kind is Kind.OFFLINE:
        done = rows.done_ns != NEVER
        return int((rows.done_ns - rows.due_ns)[done].max(initial=0))
    return int(rows.due_ns.max())


def _minimums(rows: Rows, summary: Summary, scenario: Scenario, minimums: Minimums) -> list[Reason]:
    reasons = []
    length, queries = run_length_ns(rows, scenario.kind), int(summary["queries"])
    if length < minimums.duration_ns:
        limit = f"≥ {minimums.duration_ns / 1e9:g} s (ran {length / 1e9:.1f} s)"
        advice = (
            "run longer" if scenario.kind is not Kind.OFFLINE else "raise the expected QPS, so more samples are sent"
        )
        reasons.append(Reason("min_duration", f"{length / 1e9:.1f} s", limit, advice))
    if queries < minimums.queries and scenario.keep_outputs:
        limit, advice = f"≥ {minimums.queries} prompts (had {queries})", "give --prompts the whole library"
        reasons.append(Reason("min_queries", f"{queries} prompts", limit, advice))
    elif queries < minimums.queries:
        limit = f"≥ {minimums.queries} queries (had {queries})"
        reasons.append(Reason("min_queries", f"{queries} queries", limit, "run longer or at a higher rate"))
    if minimums.early_stopping:
        reasons += _early_stopping(rows, queries, scenario)
    return reasons


def _early_stopping(rows: Rows, queries: int, scenario: Scenario) -> list[Reason]:
    """LoadGen's early stopping: enough queries to say with 99 % confidence that the percentile holds."""
    if scenario.kind in (Kind.OFFLINE, Kind.CONCURRENCY):
        return []
    if scenario.kind is not Kind.SERVER:
        need = min_queries(1, scenario.percentile)
        over = {"latency": 1} if max_overlatency(queries, scenario.percentile) < 1 else {}
    else:
        over = {}
        for metric, limit in limited(scenario.limits):
            single = Limits(**{metric: limit})
            count = int((~within_limits(rows, single)).sum())
            if max_overlatency(queries, scenario.percentile) < count:
                over[metric.removesuffix("_ns").upper()] = count
        need = max((min_queries(t, scenario.percentile) for t in over.values()), default=0)
    if not over:
        return []
    which = ", ".join(f"{t} over the {name} limit" for name, t in over.items()) if scenario.kind is Kind.SERVER else ""
    seen = f"{queries} queries" + (f", {which}" if which else "")
    advice = f"run at least {need - queries} more queries, with no more slow ones, or lower the rate"
    return [Reason("early_stopping", seen, f"≥ {need} queries for early stopping (had {queries})", advice)]


def lateness_limit_ns(limits: Limits) -> int:
    """5 ms, or 1 % of the tightest limit on a latency that includes it: lateness below that cannot decide a verdict."""
    bounds = [x for x in (limits.ttft_ns, limits.e2e_ns) if x is not None]
    return max(LATENESS_FLOOR_NS, min(bounds) // 100 if bounds else 0)


def lag_limit_ns(limits: Limits) -> int:
    """The same for the event loop: 10 ms at least, since the kernel stamps arrivals and lag only merges them."""
    return max(LAG_FLOOR_NS, lateness_limit_ns(limits))


def _client(audit: Audit, scenario: Scenario) -> list[Reason]:
    """Was the load generator itself the bottleneck?"""
    if not audit.workers:
        return []
    reasons = []
    limit = lateness_limit_ns(scenario.limits)
    use = f"the client is the bottleneck: use {audit.workers_needed} workers (--processes {audit.workers_needed}) "
    use += "on free cores, or a lower rate"
    late = max(audit.workers, key=lambda w: w.lateness_p99_ns)
    if scenario.kind is Kind.SERVER and late.lateness_p99_ns > limit:
        seen = f"p99 dispatch lateness {_ms(late.lateness_p99_ns)} on worker {late.worker}"
        reasons.append(Reason("client_late", seen, f"≤ {_ms(limit)}", use))
    lag, limit = max(audit.workers, key=lambda w: w.loop_lag_p99_ns), lag_limit_ns(scenario.limits)
    if lag.loop_lag_p99_ns > limit:
        seen = f"p99 event-loop lag {_ms(lag.loop_lag_p99_ns)} on worker {lag.worker}: arrivals could not be told apart"
        reasons.append(Reason("client_lag", seen, f"≤ {_ms(limit)}", use))
    busy = max(audit.workers, key=lambda w: w.cpu_share)
    if busy.cpu_share > CPU_LIMIT:
        seen = f"{busy.cpu_share:.0%} of a core on worker {busy.worker}"
        reasons.append(Reason("client_cpu", seen, f"≤ {CPU_LIMIT:.0%}", use))
    return reasons


def _tokens(rows: Rows) -> list[Reason]:
    """Token truth: the server must count tokens, its counts must agree, and fixed lengths must be kept."""
    ok, reasons = rows.ok, []
    uncounted = int((ok & (rows.tokens_out == 0)).sum())
    if uncounted:
        seen = f"{uncounted} answers without a token count"
        advice = "export the model again: its responses must carry num_output_tokens"
        reasons.append(Reason("tokens_uncounted", seen, "0", advice))
    differ = int((ok & (rows.usage_out != NEVER) & (rows.usage_out != rows.tokens_out)).sum())
    if differ:
        seen = f"{differ} answers whose final usage differs from the sum of their responses"
        reasons.append(Reason("token_mismatch", seen, "0", "the server lost or repeated responses: read its log"))
    drifted = int((ok & (rows.asked_in != NEVER) & (rows.tokens_in != rows.asked_in)).sum())
    if drifted:
        seen = f"{drifted} prompts of another length, by the server's count, than they were made to have"
        advice = "the server encodes otherwise: give --tokenizer the tokenizer.json that it uses"
        reasons.append(Reason("input_length", seen, "0", advice))
    short = int((ok & (rows.asked_out > 0) & (rows.tokens_out > 0) & (rows.tokens_out != rows.asked_out)).sum())
    if short:
        seen = f"{short} answers with another length than asked for"
        advice = "unequal work is not comparable: the model must honour min_tokens and ignore_eos"
        reasons.append(Reason("output_length", seen, "0", advice))
    return reasons


def _ms(ns: float) -> str:
    return f"{np.round(ns / 1e6, 1):g} ms"
