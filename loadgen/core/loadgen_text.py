"""LoadGen's words: the text of `mlperf_log_summary.txt` and the spelling of values in the detail log.

Checked letter by letter against the real summaries in `tests/loadgen/core/test_loadgen_verdict.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from loadgen.core.loadgen_settings import Settings
from loadgen.core.loadgen_verdict import Facts, LoadGenResult, Value
from loadgen.core.metrics import PERCENTILES
from loadgen.core.scenario import Kind

RULER = "=" * 48
Parameters = Mapping[str, Value]


def spell(value: Value) -> str:
    """A JSON literal as C++ streams print it: six significant digits; not-a-number as JSON readers want it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return f"{value:.6g}"
    return str(value)


def summary_text(result: LoadGenResult, settings: Settings, name: str, parameters: Parameters, mode: str) -> str:
    """The three sections of the summary, ending without the line about warnings and errors.

    `parameters` are the effective settings in the order LoadGen prints them: see `parameter_lines`.
    """
    lines = [RULER, "MLPerf Results Summary", RULER, f"SUT name : {name}", f"Scenario : {settings.kind.value}",
             f"Mode     : {mode}", *_headline(result, settings), *_verdict(result, settings)]  # fmt: skip
    lines += ["", RULER, "Additional Stats", RULER, *_stats(result, settings)]
    lines += ["", RULER, "Test Parameters Used", RULER, *parameter_lines(settings, parameters)]
    return "\n".join(lines) + "\n"


def parameter_lines(settings: Settings, parameters: Parameters) -> list[str]:
    """`name : value` for each effective setting; `parameters` hold what a verdict does not depend on."""
    out: dict[str, Value] = {"samples_per_query": settings.samples_per_query, "target_qps": settings.target_qps}
    if settings.tokens:
        out |= {"ttft_latency (ns)": settings.ttft_limit_ns, "tpot_latency (ns)": settings.tpot_limit_ns}
    else:
        out["target_latency (ns)"] = settings.latency_limit_ns
    out |= {"max_async_queries": 0 if settings.kind is Kind.SERVER else 1,
            "min_duration (ms)": settings.min_duration_ns // 10**6, "max_duration (ms)": 0,
            "min_query_count": settings.min_queries, **parameters}  # fmt: skip
    return [f"{key}{':' if '(' in key else ' :'} {spell(value)}" for key, value in out.items()]


def _headline(result: LoadGenResult, settings: Settings) -> list[str]:
    facts, kind, label = result.facts, settings.kind, f"{settings.percentile * 100:.1f}th"
    if kind is Kind.SERVER:
        lines = [f"Completed samples per second    : {float(facts['result_completed_samples_per_sec']):.2f}"]
        tokens = [f"Completed tokens per second: {result.tokens_per_s:.2f}"]
    elif kind is Kind.OFFLINE:
        lines = [f"Samples per second: {spell(facts['result_samples_per_second'])}"]
        tokens = [f"Tokens per second: {spell(result.tokens_per_s)}"]
    else:
        lines = [f"{label} percentile latency (ns) : {result.target_latency_ns}"]
        tokens = [f"{label} first token percentile latency (ns) : {result.target_first_ns}"]
    return lines + (tokens if settings.tokens else [])


def _verdict(result: LoadGenResult, settings: Settings) -> list[str]:
    facts = result.facts
    lines = [f"Result is : {facts['result_validity']}"]
    for key, label in (("result_perf_constraints_met", "Performance constraints satisfied : "),
                       ("result_min_duration_met", "Min duration satisfied : "),
                       ("result_min_queries_met", "Min queries satisfied : "),
                       ("early_stopping_met", "Early stopping satisfied: ")):  # fmt: skip
        if key in facts:
            lines.append(f"  {label}{'Yes' if facts[key] else 'NO'}")
    if not result.valid:
        lines += ["Recommendations:", *result.advice]
    if settings.kind is not Kind.OFFLINE:
        for name, stop in result.early_stopping.items():
            lines += [f"{name.upper()} Early Stopping Result:".lstrip(), stop.text]
    return lines


def _stats(result: LoadGenResult, settings: Settings) -> list[str]:
    facts, kind, lines = result.facts, settings.kind, []
    if kind is Kind.SINGLE_STREAM:
        lines += [f"QPS w/ loadgen overhead         : {float(facts['result_qps_with_loadgen_overhead']):.2f}",
                  f"QPS w/o loadgen overhead        : {float(facts['result_qps_without_loadgen_overhead']):.2f}",
                  ""]  # fmt: skip
    elif kind is Kind.SERVER:
        lines.append(f"Scheduled samples per second : {result.scheduled_per_s:.2f}")
    if kind is Kind.MULTI_STREAM:
        lines += ["Per-query latency:  ", *_spread(facts, "result_{}_query_latency_ns", "per_query_latency_ns")]
    else:
        lines += _spread(facts, "result_{}_latency_ns", "latency_ns")
    return lines + (_token_stats(result, settings) if settings.tokens else [])


def _token_stats(result: LoadGenResult, settings: Settings) -> list[str]:
    facts, kind, lines = result.facts, settings.kind, [""]
    if kind is Kind.OFFLINE:
        return lines
    if kind is Kind.SINGLE_STREAM:
        with_overhead = float(facts["result_token_throughput_with_loadgen_overhead"])
        lines.append(f"TPS w/ loadgen overhead         : {with_overhead:.2f}")
        lines.append(f"TPS w/o loadgen overhead        : {float(facts['result_token_throughput']) * 1e9:.2f}")
    elif kind is Kind.SERVER:
        lines.append(f"Completed tokens per second                 : {result.tokens_per_s:.2f}")
    first, tpot = "result_first_token_{}_latency_ns", "result_time_to_output_token_{}"
    lines += _extremes(facts, first, "First Token latency")
    for p in (f"{p * 100:.2f}" for p in PERCENTILES):
        value = facts[f"result_first_token_{p}_percentile_latency_ns"]
        lines.append(f"{p} percentile first token latency (ns)   : {value}")
    lines += ["", *_extremes(facts, tpot, "Time per Output Token")]
    for p in (f"{p * 100:.2f}" for p in PERCENTILES):
        value = facts[f"result_time_per_output_token_{p}_percentile_ns"]
        lines.append(f"{p} percentile time to output token (ns)   : {value}")
    return lines


def _extremes(facts: Facts, key: str, title: str) -> list[str]:
    names = {"min": "Min", "max": "Max", "mean": "Mean"}
    return [
        f"{label} {title} (ns){' ' * (19 - len(label))}: {facts[key.format(name)]}" for name, label in names.items()
    ]


def _spread(facts: Facts, plain: str, suffix: str) -> list[str]:
    names = {"min": "Min latency (ns)", "max": "Max latency (ns)", "mean": "Mean latency (ns)"}
    lines = [f"{label:<32}: {facts[plain.format(name)]}" for name, label in names.items()]
    for p in PERCENTILES:
        lines.append(f"{p * 100:.2f} percentile latency (ns)   : {facts[f'result_{p * 100:.2f}_percentile_{suffix}']}")
    return lines
