"""Energy of a window against integrals that are known in closed form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.core.energy import Samples, measure, total

S = 1_000_000_000


def samples(watts, hz=5.0, start=-2.0, end=12.0, counter=None, throttle=None, lost=None, device="gpu0", cut=()):
    t = np.round(np.arange(start, end + 1e-9, 1 / hz), 6)
    for a, b in cut:
        t = t[(t <= a) | (t >= b)]
    n = len(t)
    return Samples(
        device,
        np.round(t * S).astype(np.int64),
        np.array([watts(x) for x in t], dtype=float),
        np.array([counter(x) for x in t], dtype=float) if counter else np.full(n, np.nan),
        np.array([throttle(x) for x in t], dtype=np.int64) if throttle else np.zeros(n, np.int64),
        lost,
    )


def codes(energy):
    return [r.code for r in energy.reasons]


def test_constant_power_over_exactly_the_window():
    e = measure(samples(lambda t: 300.0), 0, 10 * S)
    assert e.joules == pytest.approx(3000.0)
    assert e.mean_watts == pytest.approx(300.0)
    assert e.coverage == 1.0 and e.reasons == () and e.counter_joules is None


@given(a=st.floats(0.01, 4.0), length=st.floats(0.5, 7.0), slope=st.floats(-20, 20))
def test_a_ramp_is_exact_wherever_the_edges_lie(a, length, slope):
    """A trapezoid over a straight line has no error, so an edge that is off by a sample would show."""
    e = measure(samples(lambda t: 300 + slope * t), round(a * S), round((a + length) * S))
    b = a + length
    assert e.joules == pytest.approx(300 * length + slope * (b * b - a * a) / 2, rel=1e-6)


def test_power_outside_the_window_does_not_count():
    e = measure(samples(lambda t: 100.0 if 0 <= t <= 10 else 5000.0, hz=50), 0, 10 * S)
    assert e.joules == pytest.approx(1000.0)


def test_counter_agrees_or_not():
    good = measure(samples(lambda t: 200.0, counter=lambda t: 1e6 + 200 * t), 0, 10 * S)
    assert good.counter_joules == pytest.approx(2000.0) and good.reasons == ()
    bad = measure(samples(lambda t: 200.0, counter=lambda t: 1e6 + 220 * t), 0, 10 * S)
    assert codes(bad) == ["power_disagrees"]


def test_a_counter_that_was_reset_is_no_measurement():
    e = measure(samples(lambda t: 200.0, counter=lambda t: (1e6 + 200 * t) if t < 5 else 200 * t), 0, 10 * S)
    assert e.counter_joules is None and e.joules == pytest.approx(2000.0)


def test_a_gap_is_named_and_not_covered():
    e = measure(samples(lambda t: 200.0, cut=[(4.0, 7.0)]), 0, 10 * S)
    assert codes(e) == ["power_gap", "power_coverage"]
    assert e.coverage == pytest.approx(0.7) and e.largest_gap_s == pytest.approx(3.0)
    assert not e.complete


def test_nothing_is_extrapolated():
    e = measure(samples(lambda t: 200.0, end=6.0), 0, 10 * S)
    assert e.joules == pytest.approx(1200.0) and e.coverage == pytest.approx(0.6)
    assert e.mean_watts == pytest.approx(200.0)
    assert measure(samples(lambda t: 200.0, start=20, end=30), 0, 10 * S).joules is None


def test_heat_is_a_reason_and_a_power_cap_is_not():
    cap = measure(samples(lambda t: 700.0, throttle=lambda t: 0x4), 0, 10 * S)
    assert cap.throttled == {"sw_power_cap": 1.0} and cap.reasons == ()
    hot = measure(samples(lambda t: 700.0, throttle=lambda t: 0x40 if t > 5 else 0), 0, 10 * S)
    assert codes(hot) == ["throttled"]
    assert hot.throttled["hw_thermal"] == pytest.approx(0.5, abs=0.02)
    early = measure(samples(lambda t: 700.0, throttle=lambda t: 0x40 if t < 0 else 0), 0, 10 * S)
    assert early.throttled == {}


def test_several_gpus_are_summed_and_one_that_was_lost_takes_the_sum_away():
    whole = [measure(samples(lambda t, w=w: w, device=f"gpu{i}"), 0, 10 * S) for i, w in enumerate((300.0, 500.0))]
    both = total(whole)
    assert both["joules"] == pytest.approx(8000.0) and both["mean_watts"] == pytest.approx(800.0)
    assert both["power_valid"] and both["counter_joules"] is None
    lost = measure(samples(lambda t: 300.0, end=5.0, lost="GPU is lost", device="gpu1"), 0, 10 * S)
    part = total([whole[0], lost])
    assert part["joules"] is None and not part["power_valid"]
    assert "power_lost" in [r["code"] for r in part["reasons"]]


def test_no_samples_at_all():
    empty = Samples("gpu0", np.empty(0, np.int64), np.empty(0), np.empty(0), np.empty(0, np.int64))
    e = measure(empty, 0, 10 * S)
    assert e.joules is None and e.mean_watts is None and codes(e) == ["power_missing"]
    assert total([])["joules"] is None
