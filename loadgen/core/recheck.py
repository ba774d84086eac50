"""A LoadGen detail log, worked out again from its own figures: verdict, discards, schedule, honest throughput.

A log holds no latencies, only counts, percentiles and seeds; what follows from them is recomputed and compared with
what the log says. What cannot follow (how many TTFTs were over the limit) is left as None, never guessed.

`Log` is the parsed file: key → its first value. Logs of v4.1 to v6.1 differ in a few keys, which are all optional.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loadgen.core.early_stopping import max_overlatency, shortfall
from loadgen.core.loadgen_log import (
    SIX_DIGITS,
    Log,
    due_times,
    late_counts,
    over_limit_bounds,
    power_window_s,
    same_rate,
    samples_of,
)
from loadgen.core.loadgen_verdict import discards, divide
from loadgen.core.scenario import Kind, Seeds

MOST_QUERIES = 500_000_000  # half a minute


@dataclass
class Recheck:
    """What a log says and what follows from it. `differences` are sentences; an empty list is a consistent log.

    Rates are per second, windows in seconds. `honest_*` divide by the time until the last response (power_end), where
    LoadGen divides by the completion of the query scheduled last; `ratio` is true window / window used.
    """

    scenario: str
    mode: str
    queries: int
    logged_verdict: str | None = None
    verdict: str | None = None
    discards: int | None = None
    logged_discards: int | None = None
    schedule_ns: int | None = None
    logged_schedule_ns: int | None = None
    schedule_match: str = "skipped"  # exact, rounded (target_qps has six digits), different, skipped
    scheduled_per_s: float | None = None
    completed_per_s: float | None = None
    tokens_per_s: float | None = None
    used_window_s: float | None = None
    true_window_s: float | None = None
    ratio: float | None = None
    honest_samples_per_s: float | None = None
    honest_tokens_per_s: float | None = None
    seeds_of: str | None = None  # the round whose seeds these are
    written_by: str = "LoadGen"
    errors: int = 0
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """Whether this result counts: VALID by both, and nothing contradicts. An accuracy log has no verdict."""
        return self.verdict in (None, "VALID") and self.logged_verdict in (None, "VALID") and not self.differences

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"valid": self.valid}


def recheck(log: Log, rounds: Mapping[str, Seeds], errors: int = 0) -> Recheck:
    """Everything about one log. Raises KeyError or ValueError where it is not a LoadGen detail log."""
    kind = Kind(log["effective_scenario"])
    out = Recheck(
        kind.value, str(log.get("effective_test_mode", "")), int(log.get("result_query_count", 0)), errors=errors
    )
    out.written_by = "Tritonmark" if "tritonmark_notice" in log else "LoadGen"
    _seeds(log, rounds, out)
    if "result_validity" not in log:
        if out.mode == "AccuracyOnly":
            out.notes.append("an accuracy run: it has no verdict")
        else:
            out.differences.append("no result in this log: the test did not end")
        return out
    if errors:
        out.notes.append(f"{errors} error lines: LoadGen calls such a run unusable for submission")
    _early_stopping(log, kind, out)
    if kind is Kind.SERVER:
        _schedule(log, out)
    _rates(log, kind, out)
    _verdict(log, kind, out)
    return out


def _seeds(log: Log, rounds: Mapping[str, Seeds], out: Recheck) -> None:
    names = ("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed")
    seen = tuple(log.get(f"effective_{name}") for name in names)
    out.seeds_of = next((name for name, s in rounds.items() if (s.qsl, s.sample, s.schedule) == seen), None)
    if out.seeds_of is None:
        out.notes.append("seeds are those of no MLPerf round that this tool knows")


def _early_stopping(log: Log, kind: Kind, out: Recheck) -> None:
    """Discard counts of Single- and MultiStream from n alone; Server's 'need N more' from the count over the limit."""
    p, n = float(log.get("effective_target_latency_percentile", 0.99)), out.queries
    texts = {k: str(log[k]) for k in log if re.fullmatch(r"early_stopping_(ttft_|tpot_)?result", k)}
    if kind in (Kind.SINGLE_STREAM, Kind.MULTI_STREAM):
        out.discards = discards(n, p)
        found = [re.search(r"discard (\d+) highest", text) for text in texts.values()]
        out.logged_discards = next((int(m[1]) for m in found if m), None)
        if out.discards != out.logged_discards:
            out.differences.append(f"early stopping discards {out.discards} of {n}, the log says {out.logged_discards}")
    elif kind is Kind.SERVER:
        for key, text in texts.items():
            _server_text(log, key, text, n, p, out)


