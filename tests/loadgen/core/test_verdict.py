"""Every reason, from rows that cause it and from rows that just do not."""

import numpy as np
import pytest
from rows import make_rows

from loadgen.core.metrics import summarise
from loadgen.core.scenario import Kind, Limits, Minimums
from loadgen.core.verdict import Audit, Verdict, WorkerAudit, judge

MS, S = 1_000_000, 1_000_000_000


def worker(**changes):
    return WorkerAudit(**{"worker": 0, "requests": 10, "lateness_p50_ns": 0, "lateness_p99_ns": 0, "lateness_max_ns": 0,
                                 "loop_lag_p50_ns": 0, "loop_lag_p99_ns": 0, "loop_lag_max_ns": 0, "cpu_share": 0.1,
                                 "max_rss_bytes": 1, **changes})  # fmt: skip


def decide(specs, scenario, **audit) -> Verdict:
    rows = make_rows(specs)
    account = {"workers": (worker(),), "workers_expected": 1, "scheduled": len(rows), "rows": len(rows), "wall_s": 10.0}
    summary, measured = summarise([rows], scenario)
    return judge(summary, measured, scenario, Audit(**{**account, **audit}))


def codes(verdict: Verdict) -> list[str]:
    return [r.code for r in verdict.reasons]


def good(n: int, gap_ns: int = S) -> list[dict]:
    return [
        {"due": i * gap_ns, "chunks": [i * gap_ns + 10 * MS, i * gap_ns + 20 * MS], "tokens": [1, 1]} for i in range(n)
    ]


def test_valid_says_what_mlperf_length_lacks(scenario):
    smoke = scenario(minimums=Minimums(2 * S, 3), mlperf=Minimums(600 * S, 0, True), limits=Limits(ttft_ns=S))
    verdict = decide(good(3), smoke)
    assert verdict.valid
    assert verdict.headline == (
        "VALID for preset smoke; not MLPerf length: needs ≥ 600 s (ran 2.0 s); "
        "≥ 459 queries for early stopping (had 3)"
    )  # fmt: skip


def test_valid_at_mlperf_length_says_so(scenario):
    verdict = decide(good(3), scenario(minimums=Minimums(2 * S, 3), mlperf=Minimums(2 * S, 3)))
    assert verdict.valid and not verdict.lacking
    assert "meets MLPerf" in verdict.headline


@pytest.mark.parametrize("kind", [Kind.SERVER, Kind.SINGLE_STREAM, Kind.MULTI_STREAM])
def test_duration_is_the_last_due_time(scenario, kind):
    assert decide(good(3), scenario(kind=kind, minimums=Minimums(2 * S))).valid
    assert codes(decide(good(3), scenario(kind=kind, minimums=Minimums(2 * S + 1)))) == ["min_duration"]


def test_offline_duration_is_the_longest_latency(scenario):
    rows = [{"due": 0, "chunks": [S, 2 * S], "tokens": [1, 1]}]
    assert decide(rows, scenario(kind=Kind.OFFLINE, minimums=Minimums(2 * S))).valid
    assert codes(decide(rows, scenario(kind=Kind.OFFLINE, minimums=Minimums(2 * S + 1)))) == ["min_duration"]


def test_a_latency_equal_to_the_limit_passes(scenario):
    assert decide(good(10), scenario(limits=Limits(ttft_ns=10 * MS, tpot_ns=10 * MS, e2e_ns=20 * MS))).valid
    over = scenario(limits=Limits(ttft_ns=10 * MS - 1, tpot_ns=10 * MS - 1, e2e_ns=20 * MS - 1))
    assert codes(decide(good(10), over)) == ["ttft_limit", "tpot_limit", "e2e_limit"]


def test_failures_make_the_percentile_infinite_and_the_run_invalid(scenario):
    rows = [*good(9), {"due": 9 * S, "outcome": "error", "done": 9 * S + 1}]
    verdict = decide(rows, scenario(limits=Limits(ttft_ns=S)))
    assert codes(verdict) == ["failed_error", "ttft_limit"]
    assert "failed requests" in verdict.reasons[1].seen


