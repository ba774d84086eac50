"""LoadGen's four files, written from a sealed run into its folder.

    mlperf_log_summary.txt  mlperf_log_detail.txt  mlperf_log_accuracy.json  mlperf_log_trace.json

Keys, order and spelling are LoadGen 6.0.17's, so that MLCommons' parsers read them. They are not an MLPerf result, and
the first three lines of text say so; `mlperf_log_accuracy.json` is an empty array and has no room for a word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from loadgen.core import sample_order, schedule
from loadgen.core.loadgen_settings import Settings
from loadgen.core.loadgen_text import spell, summary_text
from loadgen.core.loadgen_verdict import Facts, Value
from loadgen.core.record import Phase
from loadgen.core.scenario import EQUAL_ISSUE, Kind, Scenario
from loadgen.edge.about import tool_version
from loadgen.edge.mlperf_run import LoadGenView, settings_of, view
from loadgen.edge.store import Run

PREFIX = "mlperf_log_"
FILES = tuple(PREFIX + name for name in ("summary.txt", "detail.txt", "accuracy.json", "trace.json"))
TRACE_ROWS = 100_000  # LoadGen's trace has over 1 kB a sample: a million rows would be more than a gigabyte
PERFORMANCE, ACCURACY = "PerformanceOnly", "AccuracyOnly"


def notice() -> str:
    """Who wrote the files, and what they are not."""
    return f"written by Tritonmark {tool_version()}, not an MLPerf result"


def write_logs(run: Run, trace_rows: int = TRACE_ROWS) -> None:
    """Writes LoadGen's files into the folder of `run`, each complete or not at all.

    Nothing is written for Concurrency, which LoadGen does not know. The trace stops after `trace_rows` samples and
    says so. A run that failed our own audit is INVALID here too, with our codes in `result_invalid_reason`.
    """
    if run.scenario.kind is Kind.CONCURRENCY:
        return
    seen = view(run)
    log = DetailLog()
    result = seen.judge(run) if seen else None
    facts: Facts = result.facts if result else {"result_validity": "INVALID", "result_query_count": 0}
    settings = seen.settings if seen else settings_of(run.scenario, True, 0)
    _head(log, run, settings, PERFORMANCE)
    _course(log, run, seen)
    if seen is None:
        log.error("no request was measured")
    elif seen.failed or seen.one_token:
        log.error(f"{seen.failed} requests did not complete, {seen.one_token} answers have one token")
    for key, value in facts.items():
        log.add(key, value)
    log.add("tritonmark_verdict", run.document["verdict"]["headline"])
    log.add("num_errors", log.errors)
    with whole_file(run.folder / FILES[1]) as file:
        file.writelines(log.lines)
    with whole_file(run.folder / FILES[0]) as file:
        file.write(notice() + "\n")
        if result:
            file.write(summary_text(result, settings, sut_name(run), _rest(run), PERFORMANCE))
        else:
            file.write(f"Scenario : {run.scenario.kind.value}\nResult is : INVALID\nNo request was measured.\n")
        file.write("\nNo warnings encountered during test.\n\n" + _errors(log.errors) + "\n")
    with whole_file(run.folder / FILES[2]) as file:
        file.write("[\n]\n")
    _write_trace(run, trace_rows)


def write_accuracy_logs(
    run: Run, folder: Path, answers: Iterable[tuple[int, int, bytes, int]], unanswered: int = 0
) -> None:
    """The accuracy-mode files of LoadGen, from answers: (place in the order of issue, sample index, bytes, tokens).

    As in LoadGen, answers stand in the order of their completion and `seq_id` is the order of issue; prompts without
    an answer are an error line. MLCommons' accuracy scripts expect the bytes they define per benchmark; for language
    models, int32 token ids (`--dtype int32`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = DetailLog()
    _head(log, run, settings_of(run.scenario, True, 0), ACCURACY)
    if unanswered:
        log.error(f"{unanswered} prompts have no answer")
    log.add("num_errors", log.errors)
    with whole_file(folder / FILES[1]) as file:
        file.writelines(log.lines)
    with whole_file(folder / FILES[0]) as file:
        file.write(f"{notice()}\n\nNo warnings encountered during test.\n\n{_errors(log.errors)}\n")
    with whole_file(folder / FILES[2]) as file:
        file.write("[")
        for at, (seq, sample, data, tokens) in enumerate(answers):
            entry = f'"seq_id" : {seq}, "qsl_idx" : {sample}, "data" : "{data.hex().upper()}", "token_count" : {tokens}'
            file.write(("," if at else "") + "\n{ " + entry + " }")
        file.write("\n]\n")


def sut_name(run: Run) -> str:
    """The name of the system under test: ours, the model's and the backend's."""
    return " ".join(["Tritonmark", *(str(run.document[k]) for k in ("model", "backend") if run.document.get(k))])


@dataclass
class DetailLog:
    """Lines of `:::MLLOG {json}` with a running count of errors."""

    lines: list[str] = field(default_factory=list)
    errors: int = 0
    time_ms: float = 0.0

    def add(self, key: str, value: Any, event: str = "POINT_IN_TIME", error: bool = False) -> None:
        literal = spell(value) if isinstance(value, bool | int | float) else json.dumps(value)
        meta = {"is_error": error, "is_warning": False, "file": "mlperf_log.py", "line_no": 0, "pid": os.getpid(),
                "tid": os.getpid()}  # fmt: skip
        self.errors += error
        self.lines.append(
            f':::MLLOG {{"key": {json.dumps(key)}, "value": {literal}, "time_ms": {self.time_ms:.6f}, '
            f'"namespace": "mlperf::logging", "event_type": "{event}", "metadata": {json.dumps(meta)}}}\n'
        )

    def error(self, text: str) -> None:
        self.add("error_runtime", text, error=True)


def _head(log: DetailLog, run: Run, settings: Settings, mode: str) -> None:
    """Who wrote it, then requested and effective settings."""
    scenario, library = run.scenario, _library(run)
    log.add("loadgen_version", f"none: {notice()}")
    log.add("tritonmark_notice", notice())
    log.add("test_datetime", f"{_begin(run):%Y-%m-%dT%H:%M:%SZ}")
    names: Facts = {"sut_name": sut_name(run), "qsl_name": scenario.prompts}
    for key, value in names.items():
        log.add(key, value)
    for key in ("qsl_reported_total_count", "qsl_reported_performance_count"):
        log.add(key, library)
    log.add("requested_scenario", scenario.kind.value)
    log.add("requested_test_mode", mode)
    for key, value in (
        _requested(scenario, settings) | {f"requested_{k}": v for k, v in _common(run, settings).items()}
    ).items():
        log.add(key, value)
    if settings.tokens:
        log.add("requested_use_token_latencies", True)
        if scenario.kind is not Kind.OFFLINE:
            log.add("requested_server_ttft_latency", settings.ttft_limit_ns)
            log.add("requested_server_tpot_latency", settings.tpot_limit_ns)
    for key, value in _effective(run, settings, mode).items():
        log.add(f"effective_{key}", value)


def _requested(scenario: Scenario, settings: Settings) -> Facts:
    if scenario.kind is Kind.SERVER:
        return {"requested_server_target_qps": settings.target_qps,
                "requested_server_target_latency_ns": settings.latency_limit_ns,
                "requested_server_target_latency_percentile": settings.percentile,
                "requested_server_coalesce_queries": False, "requested_server_max_async_queries": 0,
                "requested_server_num_issue_query_threads": 0}  # fmt: skip
    if scenario.kind is Kind.OFFLINE:
        return {"requested_offline_expected_qps": settings.target_qps}
    name = "single_stream" if scenario.kind is Kind.SINGLE_STREAM else "multi_stream"
    facts: Facts = {f"requested_{name}_target_latency_percentile": settings.percentile}
    if scenario.kind is Kind.MULTI_STREAM:
        facts["requested_multi_stream_samples_per_query"] = settings.samples_per_query
    return facts


def _common(run: Run, settings: Settings) -> Facts:
    """Settings that LoadGen logs both as requested and as effective."""
    return {"min_duration_ms": settings.min_duration_ns // 10**6, "max_duration_ms": 0,
            "min_query_count": run.scenario.minimums.queries, "max_query_count": 0, **_seeds(run),
            "accuracy_log_rng_seed": 0, "accuracy_log_probability": 0, "accuracy_log_sampling_target": 0,
            "print_timestamps": False, "performance_issue_unique": False, "performance_issue_same": False,
            "performance_issue_same_index": 0,
            "sample_concatenate_permutation": run.scenario.sample_order == EQUAL_ISSUE}  # fmt: skip


def _effective(run: Run, settings: Settings, mode: str) -> Facts:
    facts: Facts = {"scenario": settings.kind.value, "test_mode": mode,
             "samples_per_query": settings.samples_per_query, "target_qps": settings.target_qps,
             "target_latency_ns": settings.latency_limit_ns, "target_latency_percentile": settings.percentile,
             "max_async_queries": 0 if settings.kind is Kind.SERVER else 1,
             "target_duration_ms": settings.min_duration_ns // 10**6}  # fmt: skip
    if settings.kind is Kind.OFFLINE:
        facts["target_duration_ms"] = 0
    facts |= _common(run, settings) | {"min_query_count": settings.min_queries}
    facts["min_sample_count"] = settings.min_samples
    return facts | {"performance_sample_count": _library(run), "accuracy_sample_count": _library(run)}


def _seeds(run: Run) -> dict[str, Value]:
    """Seeds as sealed; a schedule that they did not make (constant arrivals) is logged with seed 0."""
    scenario = run.scenario
    drawn = scenario.kind is not Kind.SERVER or scenario.arrivals == "poisson"
    return {"qsl_rng_seed": scenario.seeds.qsl, "sample_index_rng_seed": scenario.seeds.sample,
            "schedule_rng_seed": scenario.seeds.schedule if drawn else 0}  # fmt: skip


def _rest(run: Run) -> dict[str, Value]:
    """The lower part of the summary's parameters."""
    zeros = ("accuracy_log_rng_seed", "accuracy_log_probability", "accuracy_log_sampling_target", "print_timestamps",
             "performance_issue_unique", "performance_issue_same", "performance_issue_same_index")  # fmt: skip
    library = _library(run)
    return {"max_query_count": 0, **_seeds(run), **dict.fromkeys(zeros, 0), "performance_sample_count": library,
            "accuracy_sample_count": library}  # fmt: skip


def _course(log: DetailLog, run: Run, seen: LoadGenView | None) -> None:
    """What happened between settings and results: which samples, how many queries, when power was drawn."""
    scenario, library = run.scenario, _library(run)
    log.add("generic_message", "Starting performance mode")
    log.add("loaded_qsl_set", sample_order.loaded_set(library, library, scenario.seeds.qsl).tolist())
    if scenario.kind is Kind.SERVER and scenario.arrivals == "poisson":
        minimums, qps, seed = scenario.minimums, scenario.target_qps or 1.0, scenario.seeds.schedule
        dataset = library if scenario.sample_order == EQUAL_ISSUE else None
        floor = max(minimums.queries, 1)
        count = len(schedule.loadgen_server(qps, minimums.duration_ns, floor, seed, dataset=dataset))
        log.add("generated_query_count", count)
        log.add("generated_samples_per_query", 1)
        log.add("generated_query_duration", int(schedule.loadgen_poisson(qps, count + 1, seed)[-1]))
    elif scenario.kind is Kind.OFFLINE and seen:
        log.add("generated_query_count", 1)
        log.add("generated_samples_per_query", len(seen.samples))
    begin, end_ns = _begin(run), seen.end_ns if seen else 0
    log.time_ms = end_ns / 1e6
    for key, at, event in (("power_begin", 0, "INTERVAL_START"), ("power_end", end_ns, "INTERVAL_END")):
        log.add(key, f"{begin + timedelta(microseconds=at // 1000):%m-%d-%Y %H:%M:%S.%f}"[:-3], event)


def _write_trace(run: Run, limit: int) -> None:
    """Chrome trace events of the first `limit` samples in order of completion; ts in µs from T0."""
    server, left = run.scenario.kind is Kind.SERVER, limit
    columns = ["seq", "query", "sample", "phase", "due_ns", "sent_ns", "first_ns", "done_ns"]
    with whole_file(run.folder / FILES[3]) as file:
        file.write('{"traceEvents":[\n')
        for batch in pq.ParquetFile(run.folder / "records.parquet").iter_batches(4096, columns=columns):
            for row in batch.to_pylist():
                if left and row["phase"] == Phase.MEASURE.value and row["done_ns"] is not None:
                    file.write(_trace_events(row, server))
                    left -= 1
            if not left:
                break
        file.write('{"name":"LastTrace"}\n],\n"displayTimeUnit":"ns",\n"otherData":{\n')
        file.write(f'"ts":{run.document.get("t0_wall_ns", 0) / 1000:.3f},\n')
        cut = f", first {limit} samples only" if not left else ""
        file.write(f'"version":"{notice()}; events as in MLPerf LoadGen v1.0{cut}"\n}}\n}}\n')


def _trace_events(row: dict[str, Any], server: bool) -> str:
    due, done = row["due_ns"], row["done_ns"]
    sent = row["sent_ns"] if row["sent_ns"] is not None else due
    start, lines = f"{due / 1000:.3f}", []
    for name, stamp in (("Token_Latency", row["first_ns"]), ("Latency", done)) if server else ():
        if stamp is not None:
            args = f'{{ "issue_delay":{sent - due},"issue_to_done":{stamp - sent}}}'
            lines.append(f'{{"name":"{name}","ph": "C","pid":1,"ts":{start},"args":{args}}},\n')
    common = f'{{"name":"Sample","cat":"default","ph":"{{}}","pid":1,"id":{row["seq"]},"ts":'
    args = f'{{"sample_seq":{row["seq"]},"query_seq":{row["query"]},"sample_idx":{row["sample"]},'
    args += f'"issue_start_ns":{sent - due},"complete_ns":{done - due}}}'
    begin, end = common.replace("{}", "b"), common.replace("{}", "e")
    return "".join(lines) + f'{begin}{start},"args":{args}}},\n{end}{done / 1000:.3f}}},\n'


def _library(run: Run) -> int:
    """How many prompts the run could draw from."""
    return int(run.document.get("prompts", {}).get("count") or 1)


def _begin(run: Run) -> datetime:
    """T0 on the wall clock."""
    if wall := run.document.get("t0_wall_ns"):
        return datetime.fromtimestamp(wall // 10**9, UTC) + timedelta(microseconds=wall % 10**9 // 1000)
    return datetime.fromisoformat(run.document.get("started_utc", "1970-01-01T00:00:00+00:00"))


def _errors(count: int) -> str:
    return {0: "No errors encountered during test.", 1: "1 ERROR encountered. See detailed log."}.get(
        count, f"{count} ERRORS encountered. See detailed log."
    )


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Writes beside `path` and renames at the end, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
