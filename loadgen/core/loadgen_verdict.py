"""LoadGen's own verdict and figures, from the same inputs: every fact that its detail log ends with.

`verdict.judge` says whether *we* would believe a run; this module says what MLPerf LoadGen would have written about it,
key by key and letter by letter (results.cc and test_settings_internal.cc of LoadGen 6.0.17), quirks included:

* token mode tests TPOT first and stops there when it fails, so the TTFT text stays empty;
* a one-token answer counts as no tokens at all, and its TPOT is divided by -1;
* MultiStream tests query latencies in token mode too, and SingleStream's estimate ends up being that of the TTFT;
* a mean is an unsigned division, so a negative sum of TPOTs gives a mean of about 10^19 / n.

One rule: no figure here is ours. The honest figures are in `metrics.py` and `recheck.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from loadgen.core.early_stopping import max_overlatency, min_queries, percentile_estimate, shortfall
from loadgen.core.loadgen_settings import Samples, Settings
from loadgen.core.metrics import PERCENTILES
from loadgen.core.record import Int64
from loadgen.core.scenario import Kind

Value = bool | int | float | str
Facts = dict[str, Value]

FAILED_NS = 2**63 - 1  # the latency of a request that never completed; LoadGen itself would wait for ever
_MULTI_STREAM_PERCENTILE = 0.99  # SingleStream also estimates this one, from which MultiStream may be inferred
_REDUCE = "Reduce target QPS to improve latency."
_TOO_SHORT = {
    Kind.SINGLE_STREAM: "Decrease the expected latency so the loadgen pre-generates more queries.",
    Kind.MULTI_STREAM: "Decrease the expected latency so the loadgen pre-generates more queries.",
    Kind.SERVER: "Increase the target QPS so the loadgen pre-generates more queries.",
    Kind.OFFLINE: "Increase expected QPS so the loadgen pre-generates a larger (coalesced) query.",
}
_TOO_FEW = "The test exited early, before enough queries were issued."
_SEE_LOG = "\n   See the detailed log for why this may have occurred."


@dataclass(frozen=True)
class EarlyStopping:
    """The outcome of one early-stopping test and LoadGen's text about it; estimates are 0 where it makes none."""

    met: bool = True
    text: str = ""
    estimate_ns: int = 0
    p99_ns: int = 0


@dataclass(frozen=True)
class LoadGenResult:
    """`facts`: detail-log keys and values in LoadGen's order. The rest is what only its summary shows."""

    facts: Facts
    early_stopping: dict[str, EarlyStopping] = field(default_factory=dict)  # "" or "ttft" and "tpot"
    advice: tuple[str, ...] = ()
    target_latency_ns: int = 0
    target_first_ns: int = 0
    scheduled_per_s: float = 0.0
    tokens_per_s: float = 0.0

    @property
    def valid(self) -> bool:
        return self.facts["result_validity"] == "VALID"


@dataclass(frozen=True)
class _Sorted:
    """Ascending latencies of each sort, and what else the formulas share."""

    samples: Int64
    queries: Int64
    first: Int64
    tpot: Int64
    token_count: int


def judge_loadgen(settings: Settings, samples: Samples) -> LoadGenResult:
    """LoadGen's verdict and figures. Raises ValueError without samples, or with tokens missing in token mode."""
    if not len(samples):
        raise ValueError("LoadGen has no verdict on a run without samples")
    if settings.tokens and (samples.tokens is None or (samples.first_ns is None and settings.kind is not Kind.OFFLINE)):
        raise ValueError("token mode needs a token count and a first-token latency for every sample")
    data = _sort(settings, samples)
    queries = _queries(settings, samples)
    stops = _early_stopping(settings, data, queries)
    advice = _perf_advice(settings, data)
    checks = {"perf": not advice, "duration": _long_enough(settings, samples),
              "queries": queries >= settings.min_queries and len(samples) >= settings.min_samples,
              "early": all(s.met for s in stops.values())}  # fmt: skip
    facts = _verdict_facts(settings, checks, advice, stops)
    facts |= _rate_facts(settings, samples, data, queries, stops)
    scheduled = divide(len(samples) - 1, int(samples.due_ns[-1]) / 1e9)
    lines = _summary_advice(settings, checks, advice)
    target = data.queries if settings.kind is Kind.MULTI_STREAM else data.samples
    return LoadGenResult(
        facts, stops, tuple(lines), at(target, settings.percentile), at(data.first, settings.percentile),
        scheduled, _tokens_per_s(settings, samples, data),
    )  # fmt: skip