@pytest.mark.parametrize(("outcome", "code"), [("shed", "shed"), ("timeout", "failed_timeout"), ("cut", "unfinished")])
def test_every_outcome_but_ok_is_a_reason(scenario, outcome, code):
    assert codes(decide([*good(3), {"due": 3 * S, "outcome": outcome, "done": 3 * S}], scenario())) == [code]


def test_early_stopping_needs_loadgens_counts(scenario):
    strict = scenario(minimums=Minimums(early_stopping=True), limits=Limits(ttft_ns=15 * MS))
    assert codes(decide(good(458), strict)) == ["early_stopping"]
    assert decide(good(459), strict).valid
    late = {"due": 459 * S, "chunks": [459 * S + 16 * MS], "tokens": [1]}
    verdict = decide([*good(600), late], strict)  # 1 late one needs 662
    assert codes(verdict) == ["early_stopping"]
    assert "at least 61 more" in verdict.reasons[0].advice
    assert decide([*good(661), late], strict).valid


def test_single_stream_needs_its_floor(scenario):
    strict = scenario(kind=Kind.SINGLE_STREAM, percentile=0.90, minimums=Minimums(early_stopping=True))
    assert codes(decide(good(63), strict)) == ["early_stopping"]
    assert decide(good(64), strict).valid


def test_the_client_as_bottleneck_is_named_with_the_workers_needed(scenario):
    busy = worker(cpu_share=0.95, lateness_p99_ns=40 * MS, loop_lag_p99_ns=30 * MS)
    verdict = decide(good(3), scenario(target_qps=100.0), workers=(busy,), requested_qps=100.0, rows=3, wall_s=0.06)
    assert codes(verdict) == ["client_late", "client_lag", "client_cpu"]
    assert "use 4 workers" in verdict.reasons[0].advice  # half the rate was kept up: 0.95 * 2 / 0.6 → 4


def test_lateness_may_be_one_percent_of_the_limit_it_is_part_of(scenario):
    late = worker(lateness_p99_ns=19 * MS)
    assert decide(good(3), scenario(limits=Limits(ttft_ns=2 * S)), workers=(late,)).valid
    assert codes(decide(good(3), scenario(limits=Limits(ttft_ns=S)), workers=(late,))) == ["client_late"]


def test_tokens_must_be_counted_agree_and_be_as_many_as_asked(scenario):
    rows = good(4)
    rows[0] |= {"usage": 3}
    rows[1] |= {"asked": 64}
    rows[2] |= {"chunks": [], "tokens": [], "done": 2 * S + 5, "usage": 0}
    assert codes(decide(rows, scenario())) == ["tokens_uncounted", "token_mismatch", "output_length"]


def test_lost_rows_and_a_cut_run(scenario):
    verdict = decide(good(3), scenario(), scheduled=5, workers_expected=2)
    assert codes(verdict) == ["missing_rows"]
    assert "2 of 5 slots" in verdict.reasons[0].seen and "1 of 2 workers" in verdict.reasons[0].seen
    assert codes(decide(good(3), scenario(), ended="stopped by the user")) == ["cut_off"]


def test_a_run_without_rows_still_ends_in_a_verdict(scenario):
    assert codes(decide([], scenario(limits=Limits(ttft_ns=1)), ended="it died")) == ["cut_off", "no_requests"]
    assert not decide([{"due": 0, "outcome": "error", "done": 1}], scenario(kind=Kind.OFFLINE)).valid


def test_the_client_ceiling_is_the_rate_at_full_cpu():
    audit = Audit((worker(cpu_share=0.25), worker(cpu_share=0.5)), 2, 100, 100, wall_s=10.0)
    assert audit.ceiling_qps == pytest.approx(20.0)
    assert np.isclose(audit.to_json()["client_ceiling_qps"], 20.0)
