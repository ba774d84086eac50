"""Dependence, corrected early stopping and intervals, on series whose answer is known."""

import json
import math
import time

import numpy as np
import pytest
from rows import make_rows
from scipy.signal import lfilter

from loadgen.core import early_stopping
from loadgen.core.confidence import (
    _made,
    corrected_early_stopping,
    mean_interval,
    percentile_interval,
    rate_interval,
)
from loadgen.core.dependence import effective_size, latency_inflation, ranks, variance_inflation
from loadgen.core.metrics import summarise
from loadgen.core.scenario import Kind, Limits
from loadgen.core.verdict import Audit, judge

MS, S = 1_000_000, 1_000_000_000


def mm1(rho, n, rng):
    """Latencies of a stationary M/M/1 queue by the plain recursion; exponential with rate 1 - rho."""
    service, gap = rng.exponential(1, n).tolist(), rng.exponential(1 / rho, n).tolist()
    wait, out = (rng.exponential(1 / (1 - rho)) if rng.random() < rho else 0.0), []
    for k in range(n):
        out.append(wait + service[k])
        wait = max(0.0, wait + service[k] - gap[(k + 1) % n])
    return np.array(out)


def ar1(phi, n, rng):
    return lfilter([1.0], [1.0, -phi], rng.standard_normal(n + 2000) * math.sqrt(1 - phi**2))[2000:]


def false_passes(draw, limit, n, p, runs):
    plain = corrected = 0
    for _ in range(runs):
        latencies = draw(n)
        over = latencies > limit
        plain += early_stopping.passes(n, int(over.sum()), p)
        corrected += corrected_early_stopping(over, p, latencies=latencies).passes
    return plain / runs, corrected / runs


@pytest.mark.parametrize("phi", [0.5, 0.9])
def test_inflation_of_an_autoregression_is_known(phi):
    v = [variance_inflation(ar1(phi, 20_000, np.random.default_rng(seed))) for seed in range(8)]
    assert np.median(v) == pytest.approx((1 + phi) / (1 - phi), rel=0.2)


def test_inflation_of_independent_values_is_about_one():
    v = [variance_inflation(np.random.default_rng(seed).random(20_000)) for seed in range(8)]
    assert min(v) >= 1.0 and np.median(v) < 1.3
    assert effective_size(np.random.default_rng(1).random(20_000)) > 12_000


def test_a_slow_swell_is_found_behind_a_sawtooth():
    """Answers that end together give a sawtooth in due order, whose correlations turn negative within a few lags."""
    rng = np.random.default_rng(3)
    swell = np.repeat(rng.standard_normal(400), 100)
    saw = np.tile(np.linspace(2, -2, 10), 4000)
    assert variance_inflation(swell + saw) > 0.8 * 100 / (1 + saw.var())


def test_ties_are_no_trend():
    assert set(ranks(np.array([5.0, 1.0, 5.0, np.inf]))) == {0.0, 0.375, 0.75}
    assert latency_inflation(np.full(5000, 7.0)) == 1.0


def test_never_passes_what_loadgen_fails():
    rng = np.random.default_rng(5)
    for n in (50, 459, 700, 2000):
        for share in (0.0, 0.003, 0.01, 0.03):
            over = rng.random(n) < share
            if corrected_early_stopping(over, 0.99, latencies=rng.random(n) + over).passes:
                assert early_stopping.passes(n, int(over.sum()), 0.99)


def test_refuses_where_plain_early_stopping_passes_a_queue_at_its_limit():
    rng = np.random.default_rng(6)
    plain, corrected = false_passes(lambda n: mm1(0.95, n, rng), -math.log(0.01) / 0.05, 1000, 0.99, 100)
    assert plain > 0.85
    assert corrected == 0


def test_boundary_of_a_queue_whose_dependence_can_be_told():
    rng = np.random.default_rng(7)
    plain, corrected = false_passes(lambda n: mm1(0.5, n, rng), -math.log(0.1) / 0.5, 1000, 0.90, 300)
    assert plain > 0.12
    assert corrected <= 0.02


