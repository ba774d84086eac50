"""`tritonmark check` on logs that the real LoadGen wrote, on hand-made old ones, on spoiled ones and on our runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from simulated_run import simulate

from loadgen.core.recheck import over_limit_bounds, recheck
from loadgen.core.schedule import loadgen_poisson
from loadgen.edge import check_cli, scenarios, store
from loadgen.edge.check_cli import check, check_log, check_one, describe, find, read_log, rounds
from loadgen.edge.errors import UserError
from loadgen.edge.mlperf_log import write_logs

DRIVER = Path(__file__).parents[2] / "fakes" / "loadgen_run.py"
V61 = [2085463073848966840, 2747215439041700203, 16159082839903944936]
V41 = [3066443479025735752, 10688027786191513374, 14962580496156340209]
TOKENS = {"first_ns": 100_000, "count": [3, 9], "ttft_limit_ns": 60_000_000, "tpot_limit_ns": 60_000_000}
LATE = [50_000] * 99 + [40_000_000]  # 1 % late: too many for early stopping, sometimes for the percentile
CASES = [
    {"scenario": "Server", "target_qps": 2e4, "min_queries": 700},
    {"scenario": "Server", "target_qps": 2e4, "min_queries": 1000, "limit_ns": 20_000_000, "latency_ns": LATE},
    {"scenario": "Server", "target_qps": 2e4, "min_queries": 400, "min_duration_ms": 30},
    {"scenario": "Server", "target_qps": 123.4567891, "min_queries": 20},
    {"scenario": "Server", "target_qps": 1e4, "min_queries": 900, "tokens": TOKENS, "latency_ns": 300_000},
    {"scenario": "Server", "target_qps": 1e4, "min_queries": 900, "latency_ns": LATE,
     "tokens": TOKENS | {"tpot_limit_ns": 3_000_000}},
    {"scenario": "Server", "target_qps": 1e4, "min_queries": 500, "equal_issue": True, "total": 333},
    {"scenario": "SingleStream", "min_queries": 1000, "percentile": 0.9},
    {"scenario": "SingleStream", "min_queries": 50, "percentile": 0.9},
    {"scenario": "SingleStream", "min_queries": 700, "percentile": 0.9, "tokens": TOKENS, "latency_ns": 150_000},
    {"scenario": "MultiStream", "min_queries": 1500},
    {"scenario": "MultiStream", "min_queries": 300},
    {"scenario": "Offline", "min_queries": 500, "target_qps": 100},
    {"scenario": "Offline", "min_queries": 500, "target_qps": 100, "min_duration_ms": 80, "tokens": TOKENS},
]  # fmt: skip


@pytest.fixture(scope="module")
def real_logs(tmp_path_factory):
    """Detail logs by the real LoadGen, one a case."""
    pytest.importorskip("mlperf_loadgen", reason="the real LoadGen (pip install mlcommons-loadgen) is not installed")
    out = tmp_path_factory.mktemp("loadgen")
    cases = [{"seeds": V61, **case} for case in CASES]
    subprocess.run([sys.executable, str(DRIVER), "-", str(out)], input=json.dumps(cases), text=True, check=True,
                   capture_output=True, timeout=120)  # fmt: skip
    return [out / f"case-{i:04d}" / "mlperf_log_detail.txt" for i in range(len(cases))]


def test_no_difference_on_any_log_of_the_real_loadgen(real_logs):
    seen = set()
    for case, path in zip(CASES, real_logs, strict=True):
        result, (log, _) = check_log(path), read_log(path)
        assert result.differences == [], case
        assert result.verdict == result.logged_verdict == log["result_validity"], case
        assert result.seeds_of == "v6.1" and result.discards == result.logged_discards
        if case["scenario"] == "Server":
            assert result.schedule_match == ("rounded" if "123.4" in str(case) else "exact")
        if result.ratio:
            assert 0.9 < result.ratio < 3 or result.used_window_s < 0.1
        seen.add(result.verdict)
    assert seen == {"VALID", "INVALID"}


def test_exit_codes_and_json(real_logs):
    runner = CliRunner()
    assert runner.invoke(check, [str(real_logs[0])]).exit_code == 0
    assert runner.invoke(check, [str(real_logs[0]), "--round", "v6.0"]).exit_code == 3
    folder = runner.invoke(check, [str(real_logs[0].parents[1]), "--json"])
    assert folder.exit_code == 3
    results = json.loads(folder.output)["results"]
    assert len(results) == len(CASES) and all(r["differences"] == [] for r in results)
    assert "schedule" in runner.invoke(check, [str(real_logs[0])]).output


SPOILS = {
    "result_validity": ("VALID", "verdict is"),
    "early_stopping_met": (True, "early_stopping_met is False"),
    "generated_query_duration": (1, "schedule lasts"),
    "result_scheduled_samples_per_sec": (20.0, "by the seed"),
    "result_perf_constraints_met": (False, "result_perf_constraints_met is True"),
    "early_stopping_result": (" * Run successful.", "early stopping needs"),
}


@pytest.mark.parametrize("key", SPOILS)
def test_a_log_that_was_touched_contradicts_itself(real_logs, key):
    log, _ = read_log(real_logs[1])
    log |= {"result_perf_constraints_met": True, "result_99.00_percentile_latency_ns": 20_000_000,
            "result_overlatency_query_count": 10, "early_stopping_met": False, "result_validity": "INVALID",
            "early_stopping_result": "Would need to run at least 1010 more queries,"}  # fmt: skip
    assert recheck(log, rounds()).differences == []
    value, text = SPOILS[key]
    assert any(text in d for d in recheck(log | {key: value}, rounds()).differences)


def test_a_discard_count_that_was_touched(real_logs):
    log, _ = read_log(real_logs[7])
    text = log["early_stopping_result"].replace("discard 7", "discard 8")
    assert text != log["early_stopping_result"]
    assert recheck(log | {"early_stopping_result": text}, rounds()).differences


def old_log(**changes) -> dict:
    """A Server LLM log as v4.1 wrote it: no accuracy sample count, no TTFT text where TPOT failed."""
    due = loadgen_poisson(10.0, 6002, V41[2])
    log = {
        "loadgen_version": "4.1 @ 35e44ed", "effective_scenario": "Server", "effective_test_mode": "PerformanceOnly",
        "requested_use_token_latencies": True, "requested_server_ttft_latency": 2_000_000_000,
        "requested_server_tpot_latency": 200_000_000, "effective_target_qps": 10, "effective_target_latency_ns": 0,
        "effective_target_latency_percentile": 0.99, "effective_min_duration_ms": 500_000,
        "effective_min_query_count": 100, "effective_min_sample_count": 100, "effective_qsl_rng_seed": V41[0],
        "effective_sample_index_rng_seed": V41[1], "effective_schedule_rng_seed": V41[2],
        "effective_performance_sample_count": 24_576, "generated_query_count": 6001, "generated_samples_per_query": 1,
        "generated_query_duration": int(due[-1]), "power_begin": "07-30-2024 23:59:59.000",
        "power_end": "07-31-2024 00:11:39.000", "result_validity": "VALID", "result_perf_constraints_met": True,
        "result_min_duration_met": True, "result_min_queries_met": True, "early_stopping_met": True,
        "early_stopping_ttft_result": " * Run successful.", "early_stopping_tpot_result": " * Run successful.",
        "result_query_count": 6001, "result_overlatency_query_count": 6001,
        "result_scheduled_samples_per_sec": float(f"{6000 / due[-2] * 1e9:.6g}"),
        "result_completed_samples_per_sec": 9.6, "result_completed_tokens_per_second": 960.0,
        "result_first_token_99.00_percentile_latency_ns": 1_900_000_000,
        "result_first_token_97.00_percentile_latency_ns": 1_000_000_000,
        "result_time_per_output_token_99.00_percentile_ns": 150_000_000,
        "result_time_per_output_token_99.90_percentile_ns": 160_000_000,
    }  # fmt: skip
    return log | changes


def test_an_old_log_and_its_honest_window():
    result = recheck(old_log(), rounds())
    assert result.differences == [] and result.valid and result.seeds_of == "v4.1" and result.schedule_match == "exact"
    assert result.true_window_s == 700.0 and result.used_window_s == pytest.approx(625.0)
    assert result.ratio == pytest.approx(1.12) and result.honest_tokens_per_s == pytest.approx(960 / 1.12)
    assert any("1.1200 x" in line for line in describe(result))


def test_counts_over_a_limit_are_bounded_by_percentiles():
    assert over_limit_bounds(old_log(), "TPOT", 6001) == (0, 6001 - 5994 - 1)
    assert over_limit_bounds(old_log(), "TTFT", 6001) == (0, 60)
    late = old_log(**{"result_first_token_97.00_percentile_latency_ns": 3_000_000_000})
    assert over_limit_bounds(late, "TTFT", 6001) == (181, 60)  # percentiles that decrease: nonsense, and seen as such
    assert recheck(late, rounds()).differences


def test_what_a_log_does_not_hold_is_not_guessed():
    log = old_log()
    for key in ("power_end", "generated_query_duration", "result_scheduled_samples_per_sec"):
        del log[key]
    result = recheck(log, rounds())
    assert result.differences == [] and result.ratio is None and result.schedule_match == "skipped"
    assert len(result.notes) == 2


def test_a_test_that_did_not_end_is_not_fine():
    log = old_log()
    del log["result_validity"]
    assert not recheck(log, rounds()).valid
    accuracy = recheck(log | {"effective_test_mode": "AccuracyOnly"}, rounds())
    assert accuracy.valid and describe(accuracy)


def test_unreadable_is_one_line(tmp_path):
    path = tmp_path / "mlperf_log_detail.txt"
    for text, why in (
        ("hello\n", "no :::MLLOG line"),
        (":::MLLOG {oops\n", "line 1"),
        (":::MLLOG []\n", "line 1"),
        (':::MLLOG {"key": "a", "value": 1}\n', "not a LoadGen detail log"),
        (':::MLLOG {"key": "effective_scenario", "value": "Dance"}\n', "not a LoadGen detail log"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=why) as caught:
            check_log(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read"):
        check_log(path)
    with pytest.raises(UserError, match="does not exist"):
        find(tmp_path / "nowhere")
    path.unlink()
    with pytest.raises(UserError, match="holds no"):
        find(tmp_path)


def test_nan_and_inf_as_c_prints_them(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(':::MLLOG {"key": "a", "value": -nan, "metadata": {}}\n:::MLLOG {"key": "b", "value": inf}\n')
    values, errors = read_log(path)
    assert values["a"] != values["a"] and values["b"] == float("inf") and errors == 0


def test_our_own_runs_and_the_logs_beside_them(tmp_path):
    run = simulate(tmp_path / "run", scenarios.resolve("server", "phi-2", "smoke", {"target_qps": 30}))
    assert check_one(run.folder).notes == ["no LoadGen files beside this run"]
    write_logs(run)
    result = check_one(run.folder)
    assert result.valid and result.schedule_match == "exact" and result.notes == []
    assert find(tmp_path) == [run.folder]
    log = run.folder / "mlperf_log_detail.txt"
    log.write_text(log.read_text().replace('"result_query_count", "value": ', '"result_query_count", "value": 1'))
    assert any("result_query_count" in d for d in check_one(run.folder).differences)


def test_a_sealed_verdict_or_schedule_that_the_rows_do_not_give(tmp_path):
    scenario = scenarios.resolve("server", "phi-2", "smoke", {"target_qps": 30})
    run = simulate(tmp_path / "run", scenario, failed=3)
    assert check_one(run.folder).differences == [] and not check_one(run.folder).valid
    document = json.loads((run.folder / "run.json").read_text())
    document["verdict"] |= {"valid": True, "reasons": []}
    document["scenario"]["seeds"]["schedule"] = 7
    (run.folder / "run.json").write_text(json.dumps(document))
    differences = " ".join(check_one(run.folder).differences)
    assert "sealed reasons are []" in differences and "due times are not those of the seed" in differences
    assert isinstance(store.load(run.folder), store.Run) and check_cli.rounds()["v6.1"].qsl == V61[0]
