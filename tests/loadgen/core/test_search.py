"""The search against servers whose capacity is known, and its promises under odd ones."""

import heapq
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from rows import make_rows

from loadgen.core import early_stopping, schedule
from loadgen.core.belief import quantiles
from loadgen.core.evidence import assess
from loadgen.core.metrics import summarise
from loadgen.core.rehearsal import remaining
from loadgen.core.scenario import Kind, Limits, Minimums, Scenario, Seeds
from loadgen.core.search import Done, Observation, Outcome, Plan, Probe, propose
from loadgen.core.sweep import digest, lines, order
from loadgen.core.verdict import Audit, judge

PLAN = Plan(start=4, least=0.01, most=10_000, full_s=20, probe_s=5, budget_s=3600)
SEEDS = range(20)


def search(server, plan=PLAN, history=()):
    """Runs a search to its end: the answer and its history. `server(probe, k)` → (outcome, cost_s, requests)."""
    made = list(history)
    while isinstance(step := propose(plan, made), Probe):
        assert len(made) < 200, "endless"
        outcome, cost_s, requests = server(step, len(made))
        made.append(Observation(step.rate, step.seconds, step.full, outcome, cost_s, "seen", requests))
    return step, made


class Queue:
    """c servers, first in first out, LoadGen's Poisson arrivals; judged by p99 of the wait and early stopping.

    `fresh` draws new service times in every run; otherwise request k takes equally long in each, so that a full-length
    run at one rate always ends alike and the capacity is exact.
    """

    def __init__(self, seed, servers=4, service_s=0.05, limit_s=0.2, fresh=False):
        self.seed, self.servers, self.limit_s, self.fresh = seed, servers, limit_s, fresh
        self.scale = service_s
        self.service = np.random.default_rng(seed).gamma(11, service_s / 11, 20_000)

    def run(self, rate, seconds, k=0):
        due = schedule.loadgen_server(rate, round(seconds * 1e9), 1, self.seed + 1) / 1e9
        service = self.service
        if self.fresh:
            service = np.random.default_rng([self.seed, k]).gamma(11, self.scale / 11, len(due))
        free, waits, last = [0.0] * self.servers, np.empty(len(due)), 0.0
        for i, (at, work) in enumerate(zip(due.tolist(), service[: len(due)].tolist(), strict=True)):
            start = max(at, free[0])
            heapq.heapreplace(free, start + work)
            waits[i], last = start - at, max(last, start + work)
        return np.sort(waits), last

    def valid(self, rate, seconds=PLAN.full_s, k=0):
        waits, _ = self.run(rate, seconds, k)
        late = int((waits > self.limit_s).sum())
        return waits[int(len(waits) * 0.99)] <= self.limit_s and early_stopping.passes(len(waits), late, 0.99)

    def __call__(self, probe, k):
        waits, last = self.run(probe.rate, probe.seconds, k)
        n, late = len(waits), int((waits > self.limit_s).sum())
        if probe.full:
            outcome = Outcome.PASS if self.valid(probe.rate, probe.seconds, k) else Outcome.FAIL
        elif late > 0.03 * n:
            outcome = Outcome.FAIL
        else:
            outcome = Outcome.PASS if waits[int(n * 0.99)] <= 0.8 * self.limit_s else Outcome.UNSURE
        return outcome, last + 2, n

    def capacity(self, near):
        """The highest rate whose full-length run is VALID, of rates 0.1 % apart up to 5 % above `near`."""
        return next(r for k in range(10_000) if self.valid(r := near * 1.05 * 0.999**k))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_answer_lies_within_3_percent_below_the_capacity(seed):
    queue = Queue(seed)
    done, history = search(queue)
    assert done.code == "found"
    assert queue.valid(done.rate)
    assert 0.97 <= done.rate / queue.capacity(done.rate) <= 1.0
    assert sum(o.cost_s for o in history) <= PLAN.budget_s


class Lucky:
    """A full-length run passes with probability Phi((ln C - ln r) / s); short probes are blurred more."""

    def __init__(self, seed, capacity, scatter, requests):
        self.random = random.Random(seed)
        self.capacity, self.scatter, self.requests = capacity, scatter, requests

    def __call__(self, probe, k):
        blur = self.scatter if probe.full else 0.05
        passed = math.log(probe.rate) + self.random.gauss(0, blur) <= math.log(self.capacity)
        return (Outcome.PASS if passed else Outcome.FAIL), probe.seconds * 1.1 + 1, self.requests