def _server_text(log: Log, key: str, text: str, n: int, p: float, out: Recheck) -> None:
    found = re.search(r"at least (\d+)\s+more queries", text)
    more = int(found[1]) if found else 0
    if key == "early_stopping_result":
        need = shortfall(n, min(int(log["result_overlatency_query_count"]), n), p)
        if need != more:
            out.differences.append(f"early stopping needs {need} more queries, the log says {more}")
        return
    name = "TTFT" if "ttft" in key else "TPOT"
    least, most = over_limit_bounds(log, name, n)
    if not text:
        if log.get("early_stopping_met"):
            out.differences.append(f"early stopping of {name} was not tested, yet it is said to be met")
        return
    allowed = max_overlatency(n, p)
    if (not more and least > allowed) or (more and most <= allowed):
        said = f"{more} more queries needed" if more else "passed"
        out.differences.append(
            f"early stopping of {name}: {least} to {most} over the limit, {allowed} allowed, but {said}"
        )
    late = next((t for t in late_counts(n, more, p) if least <= t <= most), None) if more else 0
    if late is None:
        out.differences.append(f"early stopping of {name}: no count over the limit needs {more} more than {n} queries")


def _schedule(log: Log, out: Recheck) -> None:
    """Server's due times again from seed, rate and count; LoadGen logs the due time of the query after the last."""
    count, logged = log.get("generated_query_count"), log.get("generated_query_duration")
    qps, seed = log.get("effective_target_qps"), log.get("effective_schedule_rng_seed")
    if count is None or logged is None or not qps or seed is None or int(count) > MOST_QUERIES:
        out.notes.append("schedule not recomputed: the log lacks seed, rate or count, or there are too many queries")
        return
    last, following = due_times(float(qps), (min(out.queries, int(count)) - 1, int(count)), int(seed))
    out.schedule_ns, out.logged_schedule_ns = following, int(logged)
    off = abs(out.schedule_ns - int(logged)) / max(int(logged), 1)
    out.schedule_match = (
        "exact" if off == 0 else "rounded" if off <= SIX_DIGITS + count / max(logged, 1) else "different"
    )
    if out.schedule_match == "rounded":
        out.notes.append(f"schedule off by {off:.1e}: target_qps {qps} is logged with six digits, the run had more")
    if out.schedule_match == "different":
        out.differences.append(f"schedule lasts {out.schedule_ns} ns for this seed, rate and count, not {logged}")
    if out.schedule_match == "exact":
        _schedule_rate(log, out, last)


def _schedule_rate(log: Log, out: Recheck, last_ns: int) -> None:
    rate = divide(out.queries - 1, last_ns / 1e9)
    logged = log.get("result_scheduled_samples_per_sec")
    if logged is not None and not same_rate(rate, logged):
        out.differences.append(f"scheduled {rate:.6g} samples/s by the seed, the log says {logged}")


def _rates(log: Log, kind: Kind, out: Recheck) -> None:
    n = samples_of(log, kind)
    out.scheduled_per_s = log.get("result_scheduled_samples_per_sec")
    out.completed_per_s = log.get("result_completed_samples_per_sec", log.get("result_samples_per_second"))
    out.tokens_per_s = log.get("result_completed_tokens_per_second", log.get("result_tokens_per_second"))
    out.true_window_s = power_window_s(log)
    if kind is Kind.SERVER and out.completed_per_s:
        out.used_window_s = divide(n - 1, out.completed_per_s)
    elif kind is Kind.OFFLINE and log.get("result_max_latency_ns"):
        out.used_window_s = log["result_max_latency_ns"] / 1e9
        rate = divide(n, out.used_window_s)
        if out.completed_per_s is not None and not same_rate(rate, out.completed_per_s):
            out.differences.append(
                f"{n} samples in {out.used_window_s:.3f} s are {rate:.6g}/s, not {out.completed_per_s}"
            )
    if not out.true_window_s:
        out.notes.append("no honest window: power_begin and power_end are missing, equal or unreadable")
        return
    out.honest_samples_per_s = n / out.true_window_s
    if out.used_window_s:
        out.ratio = out.true_window_s / out.used_window_s
        if out.tokens_per_s is not None:
            out.honest_tokens_per_s = out.tokens_per_s / out.ratio


