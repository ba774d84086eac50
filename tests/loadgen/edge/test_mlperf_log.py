"""LoadGen's files from sealed (simulated) runs: what MLCommons' parsers need, and what a run that failed says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from simulated_run import simulate

from loadgen.core.loadgen_verdict import FAILED_NS
from loadgen.edge import scenarios
from loadgen.edge.mlperf_log import FILES, write_accuracy_logs, write_logs
from loadgen.edge.mlperf_run import view

CHECKER_KEYS = {
    "effective_qsl_rng_seed", "effective_sample_index_rng_seed", "effective_schedule_rng_seed", "effective_scenario",
    "effective_performance_sample_count", "effective_min_duration_ms", "effective_target_latency_ns",
    "effective_min_query_count", "effective_samples_per_query", "early_stopping_met", "sut_name",
    "requested_use_token_latencies", "result_first_token_99.00_percentile_latency_ns",
    "result_time_per_output_token_99.00_percentile_ns", "result_completed_tokens_per_second",
    "result_completed_samples_per_sec",
}  # fmt: skip
DRIVER = Path(__file__).parents[2] / "fakes" / "loadgen_run.py"


def scenario(name: str, **over):
    return scenarios.resolve(name, "phi-2", "smoke", {"target_qps": 50, **over})


def detail(folder: Path) -> list[dict]:
    """What MLCommons' log parser does: the mark in the first line, then JSON after each mark."""
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    assert all(line.startswith(":::MLLOG ") for line in lines)
    return [json.loads(line.removeprefix(":::MLLOG")) for line in lines]


def written(tmp_path: Path, name: str = "server", **options):
    run = simulate(tmp_path / "run", scenario(name, **options.pop("over", {})), **options)
    write_logs(run)
    return run, {line["key"]: line["value"] for line in detail(run.folder)}


def test_four_files_that_say_who_wrote_them(tmp_path):
    run, log = written(tmp_path)
    assert all((run.folder / name).is_file() for name in FILES)
    assert log.keys() >= CHECKER_KEYS
    summary = (run.folder / "mlperf_log_summary.txt").read_text()
    for text in (summary, log["loadgen_version"], (run.folder / "mlperf_log_trace.json").read_text()):
        assert "written by Tritonmark" in text and "not an MLPerf result" in text
    assert "Result is : VALID" in summary and "No errors encountered" in summary
    assert json.loads((run.folder / "mlperf_log_accuracy.json").read_text()) == []
    assert log["result_validity"] == "VALID" and log["result_query_count"] == 484 and log["num_errors"] == 0
    assert (log["power_begin"], log["power_end"][:16]) == ("09-21-2026 14:13:20.123", "09-21-2026 14:13")


def test_keys_come_in_loadgens_order(tmp_path):
    pytest.importorskip("mlperf_loadgen", reason="the real LoadGen (pip install mlcommons-loadgen) is not installed")
    tokens = {"first_ns": 100_000, "count": 8}
    for ours, theirs in (("server", "Server"), ("offline", "Offline"), ("single_stream", "SingleStream"),
                         ("multi_stream", "MultiStream")):  # fmt: skip
        case = {"scenario": theirs, "min_queries": 700, "target_qps": 1e4, "latency_ns": 200_000, "tokens": tokens}
        subprocess.run([sys.executable, str(DRIVER), "-", str(tmp_path / theirs)], input=json.dumps([case]), text=True,
                       check=True, capture_output=True, timeout=60)  # fmt: skip
        real = [line["key"] for line in detail(tmp_path / theirs / "case-0000")]
        count, slow = (5600, 200) if "stream" in ours else (None, 13_000 if ours == "offline" else 200)
        run = simulate(tmp_path / ours, scenario(ours), count=count, ttft_ms=slow)
        write_logs(run)
        mine = [line["key"] for line in detail(run.folder)]
        assert [k for k in mine if k in real and k.startswith(("result", "early"))] == \
            [k for k in real if k.startswith(("result", "early"))]  # fmt: skip
        unknown = {k for k in mine if k not in real and not k.startswith("tritonmark")}
        assert unknown <= {"generic_message"}, (ours, unknown)