@pytest.mark.parametrize(("scatter", "requests"), [(0.002, 20_000), (0.005, 5_000), (0.01, 2_000)])
def test_luck_does_not_lift_the_answer_above_the_capacity(scatter, requests):
    ratios = []
    for seed in SEEDS:
        done, _ = search(Lucky(seed, 37.7 + seed, scatter, requests), replace(PLAN, budget_s=36_000))
        ratios.append(done.rate / (37.7 + seed))
    assert 0.97 <= min(ratios) <= max(ratios) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_noisy_service_times(seed):
    """The capacity is then the rate that passes half of the time, by Spearman and Kärber's estimate."""
    queue, plan = Queue(seed, servers=8, service_s=0.1, limit_s=1.0, fresh=True), replace(PLAN, full_s=60, probe_s=10)
    done, _ = search(queue, plan)
    rates = done.rate * np.arange(0.98, 1.045, 0.005)
    passed = [np.mean([queue.valid(r, 60, k=1000 + k) for k in range(15)]) for r in rates]
    capacity = rates[0] + 0.005 * done.rate * (sum(passed) - 0.5)
    assert 0.97 <= done.rate / capacity <= 1.0


def hard(capacity):
    """A server with one sharp boundary."""

    def server(probe, k):
        outcome = Outcome.PASS if probe.rate <= capacity else Outcome.FAIL
        return outcome, probe.seconds + 2, round(200 * probe.rate * probe.seconds)

    return server


@pytest.mark.parametrize("capacity", [0.013, 0.5, 3.99, 4.0, 4.01, 77, 5000])
def test_a_sharp_boundary_is_found_from_any_start(capacity):
    done, _ = search(hard(capacity))
    assert done.code == "found" and 0.97 * capacity <= done.rate <= capacity < done.failed


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 8, 9, 31, 64, 100, 1000])
def test_whole_numbers_are_found_exactly_or_within_3_percent(capacity):
    plan = Plan(start=8, least=1, most=4096, full_s=20, probe_s=5, budget_s=3600, whole=True)
    done, history = search(hard(capacity + 0.5), plan)
    assert done.code == "found" and 0.97 * capacity <= done.rate <= capacity
    assert all(o.rate == int(o.rate) for o in history)


def test_short_probes_that_flatter_do_not_mislead():
    """A queue that has no time to grow: 5 s probes pass up to 1.5 times of what a full-length run carries."""
    done, _ = search(lambda p, k: hard(40 if p.full else 60)(p, k))
    assert 0.97 * 40 <= done.rate <= 40


def test_nothing_passes():
    done, history = search(hard(0))
    assert (done.rate, done.code) == (None, "none") and "0.01" in done.reason
    assert len(history) < 20


def test_everything_passes_up_to_the_maximum():
    done, history = search(hard(math.inf), replace(PLAN, most=50))
    assert (done.rate, done.code) == (50, "maximum")
    assert history[-1].full and history[-1].rate == 50


def test_a_client_that_is_the_bottleneck_ends_the_search_after_one_repeat():
    def server(probe, k):
        return (Outcome.CLIENT if probe.rate > 20 else Outcome.PASS), probe.seconds + 2, 100

    done, history = search(server)
    assert done.code == "client" and done.rate == 16 and "twice at 32" in done.reason
    assert [o.rate for o in history if o.outcome is Outcome.CLIENT] == [32, 32]
    assert history[-1] == Observation(16, 20, True, Outcome.PASS, 22, "seen", 100)


def test_a_client_hiccup_is_repeated_and_forgotten():
    done, history = search(lambda p, k: (Outcome.CLIENT, 7, 0) if k == 3 else hard(40)(p, k))
    assert done == search(hard(40))[0]
    assert history[3].rate == history[4].rate


def test_what_no_rate_mends_stops_at_once():
    done, history = search(lambda p, k: (Outcome.BROKEN, 5, 0))
    assert (done.rate, done.code, len(history)) == (None, "broken", 1)


def test_an_invalid_confirmation_is_never_returned():
    """The first two confirmations fail, whatever the rate."""
    failed = []

    def server(probe, k):
        if probe.purpose == "confirm" and len(failed) < 2:
            failed.append(probe.rate)
            return Outcome.FAIL, 22, 5000
        return hard(40)(probe, k)

    done, history = search(server)
    assert len(failed) == 2 and done.rate < min(failed)
    assert {o.outcome for o in history if o.full and o.rate == done.rate} == {Outcome.PASS}