def _verdict(log: Log, kind: Kind, out: Recheck) -> None:
    """LoadGen's four checks from the log's figures; None where a figure is missing."""
    names = ("result_perf_constraints_met", "result_min_duration_met", "result_min_queries_met", "early_stopping_met")
    met_by_figures = (_perf(log, kind), _duration(log, kind, out), _counts(log, kind), _stopping(log, kind, out))
    checks = dict(zip(names, met_by_figures, strict=True))
    out.logged_verdict = str(log["result_validity"])
    known = {key: met if met is not None else log.get(key) for key, met in checks.items()}
    out.verdict = "VALID" if all(met is not False for met in known.values()) else "INVALID"
    if "Tritonmark: " in str(log.get("result_invalid_reason", "")):
        out.notes.append(f"INVALID by Tritonmark's own audit: {log['result_invalid_reason']}")
        return
    for key, met in checks.items():
        if met is not None and key in log and bool(log[key]) != met:
            out.differences.append(f"{key} is {met} by the figures, the log says {bool(log[key])}")
    if out.verdict != out.logged_verdict:
        out.differences.append(f"verdict is {out.verdict} by the figures, the log says {out.logged_verdict}")


def _perf(log: Log, kind: Kind) -> bool | None:
    p = f"{float(log.get('effective_target_latency_percentile', 0.99)) * 100:.2f}"
    if kind is not Kind.SERVER:
        return None
    if not log.get("requested_use_token_latencies"):
        value = log.get(f"result_{p}_percentile_latency_ns")
        return None if value is None else value <= log["effective_target_latency_ns"]
    pairs = [(log.get(f"result_first_token_{p}_percentile_latency_ns"), "ttft"),
             (log.get(f"result_time_per_output_token_{p}_percentile_ns"), "tpot")]  # fmt: skip
    limits = [log.get(f"requested_server_{name}_latency", log.get(f"requested_{name}_latency")) for _, name in pairs]
    if any(v is None for v, _ in pairs) or None in limits:
        return None
    return all(value <= limit for (value, _), limit in zip(pairs, limits, strict=True))


def _duration(log: Log, kind: Kind, out: Recheck) -> bool | None:
    """Needs the last due (issue) time, known to six digits only; a nearer call than that is left open."""
    need = log.get("effective_min_duration_ms")
    if need is None:
        return None
    if kind is Kind.OFFLINE:
        return bool(log["result_max_latency_ns"] >= need * 10**6)
    rate = log.get("result_scheduled_samples_per_sec" if kind is Kind.SERVER else "result_qps_with_loadgen_overhead")
    if not rate or out.queries < 2:
        return True if need == 0 else None
    lasted_ms = (out.queries - 1) / rate * 1000
    return None if abs(lasted_ms - need) <= 2 * SIX_DIGITS * lasted_ms else lasted_ms >= need


def _counts(log: Log, kind: Kind) -> bool | None:
    queries, samples = log.get("effective_min_query_count"), log.get("effective_min_sample_count")
    if queries is None:
        return None
    return bool(log["result_query_count"] >= queries and samples_of(log, kind) >= (samples or 0))


def _stopping(log: Log, kind: Kind, out: Recheck) -> bool | None:
    p = float(log.get("effective_target_latency_percentile", 0.99))
    if kind is Kind.OFFLINE:
        return True
    if kind is not Kind.SERVER:
        return discards(out.queries, p) is not None
    if not log.get("requested_use_token_latencies"):
        return shortfall(out.queries, min(int(log["result_overlatency_query_count"]), out.queries), p) == 0
    allowed, met = max_overlatency(out.queries, p), []
    for name in ("TPOT", "TTFT"):
        least, most = over_limit_bounds(log, name, out.queries)
        met.append(True if most <= allowed else False if least > allowed else None)
    return False if False in met else None if None in met else True
