"""Steady-state tests: false alarms on stationary series, and planted warm-ups, drifts and overload."""

import json

import numpy as np
import pytest
from rows import make_rows
from scipy.signal import lfilter

from loadgen.core.metrics import summarise
from loadgen.core.steady_state import geweke, mann_kendall, mser5, steady_state, theil_sen
from loadgen.core.verdict import Audit, judge

S = 1_000_000_000


def ar1(phi, n, rng):
    return np.exp(0.5 * lfilter([1.0], [1.0, -phi], rng.standard_normal(n + 2000) * np.sqrt(1 - phi**2))[2000:])


def due(n, rng):
    return np.cumsum(rng.exponential(S, n)).astype(np.int64)


def overloaded(rho, n, rng):
    """Due times and latencies (ns) of an M/M/1 queue that starts empty."""
    arrive, free, latency = np.cumsum(rng.exponential(1 / rho, n)), 0.0, []
    for at, work in zip(arrive, rng.exponential(1, n), strict=True):
        free = max(free, at) + work
        latency.append(free - at)
    return (arrive * S).astype(np.int64), np.array(latency) * S


@pytest.mark.parametrize("phi", [0.0, 0.7, 0.9, 0.99])
def test_false_alarms_are_few(phi):
    rng = np.random.default_rng(1)
    alarms = [not steady_state(due(2000, rng), S * ar1(phi, 2000, rng)).steady for _ in range(150)]
    assert np.mean(alarms) <= 0.06


def test_a_planted_warm_up_is_found_and_cut_where_it_ends():
    rng = np.random.default_rng(2)
    states = []
    for _ in range(20):
        times, latency = due(4000, rng), S * ar1(0.3, 4000, rng)
        latency[:200] *= 4
        states.append(steady_state(times, latency))
    assert sum(not s.steady for s in states) >= 19
    assert 150 <= np.median([s.excluded for s in states]) <= 250
    assert "warm-up" in states[0].explanation and states[0].truncation_ns > 0


def test_a_planted_drift_is_found_with_its_slope():
    rng = np.random.default_rng(3)
    times = due(4000, rng)
    minutes = times / 60e9
    latency = S * (1 + 0.01 * minutes) + 0.2 * S * rng.standard_normal(4000)
    state = steady_state(times, latency)
    assert not state.steady and state.trend_p < 1e-4
    assert state.slope_low < 0.01 * S < state.slope_high
    assert state.slope_ns_per_minute == pytest.approx(0.01 * S, rel=0.1)


def test_a_drift_too_small_to_matter_is_no_reason():
    rng = np.random.default_rng(4)
    latency = S * (1 + 0.03 * np.arange(20_000) / 20_000) + 0.02 * S * rng.standard_normal(20_000)
    state = steady_state(due(20_000, rng), latency)
    assert state.trend_p < 1e-6 and state.steady


def test_a_rate_above_capacity_is_a_growing_backlog():
    rng = np.random.default_rng(5)
    over = [steady_state(*overloaded(1.3, 1500, rng)) for _ in range(20)]
    assert sum("above capacity" in s.explanation for s in over) >= 18
    assert np.median([s.backlog_per_minute for s in over]) == pytest.approx(0.3 * 60, rel=0.2)
    below = [steady_state(*overloaded(0.95, 1500, rng)) for _ in range(60)]
    assert sum(not s.steady for s in below) <= 3


def test_too_short_says_so():
    rng = np.random.default_rng(6)
    few = steady_state(due(50, rng), rng.random(50))
    assert few.steady and not few.tested and "only 50 requests" in few.explanation
    slow = steady_state(due(1000, rng), S * ar1(0.995, 1000, rng))
    assert not slow.tested and "too short" in slow.explanation
    at_once = steady_state(np.zeros(500, dtype=np.int64), rng.random(500))
    assert "due at once" in at_once.explanation
    with pytest.raises(ValueError, match="equally many"):
        steady_state(np.zeros(5, dtype=np.int64), np.zeros(4))


def test_the_named_tests_by_hand():
    rng = np.random.default_rng(7)
    step = np.concatenate([np.full(50, 9.0), np.tile([1.0, 1.1, 0.9, 1.05, 0.95], 90)])
    assert mser5(step) == 50
    assert mser5(np.arange(7.0)) == 0
    assert mann_kendall(np.arange(20.0)) < 1e-6
    assert mann_kendall(np.tile([1.0, -1.0], 10)) > 0.05
    assert mann_kendall(np.array([3.0, 1.0, 4.0, 2.0, 5.0])) == pytest.approx(0.4624, abs=1e-3)  # S = 4, var 16.67
    assert np.mean([geweke(rng.random(2000)) < 0.05 for _ in range(200)]) < 0.09
    assert geweke(np.full(500, 2.0)) == 1.0


def test_summary_and_caution(scenario):
    waits = np.concatenate([np.full(100, 5 * S), S + np.arange(1900) * 7919 % 1000])
    rows = make_rows([{"due": i * S, "chunks": [i * S + int(w)], "tokens": [3]} for i, w in enumerate(waits)])
    summary, measured = summarise([rows], scenario())
    state = json.loads(json.dumps(summary))["steady_state"]
    assert not state["steady"] and state["excluded"] == 100
    assert state["summary"]["requests"] == 1900
    assert state["summary"]["e2e_ns"]["p99"] < 1.1 * S < summary["ttft_ns"]["p99"]
    assert state["summary"]["tokens_per_s"] == pytest.approx(3, rel=0.01)
    verdict = judge(summary, measured, scenario(), Audit((), 0, 2000, 2000, 1.0))
    assert verdict.valid and "not_steady" in [c.code for c in verdict.cautions]


@pytest.mark.slow
@pytest.mark.parametrize(("phi", "n"), [(0.5, 20_000), (0.9, 5000)])
def test_false_alarm_rate(phi, n):
    rng = np.random.default_rng(8)
    alarms = [not steady_state(due(n, rng), S * ar1(phi, n, rng)).steady for _ in range(400)]
    assert np.mean(alarms) <= 0.05


def test_theil_sen_is_scipys():
    from scipy.stats import theilslopes

    rng = np.random.default_rng(3)
    for n in (5, 20, 60):
        x, y = np.round(rng.random(n) * 10, 1), np.round(rng.random(n), 1)  # with ties
        slope, _, low, high = theilslopes(y, x, alpha=0.95)
        assert theil_sen(y, x) == pytest.approx((slope, low, high))