@pytest.mark.parametrize("seed", range(60))
def test_an_answer_never_has_an_invalid_run_even_on_a_coin(seed):
    coin = random.Random(seed)

    def server(probe, k):
        return coin.choice([Outcome.PASS, Outcome.FAIL, Outcome.UNSURE][: 2 if probe.full else 3]), probe.seconds, 300

    done, history = search(server, replace(PLAN, budget_s=1500))
    assert sum(o.cost_s for o in history) <= 1500
    if done.rate is not None:
        assert {o.outcome for o in history if o.full and o.rate == done.rate} == {Outcome.PASS}
        assert done.rate < min((o.rate for o in history if o.full and o.outcome is Outcome.FAIL), default=math.inf)


@pytest.mark.parametrize("budget_s", [30, 60, 100, 200, 400])
def test_the_budget_is_kept_and_the_best_confirmed_rate_is_returned(budget_s):
    done, history = search(hard(77), replace(PLAN, budget_s=budget_s))
    assert sum(o.cost_s for o in history) <= budget_s
    if done.rate is not None:
        assert any(o.full and o.rate == done.rate and o.outcome is Outcome.PASS for o in history)
    assert (
        done.code == "budget" if budget_s <= 100 else "found" if budget_s == 400 else done.code in ("found", "budget")
    )
    assert done.rate is not None or budget_s < 60


@pytest.mark.parametrize("budget_s", range(30, 90, 5))
def test_a_budget_too_small_to_narrow_down_still_confirms_what_short_probes_passed(budget_s):
    """A short run can't tell at 18 and passes at 9; full runs fail above 10 and take long, since their queue drains."""

    def server(probe, _):
        if not probe.full:
            return (Outcome.PASS if probe.rate <= 9 else Outcome.UNSURE), 5.0, 10
        return (Outcome.PASS, 7.0, 30) if probe.rate <= 10 else (Outcome.FAIL, 9.0, 30)

    plan = Plan(start=9, least=0.01, most=1e5, full_s=3, probe_s=1, budget_s=budget_s)
    done, made = search(server, plan)
    assert done.rate is not None and done.rate >= 8, (done, made)
    assert sum(o.cost_s for o in made) <= budget_s + 2  # a run that fails takes longer than one that passed


def test_a_resumed_search_makes_the_same_probes():
    whole = search(Queue(3))
    for cut in range(0, len(whole[1]), 3):
        read_back = [Observation.from_json(o.to_json()) for o in whole[1][:cut]]
        assert search(Queue(3), history=read_back) == whole


def test_a_larger_budget_goes_on_where_a_small_one_ended():
    _, history = search(hard(77), replace(PLAN, budget_s=120))
    done, longer = search(hard(77), replace(PLAN, budget_s=1000), history)
    assert done.code == "found" and longer[: len(history)] == history


def test_what_remains_is_between_the_ends_foretold():
    done, history = search(hard(77))
    assert isinstance(done, Done)
    inside = 0
    for cut in range(len(history)):
        low, high = remaining(PLAN, history[:cut])
        inside += low * 0.9 <= sum(o.cost_s for o in history[cut:]) <= high * 1.1
    assert inside >= 0.6 * len(history)


def test_contradictory_runs_widen_what_is_believed():
    sure = quantiles(((9.9, True), (10.1, False)) * 4, 5000, (0.05, 0.95))
    torn = quantiles(((9.9, True), (10.1, False)) * 2 + ((10.1, True), (9.9, False)) * 2, 5000, (0.05, 0.95))
    assert 9.8 < sure[0] < sure[1] < 10.2
    assert torn[1] - torn[0] > 1.5 * (sure[1] - sure[0])
    with pytest.raises(ValueError, match="boundary"):
        quantiles(((1.0, True),), 100, (0.5,))


MS = 1_000_000
SCENARIO = Scenario("server", Kind.SERVER, "smoke", "v6.1", "b", 0.99, Limits(ttft_ns=100 * MS, e2e_ns=300 * MS),
                    Minimums(), Minimums(), Seeds(1, 2, 3), target_qps=10.0)  # fmt: skip


