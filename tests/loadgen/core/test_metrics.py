"""Formulas on rows small enough to check by hand."""

import numpy as np
import pytest
from rows import make_rows

from loadgen.core.metrics import METRICS, GapHistogram, describe, join, metrics_of, percentile_name, summarise
from loadgen.core.scenario import Kind, Limits

MS = 1_000_000


def test_ttft_tpot_and_e2e_start_at_the_due_time(scenario):
    rows = make_rows([{"due": 0, "sent": 5 * MS, "chunks": [20 * MS, 30 * MS, 45 * MS], "tokens": [1, 1, 1]}])
    summary, _ = summarise([rows], scenario())
    assert summary["ttft_ns"]["p50"] == 20 * MS
    assert summary["ttft_sent_ns"]["p50"] == 15 * MS
    assert summary["e2e_ns"]["p50"] == 45 * MS
    assert summary["e2e_sent_ns"]["p50"] == 40 * MS
    assert summary["tpot_ns"]["p50"] == 25 * MS // 2


def test_tpot_counts_tokens_not_responses(scenario):
    rows = make_rows([{"due": 0, "chunks": [10 * MS, 50 * MS], "tokens": [1, 4]}])
    summary, _ = summarise([rows], scenario())
    assert summary["tpot_ns"]["p50"] == 10 * MS
    assert summary["tokens_out"] == 5
    assert summary["tokens_per_response"] == 2.5
    assert summary["itl_ns"]["count"] == 1
    assert summary["itl_ns"]["p50"] == pytest.approx(40 * MS, rel=4e-4)


def test_a_one_token_answer_has_no_tpot(scenario):
    summary, _ = summarise([make_rows([{"due": 0, "chunks": [10 * MS], "tokens": [1]}])], scenario())
    assert summary["tpot_ns"]["count"] == 0


def test_a_failed_request_counts_as_slower_than_any(scenario):
    good = [{"due": 0, "chunks": [10 * MS], "tokens": [1]}] * 9
    summary, _ = summarise([make_rows([*good, {"due": 0, "outcome": "error", "done": MS}])], scenario())
    assert summary["ttft_ns"]["failed"] == 1
    assert summary["ttft_ns"]["p50"] == 10 * MS
    assert summary["ttft_ns"]["p90"] is None  # element 9 of 10 is the failure, although it took only 1 ms
    assert summary["failed"] == 1
    assert summary["outcomes"]["error"] == 1


def test_percentiles_are_loadgens_floor_index():
    described = describe(np.arange(1, 101), 0)
    assert described["p50"] == 51
    assert described["p99"] == 100
    assert describe(np.arange(1, 101), 1)["p99"] == 100  # int(101 * .99) = 99
    assert percentile_name(0.999) == "p99.9"


def test_loadgens_window_ends_at_the_query_scheduled_last(scenario):
    rows = make_rows(
        [
            {"due": 0, "chunks": [100 * MS, 4000 * MS], "tokens": [1, 1]},  # the long tail that LoadGen leaves out
            {"due": 500 * MS, "chunks": [600 * MS, 1000 * MS], "tokens": [1, 1]},
        ]
    )
    summary, _ = summarise([rows], scenario(kind=Kind.SERVER))
    assert summary["loadgen_qps"] == pytest.approx(1 / 1.0)
    assert summary["loadgen_tokens_per_s"] == pytest.approx(4 / 1.0)
    assert summary["qps"] == pytest.approx(2 / 4.0)
    assert summary["tokens_per_s"] == pytest.approx(4 / 4.0)
    offline, _ = summarise([rows], scenario(kind=Kind.OFFLINE))
    assert offline["loadgen_tokens_per_s"] == offline["tokens_per_s"]


def test_goodput_needs_every_limit_at_once(scenario):
    limits = Limits(ttft_ns=20 * MS, tpot_ns=10 * MS)
    rows = make_rows(
        [
            {"due": 0, "chunks": [20 * MS, 30 * MS], "tokens": [1, 1]},  # both exactly at the limit
            {"due": 0, "chunks": [21 * MS, 22 * MS], "tokens": [1, 1]},
            {"due": 0, "chunks": [10 * MS, 21 * MS], "tokens": [1, 1]},
            {"due": 0, "outcome": "timeout", "done": 5 * MS},
        ]
    )
    summary, _ = summarise([rows], scenario(limits=limits))
    assert summary["goodput_share"] == 0.25


def test_a_query_ends_with_its_last_sample_and_fails_with_any(scenario):
    rows = make_rows(
        [
            {"due": 0, "query": 0, "chunks": [10 * MS], "tokens": [1]},
            {"due": 0, "query": 0, "chunks": [30 * MS], "tokens": [1]},
            {"due": 40 * MS, "query": 1, "chunks": [45 * MS], "tokens": [1]},
            {"due": 40 * MS, "query": 1, "outcome": "error", "done": 41 * MS},
        ]
    )
    summary, _ = summarise([rows], scenario(kind=Kind.MULTI_STREAM))
    assert summary["queries"] == 2
    assert summary["query_ns"]["count"] == 1
    assert summary["query_ns"]["failed"] == 1
    assert summary["query_ns"]["max"] == 30 * MS


def test_warm_up_is_left_out_and_batches_join(scenario):
    warm = {"due": -50 * MS, "phase": "warmup", "chunks": [-40 * MS], "tokens": [9]}
    batches = [make_rows([warm, {"due": 0, "chunks": [MS, 3 * MS], "tokens": [1, 1]}]),
               make_rows([{"due": 0, "chunks": [2 * MS], "tokens": [1]}])]  # fmt: skip
    summary, rows = summarise(batches, scenario())
    assert len(rows) == 2
    assert summary["tokens_out"] == 3
    assert join(batches).due_ns.tolist() == [-50 * MS, 0, 0]  # in due order


def test_in_flight_peak_counts_overlap_only(scenario):
    rows = make_rows(
        [
            {"due": 0, "sent": 0, "chunks": [10], "tokens": [1]},
            {"due": 5, "sent": 5, "chunks": [20], "tokens": [1]},
            {"due": 20, "sent": 20, "chunks": [30], "tokens": [1]},
        ]
    )
    assert summarise([rows], scenario())[0]["peak_in_flight"] == 2


def test_no_rows_is_a_summary_too(scenario):
    summary, rows = summarise([make_rows([])], scenario())
    assert len(rows) == 0
    assert summary["qps"] is None
    assert summary["scheduled"] == 0


def test_gap_histogram_errs_by_its_bin_width_at_most():
    gaps = np.random.default_rng(1).lognormal(16, 2, 200_000).astype(np.int64)
    histogram = GapHistogram()
    for part in np.array_split(gaps, 7):
        histogram.add(part)
    exact = describe(gaps, 0)
    for name, value in histogram.describe().items():
        assert value == pytest.approx(exact[name], rel=4e-4), name


def test_every_metric_is_in_a_summary_and_says_what_it_is(scenario):
    summary, _ = summarise([make_rows([{"due": 0, "chunks": [5], "tokens": [1]}])], scenario())
    measured = {m.name for m in metrics_of({"llm"}) if not m.of_power}  # power is in a summary where it was sampled
    assert measured | {"outcomes", "intervals", "steady_state"} == set(summary)
    assert all(m.help and m.label and m.unit for m in METRICS)
    assert len({m.name for m in METRICS}) == len(METRICS)
