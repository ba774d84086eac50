"""Ratios, their intervals, the decomposition, cost, and when an A/B experiment stops."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from loadgen.core import bootstrap, compare, cost
from loadgen.core.bootstrap import Estimate
from loadgen.core.decompose import Grid, additive, decompose
from loadgen.core.interleave import look, order

HARDWARE, COMPILER = {"h0": 1.0, "h1": 1.7, "h2": 2.4}, {"b0": 1.0, "b1": 1.5, "b2": 2.6}
BOTH = {("h2", "b2"): 1.3, ("h1", "b2"): 1.1}


def grid(holes=(), both=BOTH, noise=0.0, repeats=2):
    rng = np.random.default_rng(5)
    cells = {(h, b): compare.mean([Estimate(math.log(x * y * both.get((h, b), 1)) + noise * rng.normal())
                                   for _ in range(repeats)])
             for h, x in HARDWARE.items() for b, y in COMPILER.items() if (h, b) not in holes}  # fmt: skip
    return Grid(tuple(HARDWARE), tuple(COMPILER), cells)


def coverage():
    """The benchmark's own simulations, a smaller number of them."""
    path = Path(__file__).parents[3] / "benchmarks" / "compare_coverage.py"
    spec = importlib.util.spec_from_file_location("compare_coverage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_quantile_is_loadgens_and_failures_are_slowest():
    values = np.arange(1.0, 101.0)
    assert bootstrap.quantile(values, 0.9).value == pytest.approx(91)
    assert bootstrap.quantile(np.where(values > 95, np.inf, values), 0.5).value == pytest.approx(51)
    assert bootstrap.quantile(np.where(values > 50, np.inf, values), 0.9) is None
    assert bootstrap.quantile(np.empty(0), 0.5) is None
    assert bootstrap.mean(np.where(values > 95, np.inf, values)) is None


def test_a_resample_that_may_fail_has_no_interval():
    rng = np.random.default_rng(0)
    values = rng.exponential(1, 1000) + 1
    values[np.argsort(values)[-95:]] = np.inf  # p90 lies just below the failures
    assert bootstrap.quantile(values, 0.9).variance is None
    assert bootstrap.quantile(values, 0.5).variance is not None


def test_a_rate_counts_to_the_last_completion():
    done = np.array([3, 1, 2, 4]) * 10**9
    assert bootstrap.rate(done, np.array([10.0, 20.0, 30.0, 40.0])).value == pytest.approx(25)
    assert bootstrap.rate(np.empty(0, dtype=np.int64), np.empty(0)) is None


def test_dependent_values_have_a_wider_interval():
    rng = np.random.default_rng(1)
    steps = rng.normal(size=4000)
    series = np.empty(4000)
    series[0] = 0
    for i in range(1, 4000):
        series[i] = 0.9 * series[i - 1] + steps[i]
    values = np.exp(0.1 * series)
    shuffled = rng.permutation(values)
    assert bootstrap.mean(values).variance > 8 * bootstrap.mean(shuffled).variance  # truly 19 times


def test_pairing_takes_out_what_two_runs_share():
    rng = np.random.default_rng(2)
    common = rng.lognormal(0, 0.5, 2000)
    a, b = common * rng.lognormal(0, 0.02, 2000), 1.02 * common * rng.lognormal(0, 0.02, 2000)
    alone = compare.ratio([bootstrap.quantile(b, 0.5, 1)], [bootstrap.quantile(a, 0.5, 2)])
    paired = compare.ratio([bootstrap.quantile(b, 0.5, 1)], [bootstrap.quantile(a, 0.5, 2)],
                           bootstrap.paired_quantile(a, b, 0.5))  # fmt: skip
    assert not alone.separable and paired.separable
    assert paired.low < 1.02 < paired.high


def test_repeats_decide_and_a_lone_run_borrows():
    side = [Estimate(math.log(2) + d, 1e-9, 50) for d in (-0.01, 0.0, 0.01)]
    base = [Estimate(d, 1e-9, 50) for d in (-0.01, 0.0, 0.01)]
    both = compare.ratio(side, base)
    assert both.basis == compare.REPEATS and both.ratio == pytest.approx(2)
    # t with 4 degrees of freedom is 2.776; the standard error 0.01 sqrt(2 / 3)
    assert math.log(both.high / 2) == pytest.approx(compare.MARGIN * 2.7764 * 0.01 * math.sqrt(2 / 3), rel=1e-3)
    one = compare.ratio(side[:1], base)
    assert one.basis == compare.BORROWED and one.high > both.high
    single = compare.ratio(side[1:2], base[1:2])
    assert single.basis == compare.WITHIN and single.high < both.high
    unknown = compare.ratio([Estimate(0.0)], [Estimate(0.0)])
    assert unknown.low is None and not unknown.separable
    with pytest.raises(ValueError, match="at least one run"):
        compare.ratio([], base)


def test_a_lone_run_takes_the_scatter_of_the_most_unsteady_cell():
    """A steady backend's repeats say nothing about how much an unsteady one's second run would have differed."""
    steady = [Estimate(math.log(10) + d, 1e-9, 50) for d in (0.0, 0.001)]
    lone = [Estimate(0.0, 1e-9, 50)]
    unsteady = compare.mean([Estimate(d, 1e-9, 50) for d in (0.0, 0.2)])
    alone, beside = compare.ratio(steady, lone), compare.ratio(steady, lone, others=[unsteady])
    assert alone.low > 9.8 and beside.low < 2 and beside.basis == compare.BORROWED
    # the scatter between two runs that differ by 0.2 is 0.2^2 / 2, with one degree of freedom: t is 12.706
    assert math.log(beside.high / beside.ratio) == pytest.approx(compare.MARGIN * 12.706 * 0.2 / math.sqrt(2), rel=1e-3)


def test_borrowed_scatter_counts_once_and_a_larger_own_one_stays():
    cell = [Estimate(d, 1e-9, 50) for d in (0.0, 0.02)]
    found = compare.ratio([Estimate(0.5)], cell)
    # variance 0.02^2 / 2 for the lone run and half of it for the mean of two: one source with one degree of freedom
    assert found.df == pytest.approx(1) and math.log(found.high / found.ratio) == pytest.approx(
        compare.MARGIN * 12.706 * math.sqrt(0.0002 * 1.5), rel=1e-3
    )
    noisy = compare.lend([compare.mean([Estimate(0.5, 0.09, 30)]), compare.mean(cell)])[0]
    assert (noisy.variance, noisy.df, noisy.spread) == (0.09, 30, None)


def test_lent_scatter_covers():
    """Backends of unlike steadiness, one run of the unsteady one on the second GPU: the ratio of both GPUs is 1.5."""
    rng, inside = np.random.default_rng(4), 0
    for _ in range(2000):
        old = [Estimate(d) for d in rng.normal(0, 0.1, 3)]
        new = [Estimate(float(rng.normal(math.log(1.5), 0.1)), 1e-6, 40)]
        steady = compare.mean([Estimate(d) for d in rng.normal(2, 0.001, 3)])
        found = compare.ratio(new, old, others=[steady])
        inside += found.low <= 1.5 <= found.high
    assert 0.93 <= inside / 2000 <= 0.97


def test_not_separable_means_that_the_interval_spans_one():
    assert compare.between(0.05, 0.0004, 10, "x").separable
    assert not compare.between(0.04, 0.0004, 10, "x").separable
    assert not compare.between(-0.04, 0.0004, 10, "x").separable


def test_what_differs_is_named():
    found = compare.differing([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}], ("a", "b", "c"))
    assert found == {"b": ["2", "3", "unknown"]}