def finding(ttfts_ms, full, goodput=None, outcome="ok", audit=None, **last):
    """What a run with these TTFTs, 100 ms apart, says; `last` changes its last row."""
    specs = [{"due": i * 100 * MS, "chunks": [i * 100 * MS + t * MS, i * 100 * MS + (t + 50) * MS], "tokens": [1, 1]}
             for i, t in enumerate(ttfts_ms)]  # fmt: skip
    specs[-1] |= {"outcome": outcome, **last}
    summary, rows = summarise([make_rows(specs)], SCENARIO)
    n = len(rows)
    verdict = judge(summary, rows, SCENARIO, audit or Audit((), 1, n, n, 1.0))
    codes = [r.code for r in verdict.reasons]
    return assess(summary, rows, codes, SCENARIO, full=full, goodput=goodput)[0]


def test_a_full_length_run_is_judged_by_its_verdict():
    assert finding([50] * 200, full=True) is Outcome.PASS
    assert finding([50] * 197 + [150] * 3, full=True) is Outcome.FAIL
    assert finding([50] * 200, full=True, outcome="error") is Outcome.FAIL
    assert finding([50] * 200, full=True, audit=Audit((), 1, 201, 200, 1.0)) is Outcome.CLIENT
    assert finding([50] * 200, full=True, usage=7) is Outcome.BROKEN


def test_a_growing_backlog_fails_even_inside_the_limits():
    assert finding([20 + t % 3 for t in range(400)], full=True) is Outcome.PASS
    rising = [{"due": i * MS, "chunks": [round(i * 1.2 * MS) + 5 * MS], "tokens": [1]} for i in range(450)]
    summary, rows = summarise([make_rows(rising)], SCENARIO)
    assert assess(summary, rows, [], SCENARIO, full=True)[0] is Outcome.FAIL


def test_a_short_probe_says_when_it_cannot_tell():
    assert finding([50] * 40, full=False) is Outcome.PASS
    assert finding([50] * 39 + [150], full=False) is Outcome.UNSURE  # 1 of 40 may be luck at 1 %
    assert finding([50] * 30 + [150] * 10, full=False) is Outcome.FAIL
    assert finding([50] * 20 + [95] * 20, full=False) is Outcome.UNSURE  # too near to the limit
    assert finding([50] * 40, full=False, outcome="error") is Outcome.FAIL


def test_goodput_counts_requests_inside_all_limits():
    assert finding([50] * 190 + [150] * 10, full=True, goodput=0.95) is Outcome.PASS
    assert finding([50] * 190 + [150] * 10, full=True) is Outcome.FAIL
    assert finding([50] * 189 + [150] * 11, full=True, goodput=0.95) is Outcome.FAIL
    assert finding([50] * 198 + [150] * 2, full=True, goodput=0.99) is Outcome.FAIL  # p99 itself is over: INVALID
    assert finding([50] * 20 + [150] * 20, full=False, goodput=0.95) is Outcome.FAIL


def test_a_sweep_shuffles_each_pass_and_keeps_every_point():
    points = order([1, 2, 4, 8], 3, seed=7)
    assert sorted((p.repeat, p.value) for p in points) == [(r, v) for r in (1, 2, 3) for v in (1, 2, 4, 8)]
    assert [p.repeat for p in points] == [1] * 4 + [2] * 4 + [3] * 4
    assert points == order([1, 2, 4, 8], 3, seed=7) != order([1, 2, 4, 8], 3, seed=8)
    assert [p.value for p in order([4, 1], 2, seed=None)] == [4, 1, 4, 1]


def test_lines_of_a_sweep_are_medians_and_never_hide_a_failure():
    summary, _ = summarise([make_rows([{"due": 0, "chunks": [20 * MS, 40 * MS], "tokens": [1, 1]}])], SCENARIO)
    figures = digest(summary)
    assert (figures["ttft_p50_ms"], figures["e2e_p99_ms"], figures["tpot_p50_ms"]) == (20, 40, 20)
    entries = [{"value": 2.0, "figures": figures | {"ttft_p99_ms": x}, "valid": x is not None, "run": str(x),
                "codes": [] if x else ["ttft_limit"]} for x in (10.0, None, 30.0)]  # fmt: skip
    (line,) = lines(entries)
    assert (line["ttft_p99_ms"], line["valid"], line["repeats"], line["codes"]) == (30.0, 2, 3, ["ttft_limit"])
    assert lines(entries[1:2] * 2 + entries[:1])[0]["ttft_p99_ms"] is None