def tpot_loadgen(latency_ns: Int64, first_ns: Int64, tokens: Int64) -> tuple[Int64, Int64]:
    """(TPOT, tokens) as LoadGen records them: counts of 1 or less become 0, and C++ division cuts towards zero."""
    counted = np.where(tokens <= 1, 0, tokens)
    decode = latency_ns - first_ns
    quotient = np.abs(decode) // np.abs(counted - 1)
    return np.where((decode < 0) ^ (counted < 1), -quotient, quotient).astype(np.int64), counted.astype(np.int64)


def early_stopping(kind: Kind, percentile: float, queries: int, ascending: Int64, limit_ns: int) -> EarlyStopping:
    """LoadGen's test on ascending latencies, with the text it logs (lines joined by a newline)."""
    if kind in (Kind.OFFLINE, Kind.CONCURRENCY):
        return EarlyStopping()
    if kind is Kind.SERVER:
        late = len(ascending) - int(np.searchsorted(ascending, limit_ns, "right"))
        more = shortfall(queries, late, percentile)
        if not more:
            return EarlyStopping(True, " * Run successful.")
        text = f" * Run unsuccessful.\n * Processed {queries} queries.\n * Would need to run at least {more} more "
        text += "queries,\n with the run being successful if every additional\n query were under latency."
        return EarlyStopping(False, text)
    floor, estimate = min_queries(1, percentile), percentile_estimate(ascending, percentile)
    if estimate is None:
        text = f" * Only processed {queries} queries.\n * Need to process at least {floor} queries for early stopping."
        return EarlyStopping(False, text)
    text = f" * Processed at least {floor} queries ({queries}).\n * Would discard {estimate[1]} highest latency "
    text += f"queries.\n * Early stopping {percentile * 100:.1f}th percentile estimate: {estimate[0]}"
    if kind is Kind.MULTI_STREAM:
        return EarlyStopping(True, text, estimate[0], estimate[0])
    tail, p99 = percentile_estimate(ascending, _MULTI_STREAM_PERCENTILE), f"{_MULTI_STREAM_PERCENTILE * 100:.1f}th"
    if tail is None:
        text += f"\n * Not enough queries processed for {p99} percentile\n early stopping estimate (would need to "
        text += f"process at\n least {min_queries(1, _MULTI_STREAM_PERCENTILE)} total queries)."
        return EarlyStopping(True, text, estimate[0])
    return EarlyStopping(True, text + f"\n * Early stopping {p99} percentile estimate: {tail[0]}", estimate[0], tail[0])


def discards(queries: int, percentile: float) -> int | None:
    """How many of the highest latencies Single- and MultiStream discard; None below the floor."""
    late = max_overlatency(queries, percentile)
    return late - 1 if late >= 1 else None


def at(ascending: Int64, percentile: float) -> int:
    """LoadGen's percentile, `sorted[floor(n p)]`; 0 of an empty list."""
    return int(ascending[int(len(ascending) * percentile)]) if len(ascending) else 0


def mean_loadgen(values: Int64) -> int:
    """A signed sum divided by an unsigned count: C++ makes the sum unsigned first, and keeps whole ns."""
    total = (int((values >> 32).sum()) << 32) + int((values & 0xFFFFFFFF).sum())  # exact beyond 2^63
    mean = total % 2**64 // len(values) if total < 0 else total // len(values)
    return mean - 2**64 if mean >= 2**63 else mean