def test_decomposition_recovers_planted_gains():
    found = decompose(grid(), ("h0", "b0"))
    assert {h: r.ratio for h, r in found.hardware.items()} == pytest.approx(HARDWARE)
    assert {b: r.ratio for b, r in found.compiler.items()} == pytest.approx(COMPILER)
    assert {c: r.ratio for c, r in found.interaction.items()} == pytest.approx(
        {(h, b): BOTH.get((h, b), 1.0) for h in ("h1", "h2") for b in ("b1", "b2")}
    )
    assert found.by_generation["h2", "b2"].ratio == pytest.approx(2.6 * 1.3)
    for (h, b), whole in found.total.items():
        if h != "h0" and b != "b0":
            parts = found.hardware[h].ratio * found.compiler[b].ratio * found.interaction[h, b].ratio
            assert parts == pytest.approx(whole.ratio)


def test_holes_stay_holes_and_the_rest_is_recovered():
    holes = (("h0", "b2"), ("h1", "b1"))
    g = grid(holes)
    found = decompose(g, ("h0", "b0"))
    assert g.holes == list(holes)
    assert found.compiler["b2"] is None and found.total["h0", "b2"] is None and found.total["h1", "b1"] is None
    assert found.interaction["h2", "b2"] is None and found.interaction["h1", "b1"] is None
    assert found.interaction["h2", "b1"].ratio == pytest.approx(1)
    assert found.by_generation["h2", "b2"].ratio == pytest.approx(2.6 * 1.3)
    assert found.hardware["h2"].ratio == pytest.approx(2.4)