def test_independent_latencies_need_at_most_three_times_the_queries():
    rng = np.random.default_rng(8)
    runs = [rng.random(3 * 459) for _ in range(60)]
    passed = [corrected_early_stopping(run > 2, 0.99, latencies=run).passes for run in runs]
    assert np.mean(passed) > 0.9


def test_says_how_many_queries_would_do_and_they_do():
    rng = np.random.default_rng(9)
    limit = -math.log(0.001) / 0.5  # one in a thousand is late
    short = mm1(0.5, 2000, rng)
    stop = corrected_early_stopping(short > limit, 0.99, latencies=short)
    assert not stop.passes and stop.needed is not None and 2000 < stop.needed < 100_000
    assert f"{stop.needed} queries would show it" in stop.explanation
    long = mm1(0.5, 2 * stop.needed, rng)
    assert corrected_early_stopping(long > limit, 0.99, latencies=long).passes


def test_no_length_helps_a_rate_over_the_limit():
    over = np.arange(3000) % 50 == 0
    assert corrected_early_stopping(over, 0.99, latencies=over + 0.0).needed is None


def test_without_latencies_few_late_queries_are_refused():
    stop = corrected_early_stopping(np.zeros(100_000, dtype=bool), 0.99)
    assert not stop.passes and stop.needed is None and "too few" in stop.explanation
    assert corrected_early_stopping(np.random.default_rng(1).random(100_000) < 0.005, 0.99).passes


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="percentile"):
        corrected_early_stopping(np.zeros(5, dtype=bool), 99)
    with pytest.raises(ValueError, match="as many as over"):
        corrected_early_stopping(np.zeros(5, dtype=bool), 0.99, latencies=np.zeros(4))
    with pytest.raises(ValueError, match="fractions"):
        percentile_interval(np.zeros(50), 99)
    assert not corrected_early_stopping(np.zeros(0, dtype=bool), 0.99).passes


def test_percentile_intervals_cover_what_they_claim():
    rng = np.random.default_rng(10)
    for draw, truth in ((lambda: rng.exponential(1, 1000), math.log(10)), (lambda: mm1(0.5, 5000, rng), math.log(100))):
        pairs = [percentile_interval(draw(), 0.9) for _ in range(200)]
        assert 0.92 <= np.mean([low <= truth <= high for low, high in pairs]) <= 0.995  # 95 %, give or take two errors
    narrow, wide = percentile_interval(rng.exponential(2, 5000), 0.9), percentile_interval(mm1(0.5, 5000, rng), 0.9)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_failures_bound_an_interval_from_below_only():
    values = np.random.default_rng(11).random(1000)
    values[::120] = np.inf
    low, high = percentile_interval(values, 0.99)
    assert 0.9 < low < 1 and high == math.inf
    assert math.isfinite(percentile_interval(values, 0.5)[1])
    assert percentile_interval(values[:10], 0.5) is None
    assert percentile_interval(np.random.default_rng(1).random(100), 0.99)[1] == math.inf  # 100 can't bound a p99


def test_mean_and_rate_intervals():
    rng = np.random.default_rng(12)
    held = [low <= 0 <= high for low, high in (mean_interval(ar1(0.8, 3000, rng)) for _ in range(200))]
    assert np.mean(held) > 0.91
    due = np.cumsum(rng.exponential(S / 50, 20_000)).astype(np.int64)
    low, high = rate_interval(due, due, np.full(20_000, 10.0), int(due[-1]))
    assert low < 500 < high and high - low < 30
    assert rate_interval(due[:50], due[:50], np.ones(50), int(due[49])) is None