def test_the_trace_is_chromes_and_bounded(tmp_path):
    run, _ = written(tmp_path)
    trace = json.loads((run.folder / "mlperf_log_trace.json").read_text())
    begun = [e for e in trace["traceEvents"] if e["name"] == "Sample" and e["ph"] == "b"]
    rows = next(run.tables()).to_pylist()
    assert [round(e["ts"] * 1000) for e in begun] == [r["due_ns"] for r in rows]
    assert begun[5]["args"]["complete_ns"] == rows[5]["done_ns"] - rows[5]["due_ns"]
    counters = [e["args"]["issue_delay"] for e in trace["traceEvents"] if e["name"] == "Token_Latency"]
    assert counters == [1000] * len(rows)
    write_logs(run, trace_rows=10)
    trace = json.loads((run.folder / "mlperf_log_trace.json").read_text())
    assert len(trace["traceEvents"]) == 10 * 4 + 1 and "first 10 samples only" in trace["otherData"]["version"]


def test_failures_are_errors_and_never_fast(tmp_path):
    run, log = written(tmp_path, failed=2)
    assert log["result_validity"] == "INVALID" and not log["early_stopping_met"] and log["num_errors"] == 1
    assert "failed_error" in log["result_invalid_reason"]
    assert log["result_max_latency_ns"] == FAILED_NS and log["result_overlatency_query_count"] == 484
    assert [line["metadata"]["is_error"] for line in detail(run.folder)].count(True) == 1
    assert "1 ERROR encountered" in (run.folder / "mlperf_log_summary.txt").read_text()


def test_one_token_answers_are_loadgens_errors(tmp_path):
    _, log = written(tmp_path, tokens=1)
    assert log["num_errors"] == 1 and log["result_completed_tokens_per_second"] == 0


def test_constant_arrivals_do_not_claim_the_rounds_seed(tmp_path):
    _, log = written(tmp_path, over={"arrivals": "constant"})
    assert log["effective_schedule_rng_seed"] == 0 and "generated_query_duration" not in log


def test_a_run_without_rows_and_a_kind_without_loadgen(tmp_path):
    empty = simulate(tmp_path / "empty", scenario("single_stream"), count=0)
    write_logs(empty)
    log = {line["key"]: line["value"] for line in detail(empty.folder)}
    assert log["result_validity"] == "INVALID" and log["num_errors"] == 1
    assert "Result is : INVALID" in (empty.folder / "mlperf_log_summary.txt").read_text()
    other = simulate(tmp_path / "other", scenario("concurrency"), count=0)
    write_logs(other)
    assert not any((other.folder / name).exists() for name in FILES)


def test_a_cut_multi_stream_query_is_whole_and_late(tmp_path):
    run = simulate(tmp_path / "run", scenario("multi_stream"), count=24)
    seen = view(run)
    assert seen and len(seen.samples) == 24 and seen.failed == 0
    import numpy as np

    from loadgen.edge.mlperf_run import _whole_queries

    query = np.repeat(np.arange(3), 8)
    keep = np.ones(24, dtype=bool)
    keep[10] = False
    cut = type(seen.samples)(*(v[keep] if isinstance(v, np.ndarray) else v for v in vars(seen.samples).values()))
    whole = _whole_queries(cut, query[keep], 8)
    assert len(whole) == 24 and (whole.latency_ns == FAILED_NS).tolist().index(True) == 15


def test_accuracy_files_hold_answers_as_hexadecimal(tmp_path):
    run = simulate(tmp_path / "run", scenario("server"), count=3)
    write_accuracy_logs(run, tmp_path / "accuracy", [(7, 4, b"\x01\xab", 2), (0, 1, b"", 0)], unanswered=3)
    entries = json.loads((tmp_path / "accuracy" / "mlperf_log_accuracy.json").read_text())
    assert entries[0] == {"seq_id": 7, "qsl_idx": 4, "data": "01AB", "token_count": 2} and len(entries) == 2
    log = {line["key"]: line["value"] for line in detail(tmp_path / "accuracy")}
    assert log["effective_test_mode"] == "AccuracyOnly" and "result_validity" not in log
    assert log["num_errors"] == 1 and log["error_runtime"] == "3 prompts have no answer"
    assert [entry["seq_id"] for entry in entries] == [7, 0]  # lines by completion, numbers by order of issue


@pytest.mark.slow
def test_a_million_rows_take_bounded_memory(tmp_path):
    code = f"""
import resource, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2] / "fakes")!r})
from pathlib import Path
from simulated_run import simulate
from loadgen.edge import scenarios, store
from loadgen.edge.mlperf_log import write_logs
over = {{"target_qps": 100_000, "duration_s": 10}}
run = simulate(Path({str(tmp_path / "run")!r}), scenarios.resolve("server", "phi-2", "smoke", over))
usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, start = usage(), time.perf_counter()
write_logs(run)
print(run.summary["scheduled"], usage() - before, time.perf_counter() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
    rows, grown_kib, seconds = done.stdout.split()
    assert int(rows) > 990_000
    assert int(grown_kib) < 500_000 and float(seconds) < 60