def test_without_interaction_the_measured_cells_give_every_gain():
    hardware, compiler = additive(grid((("h0", "b2"), ("h1", "b0"), ("h2", "b1")), both={}), ("h0", "b0"))
    assert hardware == pytest.approx(HARDWARE) and compiler == pytest.approx(COMPILER)
    apart = (("h0", "b2"), ("h1", "b0"), ("h1", "b1"), ("h2", "b0"), ("h2", "b1"))
    assert additive(grid(apart, both={}), ("h0", "b0")) is None  # h1 and h2 share no backend with h0


def test_a_baseline_outside_the_grid_is_refused():
    with pytest.raises(ValueError, match="not in the grid"):
        decompose(grid(), ("h9", "b0"))


def test_cost_and_break_even():
    assert cost.cost_per(1e6, 1000, 3.6) == pytest.approx(1.0)
    assert cost.cost_per(1e6, 1000, 3.6, gpus=2) == pytest.approx(2.0)
    assert cost.cost_per(1e6, 0, 3.6) is None and cost.cost_per(1e6, 10, None) is None
    assert cost.break_even(2.0, 100, 150) == pytest.approx(3.0)
    assert cost.joules_each(500, 1000) == 2 and cost.per_joule(500, 1000) == 0.5
    assert cost.per_joule(500, None) is None and cost.joules_each(0, 10) is None


def test_ab_runs_go_a_b_b_a_and_then_mirrored():
    assert "".join(order(n) for n in range(12)) == "ABBABAABABBA"


def test_ab_needs_two_blocks_and_gets_stricter_with_each_look():
    a, b = [0.0, 0.001, 0.0, -0.001, 0.001, 0.0], [0.1, 0.101, 0.099, 0.1, 0.1, 0.101]
    assert look(a[:2], b[:2]).gain.low is None
    second, third = look(a[:4], b[:4]), look(a, b)
    assert second.confidence == pytest.approx(0.975) and third.confidence == pytest.approx(1 - 0.05 / 6)
    assert third.decided and third.gain.ratio == pytest.approx(math.exp(0.1), rel=1e-2)


def test_a_drift_does_not_pose_as_a_difference():
    drift = 0.01 * np.arange(16)
    a, b = [], []
    for n in range(16):
        (a if order(n) == "A" else b).append(float(drift[n]))
    assert look(a, b).gain.ratio == pytest.approx(1, abs=1e-9)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_intervals_cover_at_the_claimed_rate():
    """300 comparisons have a standard error of 1.3 points: the bound is 95 minus two points and two of these."""
    c = coverage()
    for name, n, statistic in (("AR(1) 0.5", 1000, "p50"), ("AR(1) 0.9", 5000, "mean"), ("M/M/1 0.5", 1000, "mean")):
        share, given = c.singles(c.FAMILIES[name], n, statistic, 300)
        assert share > 0.905, (name, statistic, share)
        assert given > 0.8
    assert c.repeats((3, 3), (0.02, 0.02), 2000) > 0.94
    assert c.repeats((2, 2), (0.02, 0.02), 2000, 1.0) > 0.95
    assert c.false_differences(6, 400, 0.005) < 0.06
    assert all(share > 0.93 for share in c.grids(3, (("h0", "b2"),), 400).values())