def test_waves_of_streams_are_a_steady_rate():
    """64 streams side by side, each a request after the other, all in step: they end together, and work all the time."""
    rng = np.random.default_rng(14)
    first = np.sort(np.concatenate([wave * S + rng.integers(1, S // 20, 64) for wave in range(20)]))
    done = (first // S + 1) * S
    low, high = rate_interval(first, done, np.full(len(first), 128.0), int(done[-1]))
    assert low < 64 * 128 < high and high - low < 0.1 * 64 * 128


@pytest.mark.parametrize("seed", range(5))
def test_what_is_made_in_each_stretch_is_the_overlap(seed):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 10 * S, 300)
    done = first + rng.choice([0, 1, S // 100, S, 4 * S], 300)
    amounts, window = rng.integers(1, 200, 300).astype(float), int(done.max())
    edges = window * np.arange(31) / 30
    until = [
        amounts @ np.where(done > first, np.clip((e - first) / np.maximum(done - first, 1), 0, 1), done < e)
        for e in edges
    ]
    until[-1] = amounts.sum()
    assert _made(first, done, amounts, window, 30) == pytest.approx(np.diff(until), abs=1e-6 * amounts.sum())


def test_a_million_rows_take_under_two_seconds():
    latencies = np.random.default_rng(13).exponential(1, 10**6)
    start = time.process_time()
    corrected_early_stopping(latencies > 5, 0.99, latencies=latencies)
    percentile_interval(latencies, 0.99)
    assert time.process_time() - start < 2


def served(latencies, gap_ns=S):
    """Rows of two tokens, a first one after `latencies` (s)."""
    waits = [int(x * S) for x in latencies]
    return make_rows(
        [
            {"due": i * gap_ns, "chunks": [i * gap_ns + w, i * gap_ns + w + MS], "tokens": [1, 1]}
            for i, w in enumerate(waits)
        ]
    )


def decided(rows, scenario):
    summary, measured = summarise([rows], scenario)
    return summary, judge(summary, measured, scenario, Audit((), 0, len(rows), len(rows), 1.0))


def test_summary_has_intervals_around_its_figures(scenario):
    summary, _ = decided(served(np.random.default_rng(14).exponential(1, 2000)), scenario())
    found = json.loads(json.dumps(summary))["intervals"]
    for p in ("p50", "p90", "p99"):
        low, high = found["ttft_ns"][p]
        assert low <= summary["ttft_ns"][p] <= high
    for name in ("qps", "tokens_per_s"):
        assert found[name][0] <= summary[name] <= found[name][1]
    offline, _ = decided(served([1.0] * 200, gap_ns=0), scenario(kind=Kind.OFFLINE))
    assert offline["intervals"]["e2e_ns"]["p50"] is None


def test_caution_where_only_independence_would_pass(scenario):
    limits = scenario(limits=Limits(ttft_ns=200 * S))
    _, queue = decided(served(mm1(0.95, 1000, np.random.default_rng(15))), limits)
    remark = next(c for c in queue.cautions if c.code == "confidence_autocorrelated")
    assert queue.valid and "TTFT" in remark.seen and "queries" in remark.advice
    assert queue.to_json()["cautions"][0]["code"] == "confidence_autocorrelated"
    _, unrelated = decided(served(np.random.default_rng(16).random(2000)), limits)
    assert not unrelated.cautions


def test_caution_where_loadgens_window_flatters(scenario):
    rows = [{"due": i * S, "chunks": [i * S + MS], "tokens": [4]} for i in range(50)]
    rows[3]["chunks"] = [99 * S]
    _, verdict = decided(make_rows(rows), scenario())
    assert [c.code for c in verdict.cautions] == ["window_differs"]


@pytest.mark.slow
@pytest.mark.parametrize(("rho", "n", "p"), [(0.5, 5000, 0.99), (0.8, 1000, 0.9), (0.9, 5000, 0.99)])
def test_false_pass_rate_at_the_boundary(rho, n, p):
    rng = np.random.default_rng(17)
    plain, corrected = false_passes(lambda m: mm1(rho, m, rng), -math.log(1 - p) / (1 - rho), n, p, 400)
    assert plain > 0.15
    assert corrected <= 0.02