def divide(numerator: float, denominator: float) -> float:
    """IEEE division: C++ gives nan and inf where Python raises."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(numerator) / np.float64(denominator))


def _sort(settings: Settings, samples: Samples) -> _Sorted:
    none = np.empty(0, dtype=np.int64)
    first, tpot, count = none, none, 0
    if settings.tokens:
        assert samples.tokens is not None
        count = int(np.where(samples.tokens <= 1, 0, samples.tokens).sum())
        if settings.kind is not Kind.OFFLINE:
            assert samples.first_ns is not None
            first = np.sort(samples.first_ns)
            tpot = np.sort(tpot_loadgen(samples.latency_ns, samples.first_ns, samples.tokens)[0])
    queries = none
    if settings.kind is Kind.MULTI_STREAM:
        queries = np.sort(samples.latency_ns.reshape(-1, settings.samples_per_query).max(axis=1))
    return _Sorted(np.sort(samples.latency_ns), queries, first, tpot, count)


def _queries(settings: Settings, samples: Samples) -> int:
    return 1 if settings.kind is Kind.OFFLINE else len(samples) // settings.samples_per_query


def _early_stopping(settings: Settings, data: _Sorted, queries: int) -> dict[str, EarlyStopping]:
    def test(ascending: Int64, limit_ns: int) -> EarlyStopping:
        chosen = data.queries if settings.kind is Kind.MULTI_STREAM else ascending
        return early_stopping(settings.kind, settings.percentile, queries, chosen, limit_ns)

    if not settings.tokens:
        return {"": test(data.samples, settings.latency_limit_ns)}
    tpot = test(data.tpot, settings.tpot_limit_ns)
    untested = EarlyStopping(met=True, text="")
    return {"ttft": test(data.first, settings.ttft_limit_ns) if tpot.met else untested, "tpot": tpot}


def _perf_advice(settings: Settings, data: _Sorted) -> str:
    """Why the latency constraints are not met; "" when they are, and outside Server."""
    if settings.kind is not Kind.SERVER:
        return ""
    if not settings.tokens:
        return _REDUCE if at(data.samples, settings.percentile) > settings.latency_limit_ns else ""
    limits = (("TTFT", data.first, settings.ttft_limit_ns), ("TPOT", data.tpot, settings.tpot_limit_ns))
    over = [f"{name} constrain not met: {_REDUCE}" for name, x, limit in limits if at(x, settings.percentile) > limit]
    return "\n * ".join(over)


def _long_enough(settings: Settings, samples: Samples) -> bool:
    length = {Kind.OFFLINE: int(samples.latency_ns.max()), Kind.SERVER: int(samples.due_ns[-1])}
    return length.get(settings.kind, samples.issued_last_ns) >= settings.min_duration_ns


def _verdict_facts(settings: Settings, checks: dict[str, bool], advice: str, stops: dict[str, EarlyStopping]) -> Facts:
    facts: Facts = {"result_validity": "VALID" if all(checks.values()) else "INVALID"}
    if settings.kind is Kind.SERVER:
        facts["result_perf_constraints_met"] = checks["perf"]
    facts["result_min_duration_met"] = checks["duration"]
    facts["result_min_queries_met"] = checks["queries"]
    facts["early_stopping_met"] = checks["early"]
    if not all(checks.values()):
        reason = advice + " " if advice else ""
        reason += "" if checks["duration"] else _TOO_SHORT[settings.kind] + " "
        reason += "" if checks["queries"] else _TOO_FEW
        facts["result_invalid_reason"] = reason.replace("\n", " ")
    for name, stop in stops.items():
        facts[f"early_stopping_{name + '_' if name else ''}result"] = stop.text.replace("\n", " ")
    return facts


def _summary_advice(settings: Settings, checks: dict[str, bool], advice: str) -> list[str]:
    lines = [f" * {advice}"] if advice else []
    lines += [] if checks["duration"] else [f" * {_TOO_SHORT[settings.kind]}"]
    return lines + ([] if checks["queries"] else [f" * {_TOO_FEW}{_SEE_LOG}"])


def _rate_facts(
    settings: Settings, samples: Samples, data: _Sorted, queries: int, stops: dict[str, EarlyStopping]
) -> Facts:
    n, kind = len(samples), settings.kind
    facts: Facts = {"result_query_count": queries}
    last = next(iter(stops.values()))  # "ttft" when there are two: LoadGen's last call wins
    if len(stops) > 1 and not stops["tpot"].met:
        last = stops["tpot"]
    if kind is Kind.SERVER:
        over = n - int(np.searchsorted(data.samples, settings.latency_limit_ns, "right"))
        facts["result_overlatency_query_count"] = over
        facts["result_scheduled_samples_per_sec"] = divide(n - 1, int(samples.due_ns[-1]) / 1e9)
        facts["result_completed_samples_per_sec"] = divide(n - 1, _last_done_s(samples))
    elif kind is Kind.SINGLE_STREAM:
        facts["result_qps_with_loadgen_overhead"] = divide(n - 1, samples.issued_last_ns / 1e9)
        facts["result_qps_without_loadgen_overhead"] = divide(1, mean_loadgen(data.samples) / 1e9)
        facts["early_stopping_latency_ss"] = last.estimate_ns
        facts["early_stopping_latency_ms"] = last.p99_ns
    elif kind is Kind.MULTI_STREAM:
        facts |= _spread("result_{}_query_latency_ns", "result_{}_percentile_per_query_latency_ns", data.queries)
        facts["early_stopping_latency_ms"] = last.p99_ns
    else:
        facts["result_samples_per_second"] = divide(n, int(data.samples[-1]) / 1e9)
    facts |= _spread("result_{}_latency_ns", "result_{}_percentile_latency_ns", data.samples)
    return facts | (_token_facts(settings, samples, data) if settings.tokens else {})


def _token_facts(settings: Settings, samples: Samples, data: _Sorted) -> Facts:
    rate = _tokens_per_s(settings, samples, data)
    if settings.kind is Kind.OFFLINE:
        return {"result_tokens_per_second": rate}
    first = "result_first_token_{}_"
    facts = _spread(first + "latency_ns", first + "percentile_latency_ns", data.first)
    facts["result_token_throughput_with_loadgen_overhead"] = divide(data.token_count, samples.issued_last_ns / 1e9)
    # LoadGen forgets to turn ns into seconds here.
    facts["result_token_throughput"] = divide(data.token_count, mean_loadgen(data.samples) * len(samples))
    tpot = _spread("result_time_to_output_token_{}", "result_time_per_output_token_{}_percentile_ns", data.tpot)
    low, percentiles = list(tpot.items())[:3], list(tpot.items())[3:]
    facts |= dict(percentiles + low)  # the other way round than elsewhere
    return facts | {"result_completed_tokens_per_second": rate}


def _tokens_per_s(settings: Settings, samples: Samples, data: _Sorted) -> float:
    if settings.kind is Kind.OFFLINE:
        return divide(data.token_count, int(data.samples[-1]) / 1e9)
    return divide(data.token_count, _last_done_s(samples))


def _last_done_s(samples: Samples) -> float:
    """Completion of the query *scheduled last*, in seconds from the start: the end of LoadGen's window."""
    return (int(samples.due_ns[-1]) + int(samples.latency_ns[-1])) / 1e9


def _spread(plain: str, percentile: str, ascending: Int64) -> Facts:
    facts: Facts = {plain.format("min"): int(ascending[0]), plain.format("max"): int(ascending[-1])}
    facts[plain.format("mean")] = mean_loadgen(ascending)
    return facts | {percentile.format(f"{p * 100:.2f}"): at(ascending, p) for p in PERCENTILES}
