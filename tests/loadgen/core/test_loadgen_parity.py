"""Runs the real MLPerf LoadGen and compares arrivals, sample order and early stopping with this project's.

Latencies are LoadGen's own, read from its trace, so no assertion depends on how busy the machine is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadgen.core import sample_order, schedule
from loadgen.core.early_stopping import min_queries, passes, percentile_estimate, shortfall

pytest.importorskip("mlperf_loadgen", reason="the real LoadGen (pip install mlcommons-loadgen) is not installed")

DRIVER = Path(__file__).parents[2] / "fakes" / "loadgen_run.py"
V61 = [2085463073848966840, 2747215439041700203, 16159082839903944936]
V51 = [1780908523862526354, 14771362308971278857, 18209322760996052031]
SEEDS = [V61, V51, [1, 2, 3], [0, 2**32, 2**64 - 1]]


def run_loadgen(cases: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """One process for all cases: LoadGen is a process singleton, but runs one test after another."""
    command = [sys.executable, str(DRIVER), "-", str(out)]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    assert len(answers) == len(cases)
    return answers


def column(answer: dict[str, Any], name: str) -> np.ndarray:
    return np.array([sample[name] for sample in answer["samples"]], dtype=np.int64)


def spread(count: int, late: int, fast: int, slow: int) -> list[int]:
    """`count` latencies of which `late` are slow, evenly mixed."""
    return [slow if (k + 1) * late // count > k * late // count else fast for k in range(count)]


def expected_samples(case: dict[str, Any], count: int) -> np.ndarray:
    qsl, sample, _ = case["seeds"]
    loaded = sample_order.loaded_set(case["total"], case.get("performance", case["total"]), qsl)
    need = case["min_queries"]
    if case["scenario"] == "MultiStream":
        return sample_order.multi_stream(loaded, count, sample, need, case["samples_per_query"]).ravel()
    if case["scenario"] == "Offline":
        if case["equal_issue"]:
            return sample_order.offline_equal_issue(loaded, need, sample)
        return sample_order.offline(loaded, count)
    if not case["equal_issue"]:
        return sample_order.with_replacement(loaded, count, sample, need)
    if case["scenario"] == "SingleStream":
        need = sample_order.single_stream_min_queries(
            need, case["min_duration_ms"], case["expected_latency_ns"], case.get("performance", case["total"])
        )
    return sample_order.equal_issue(loaded, count, sample, need)


def test_generated_count_and_duration(tmp_path: Path) -> None:
    """LoadGen logs how many queries it made and when the next would be due; one issued query is enough to see both."""
    cases = [
        {
            "scenario": "Server", "max_queries": 1, "seeds": seeds, "target_qps": qps, "min_duration_ms": ms,
            "min_queries": need, "equal_issue": equal, "total": 333,
        }
        for seeds, (qps, ms, need), equal in product(
            SEEDS,
            [(0.01, 0, 5), (3.7, 600_000, 100), (123.456, 10_000, 5000), (1e4, 1000, 1), (7e6, 1, 332),
             (1e9, 0, 40_000)],
            [False, True],
        )
    ]  # fmt: skip
    cases.append({"scenario": "Server", "max_queries": 1, "seeds": V61, "target_qps": 500, "min_queries": 400_000})
    for case, answer in zip(cases, run_loadgen(cases, tmp_path), strict=True):
        dataset = case["total"] if case.get("equal_issue") else None
        args = case["target_qps"], case.get("min_duration_ms", 0) * 10**6, case["min_queries"], case["seeds"][2]
        count = len(schedule.loadgen_server(*args, dataset=dataset))
        assert answer["detail"]["generated_query_count"] == count, case
        following = schedule.loadgen_poisson(case["target_qps"], count + 1, case["seeds"][2])[-1]
        assert answer["detail"]["generated_query_duration"] == following, case
        assert len(schedule.loadgen_server(*args, dataset=dataset, max_queries=1)) == len(answer["samples"]) == 1


def test_server_due_times_and_samples(tmp_path: Path) -> None:
    cases = [
        {
            "scenario": "Server", "seeds": seeds, "target_qps": qps, "min_duration_ms": ms, "min_queries": need,
            "equal_issue": equal, "total": total, "performance": performance,
        }
        for seeds, (qps, ms, need), (total, performance), equal in product(
            SEEDS[:3], [(2e4, 20, 200), (5e5, 1, 3000), (900.5, 50, 1)], [(1000, 1000), (500, 101), (1, 1)],
            [False, True],
        )
    ]  # fmt: skip
    for case, answer in zip(cases, run_loadgen(cases, tmp_path), strict=True):
        due = schedule.loadgen_server(
            case["target_qps"], case["min_duration_ms"] * 10**6, case["min_queries"], case["seeds"][2],
            dataset=case["performance"] if case["equal_issue"] else None,
        )  # fmt: skip
        np.testing.assert_array_equal(column(answer, "due_ns"), due, err_msg=str(case))
        expected = expected_samples(case, len(due))
        np.testing.assert_array_equal(column(answer, "sample"), expected, err_msg=str(case))


def test_samples_of_the_closed_and_offline_scenarios(tmp_path: Path) -> None:
    cases = [
        {
            "scenario": scenario, "seeds": SEEDS[(need + total) % 4], "min_queries": need, "equal_issue": equal,
            "total": total, "performance": performance, "samples_per_query": width,
            "min_duration_ms": ms, "expected_latency_ns": 100_000, "target_qps": 1,
        }
        for scenario, need, equal, (total, performance), (width, ms) in product(
            ["SingleStream", "MultiStream", "Offline"], [1, 210], [False, True],
            [(100, 100), (90, 41), (3, 5), (4, 4)], [(8, 0), (3, 4)],
        )
    ]  # fmt: skip
    # A set too large for two swaps a draw; one whose draws are often rejected; a duration that repeats the passes.
    cases += [
        {**cases[0], "total": 70_000, "performance": 70_000, "min_queries": 300, "equal_issue": True},
        {**cases[0], "total": 65_535, "performance": 65_535, "min_queries": 3000},
        {**cases[0], "scenario": "Server", "total": 64, "performance": 64, "min_queries": 70, "equal_issue": True,
         "min_duration_ms": 20, "target_qps": 20_000},
    ]  # fmt: skip
    for case, answer in zip(cases, run_loadgen(cases, tmp_path), strict=True):
        seen = column(answer, "sample")
        queries = int(column(answer, "query").max()) - int(column(answer, "query").min()) + 1
        count = queries if case["scenario"] == "MultiStream" else len(seen)
        np.testing.assert_array_equal(seen, expected_samples(case, count), err_msg=str(case))


def test_server_verdicts_and_shortfall(tmp_path: Path) -> None:
    grid = [(100, 0), (458, 0), (459, 0), (661, 1), (662, 1), (1000, 2), (1000, 3), (2000, 9), (2000, 10), (3000, 60)]
    cases = [
        {
            "scenario": "Server", "seeds": seeds, "target_qps": 2e4, "min_queries": n, "percentile": p,
            "limit_ns": 30_000_000, "latency_ns": spread(n, late, 50_000, 60_000_000), "total": 10,
        }
        for (n, late), (p, seeds) in product(grid, [(0.99, V61), (0.9, V51)])
    ]  # fmt: skip
    verdicts = []
    for case, answer in zip(cases, run_loadgen(cases, tmp_path), strict=True):
        latencies, p, detail = np.sort(column(answer, "latency_ns")), case["percentile"], answer["detail"]
        n, late = len(latencies), int((latencies > case["limit_ns"]).sum())
        missing = shortfall(n, late, p)
        assert late == detail["result_overlatency_query_count"]
        assert passes(n, late, p) == detail["early_stopping_met"] == (missing == 0)
        found = re.search(r"at least (\d+)\s+more queries", detail["early_stopping_result"])
        assert (int(found[1]) if found else 0) == missing
        percentile_met = latencies[int(n * p)] <= case["limit_ns"]
        assert bool(percentile_met) == detail["result_perf_constraints_met"]
        valid = percentile_met and missing == 0
        assert detail["result_validity"] == ("VALID" if valid else "INVALID")
        verdicts.append(detail["result_validity"])
    assert {"VALID", "INVALID"} == set(verdicts)


def check_estimate(text: str, latencies: list[int], percentile: float) -> None:
    estimate = percentile_estimate(latencies, percentile)
    floor = min_queries(1, percentile)
    if estimate is None:
        assert f"Only processed {len(latencies)} queries" in text and f"at least {floor} queries" in text
    else:
        assert f"at least {floor} queries ({len(latencies)})" in text
        assert f"Would discard {estimate[1]} highest" in text
        assert f"{percentile * 100:.1f}th percentile estimate: {estimate[0]}" in text


def test_single_and_multi_stream_estimates(tmp_path: Path) -> None:
    cases = [
        {
            "scenario": scenario, "seeds": V61, "min_queries": n, "percentile": p, "samples_per_query": 2,
            "latency_ns": 0, "total": 10, "min_duration_ms": 0,
        }
        for scenario, n, p in product(
            ["SingleStream", "MultiStream"], [10, 63, 64, 129, 662, 1001, 3000], [0.9, 0.95, 0.97, 0.99, 0.999]
        )
    ]  # fmt: skip
    for case, answer in zip(cases, run_loadgen(cases, tmp_path), strict=True):
        text, latencies = answer["detail"]["early_stopping_result"], column(answer, "latency_ns")
        if case["scenario"] == "MultiStream":
            latencies = latencies.reshape(-1, 2).max(axis=1)
        ordered = np.sort(latencies).tolist()
        check_estimate(text, ordered, case["percentile"])
        assert answer["detail"]["early_stopping_met"] == (len(ordered) >= min_queries(1, case["percentile"]))
        tail = percentile_estimate(ordered, 0.99)
        if case["scenario"] == "SingleStream" and tail and answer["detail"]["early_stopping_met"]:
            assert answer["detail"]["early_stopping_latency_ms"] == tail[0]


def test_token_latencies(tmp_path: Path) -> None:
    """LLM mode: TTFT from the due time; TPOT = (latency - TTFT) // (tokens - 1); TTFT is judged only if TPOT passed."""
    cases = [
        {
            "scenario": "Server", "seeds": V61, "target_qps": 1e4, "min_queries": n, "total": 10, "limit_ns": 0,
            "latency_ns": spread(n, slow_tokens, 400_000, 90_000_000),
            "tokens": {"first_ns": spread(n, slow_first, 100_000, 60_000_000), "count": [2, 3, 9],
                       "ttft_limit_ns": 30_000_000, "tpot_limit_ns": 8_000_000},
        }
        for n, slow_first, slow_tokens in [
            (300, 0, 0), (700, 0, 0), (700, 5, 0), (700, 0, 5), (700, 40, 40), (1500, 2, 2)
        ]
    ]  # fmt: skip
    for case, answer in zip(cases, run_loadgen(cases, tmp_path), strict=True):
        detail, first = answer["detail"], column(answer, "first_ns")
        tpot = (column(answer, "latency_ns") - first) // (column(answer, "tokens") - 1)
        n, at = len(first), int(len(first) * 0.99)
        assert detail["result_first_token_99.00_percentile_latency_ns"] == np.sort(first)[at]
        assert detail["result_time_per_output_token_99.00_percentile_ns"] == np.sort(tpot)[at]
        limits = case["tokens"]
        tpot_short = shortfall(n, int((tpot > limits["tpot_limit_ns"]).sum()), 0.99)
        ttft_short = shortfall(n, int((first > limits["ttft_limit_ns"]).sum()), 0.99)
        assert detail["early_stopping_met"] == (tpot_short == ttft_short == 0)
        for short, text in (
            (tpot_short, detail["early_stopping_tpot_result"]),
            (ttft_short if tpot_short == 0 else None, detail["early_stopping_ttft_result"]),
        ):
            found = re.search(r"at least (\d+)\s+more queries", text)
            assert (text == "") if short is None else (int(found[1]) if found else 0) == short
