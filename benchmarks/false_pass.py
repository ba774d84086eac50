"""How often early stopping passes a run that it should not, plain and corrected; and what the correction costs.

    python benchmarks/false_pass.py            # all tables of docs/confidence.md, some 8 minutes of one core
    python benchmarks/false_pass.py --quick    # a tenth of the runs

Latencies come from queues in their stationary state. The limit is the true percentile, so that queries are late at
exactly the rate that must not pass: a test with 99 % confidence may pass 1 % of these runs. A rate measured on R runs
has a standard error of sqrt(rate (1 - rate) / R), 0.3 % for 1 % of 1000 runs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter
from scipy.special import ndtri

from loadgen.core import early_stopping
from loadgen.core.confidence import corrected_early_stopping, mean_interval, percentile_interval
from loadgen.core.dependence import Float
from loadgen.core.steady_state import steady_state

Rng = np.random.Generator
Source = Callable[[int, Rng], Float]  # n latencies in due order, from a stationary state
Case = tuple[str, Source, Callable[[float], float]]  # name, source, limit at a percentile


def lindley(first_wait: float, steps: Float) -> Float:
    """Waits W[k + 1] = max(0, W[k] + steps[k]) of a first-come-first-served queue, without a loop."""
    walk = np.concatenate([[first_wait], first_wait + np.cumsum(steps)])
    return walk - np.minimum(np.minimum.accumulate(walk), 0.0)


def mm1(rho: float) -> Case:
    """One server, Poisson arrivals, exponential service of mean 1: latency is exponential with rate 1 - rho."""

    def draw(n: int, rng: Rng) -> Float:
        service, gap = rng.exponential(1, n), rng.exponential(1 / rho, n)
        wait = rng.exponential(1 / (1 - rho)) if rng.random() < rho else 0.0
        return lindley(wait, service[:-1] - gap[1:]) + service

    return f"M/M/1 {rho}", draw, lambda p: -math.log(1 - p) / (1 - rho)


def mdc(rho: float, servers: int) -> Case:
    """Several servers, equal work: query k follows query k - servers, so that each server is a queue of its own."""

    def draw(n: int, rng: Rng) -> Float:
        warm = servers * math.ceil(20 / (1 - rho) ** 2)
        total = -(-(n + warm) // servers) * servers
        due = np.cumsum(rng.exponential(1 / (rho * servers), total)).reshape(-1, servers)
        waits = np.stack([lindley(0.0, 1 - np.diff(due[:, s])) for s in range(servers)], axis=1)
        return (waits.ravel() + 1)[total - n :]

    return (f"M/D/{servers} {rho}", draw, empirical(draw))


def batching(rho: float, most: int = 32) -> Case:
    """A batching server: takes all that wait, up to `most`, for a time of 1 + 0.05 a query. rho is of its capacity."""

    def draw(n: int, rng: Rng) -> Float:
        rate, warm = rho * most / (1 + 0.05 * most), 2000
        due = np.cumsum(rng.exponential(1 / rate, n + warm))
        latency, taken, free = np.empty(n + warm), 0, 0.0
        while taken < n + warm:
            start = max(free, due[taken])
            upto = min(int(np.searchsorted(due, start, "right")), taken + most)
            free = start + 1 + 0.05 * (upto - taken)
            latency[taken:upto] = free - due[taken:upto]
            taken = upto
        return latency[warm:]

    return f"batching {rho}", draw, empirical(draw)


def ar1(phi: float) -> Case:
    """Log-normal latencies whose logarithm is autoregressive."""

    def draw(n: int, rng: Rng) -> Float:
        noise = rng.standard_normal(n) * math.sqrt(1 - phi**2)
        noise[0] = rng.standard_normal()
        return np.exp(lfilter([1.0], [1.0, -phi], noise))

    return f"AR(1) {phi}", draw, lambda p: math.exp(ndtri(p))


def bursts(length: int, p: float = 0.99) -> Case:
    """Unrelated latencies, but for rare pauses that make `length` queries in a row late: the limit of the method."""

    def draw(n: int, rng: Rng) -> Float:
        begins = np.flatnonzero(rng.random(n + length) < -math.log(p) / length)
        late = np.zeros(n + 2 * length, dtype=bool)
        for begin in begins:
            late[begin : begin + length] = True
        return rng.random(n) + 10.0 * late[length : length + n]

    return f"pauses of {length}", draw, lambda _: 5.0


def empirical(draw: Source) -> Callable[[float], float]:
    """The percentile of a long run, where no formula gives it."""
    long: list[Float] = []

    def limit(p: float) -> float:
        if not long:
            rng = np.random.default_rng(99)
            long.append(np.concatenate([draw(500_000, rng) for _ in range(8)]))
        return float(np.quantile(long[0], p))

    return limit


INDEPENDENT: Case = ("independent", lambda n, rng: rng.exponential(1, n), lambda p: -math.log(1 - p))
CASES: tuple[Case, ...] = (
    INDEPENDENT, mm1(0.5), mm1(0.8), mm1(0.9), mm1(0.95), mdc(0.8, 4), mdc(0.95, 4), batching(0.6), batching(0.9),
    ar1(0.5), ar1(0.9), ar1(0.99),
)  # fmt: skip


def pass_rates(case: Case, n: int, p: float, limit_p: float, runs: int) -> tuple[float, float]:
    """Shares of runs that plain and corrected early stopping at `p` pass, with the limit at percentile `limit_p`."""
    _, draw, limit_at = case
    rng, limit, plain, corrected = np.random.default_rng(n), limit_at(limit_p), 0, 0
    for _ in range(runs):
        latencies = draw(n, rng)
        over = latencies > limit
        if early_stopping.passes(n, int(over.sum()), p):  # the corrected test never passes what the plain one doesn't
            plain += 1
            corrected += corrected_early_stopping(over, p, latencies=latencies).passes
    return plain / runs, corrected / runs


def print_false_passes(p: float, sizes: tuple[int, ...], cases: tuple[Case, ...], runs: int) -> None:
    print(f"\nFalse passes at p{p * 100:g} (nominal 1 %): plain -> corrected, % of runs\n")
    print("| latencies | " + " | ".join(f"n = {n} ({runs_at(n, runs)} runs)" for n in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    for case in cases:
        cells = [pass_rates(case, n, p, p, runs_at(n, runs)) for n in sizes]
        print(f"| {case[0]} | " + " | ".join(f"{100 * a:.1f} → {100 * b:.1f}" for a, b in cells) + " |", flush=True)


def runs_at(n: int, runs: int) -> int:
    return runs if n <= 5000 else max(runs * 2 // 5, 20)


def print_power(runs: int) -> None:
    print("\nPower at p99: % of runs passed whose true late share is below the 1 % limit: plain -> corrected\n")
    sizes = (500, 700, 1000, 2000, 5000, 24_576)
    print("| latencies, true late share | " + " | ".join(f"n = {n}" for n in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    rows = [(INDEPENDENT, 0.0), (INDEPENDENT, 0.001), (INDEPENDENT, 0.0025), (INDEPENDENT, 0.005)]
    for case, late in [*rows, (mm1(0.5), 0.001), (mm1(0.5), 0.0025), (batching(0.6), 0.0025), (mm1(0.8), 0.0001)]:
        limit_p = 1 - max(late, 1e-12)
        cells = [pass_rates(case, n, 0.99, limit_p, runs_at(n, runs)) for n in sizes]
        text = " | ".join(f"{100 * a:.0f} → {100 * b:.0f}" for a, b in cells)
        print(f"| {case[0]}, {late * 100:g} % | {text} |", flush=True)


def print_cost(runs: int) -> None:
    print("\nIndependent latencies at p99: queries with which 9 runs in 10 pass\n")
    print("| true late share | plain | corrected | ratio |\n|---|---|---|---|")
    for late in (0.0, 0.0025, 0.005):
        needed, size = [math.inf, math.inf], 459
        while math.isinf(needed[1]):
            rates = pass_rates(INDEPENDENT, size, 0.99, 1 - max(late, 1e-12), runs)
            needed = [min(old, size) if rate >= 0.9 else old for old, rate in zip(needed, rates, strict=True)]
            size = math.ceil(size * 1.08)
        print(f"| {late * 100:g} % | {needed[0]} | {needed[1]} | {needed[1] / needed[0]:.1f} |", flush=True)


def print_coverage(runs: int) -> None:
    print("\nCoverage of the 95 % intervals given, % (in brackets: % of runs where none, or no upper end, was given)\n")
    print("| latencies | n | p50 | p90 | p99 | mean |\n|---|---|---|---|---|---|")
    sizes = (1000, 5000, 24_576)
    for case in (INDEPENDENT, mm1(0.5), mm1(0.8), mm1(0.9), batching(0.9), ar1(0.9)):
        for n in sizes:
            print(f"| {case[0]} | {n} | " + " | ".join(coverage(case, n, runs_at(n, runs))) + " |", flush=True)


def coverage(case: Case, n: int, runs: int) -> list[str]:
    _, draw, limit_at = case
    levels = (0.5, 0.9, 0.99)
    truth = [limit_at(p) for p in levels]
    truth.append(float(draw(4_000_000, np.random.default_rng(98)).mean()))
    rng, held, open_ended = np.random.default_rng(n + 1), np.zeros(4), np.zeros(4)
    given = np.zeros(4)
    for _ in range(runs):
        latencies = draw(n, rng)
        pairs = [*(percentile_interval(latencies, p) for p in levels), mean_interval(latencies)]
        for i, pair in enumerate(pairs):
            given[i] += pair is not None
            held[i] += pair is not None and pair[0] <= truth[i] <= pair[1]
            open_ended[i] += pair is None or math.isinf(pair[1])
    shares = [f"{100 * h / g:.1f}" if g >= runs / 10 else "–" for h, g in zip(held, given, strict=True)]
    return [f"{share} ({100 * o / runs:.0f})" for share, o in zip(shares, open_ended, strict=True)]


def print_steady(runs: int) -> None:
    print("\nSteady state: % of runs called not steady (in brackets: % long enough to test)\n")
    print("| latencies | n | stationary | first 5 % x 3 | drift to x 2 |\n|---|---|---|---|---|")
    shapes: tuple[Callable[[Float], Float], ...] = (
        np.ones_like,
        lambda t: np.where(t < 0.05, 3.0, 1.0),
        lambda t: 1 + t,
    )
    for name, draw, _ in (INDEPENDENT, mm1(0.5), mm1(0.8), mm1(0.95), ar1(0.9), ar1(0.99)):
        for n in (1000, 5000, 24_576):
            cells = []
            for shape in shapes:
                rng, factor, alarms, tested = np.random.default_rng(n + 2), shape(np.arange(n) / n), 0, 0
                for _ in range(runs_at(n, runs)):
                    due = np.cumsum(rng.exponential(1e9, n)).astype(np.int64)
                    state = steady_state(due, draw(n, rng) * factor * 5e8)
                    alarms, tested = alarms + (not state.steady), tested + state.tested
                cells.append(f"{100 * alarms / runs_at(n, runs):.1f} ({100 * tested / runs_at(n, runs):.0f})")
            print(f"| {name} | {n} | " + " | ".join(cells) + " |", flush=True)


def print_overload(runs: int) -> None:
    print("\nBacklog: % of M/M/1 queues, empty at the start, that are called above capacity\n")
    print("| load | n = 500 | n = 2000 | n = 10000 |\n|---|---|---|---|")
    for rho in (0.8, 0.95, 0.99, 1.05, 1.1, 1.2):
        cells = []
        for n in (500, 2000, 10_000):
            rng, alarms = np.random.default_rng(n + 3), 0
            for _ in range(runs):
                service, gap = rng.exponential(1e9, n), rng.exponential(1e9 / rho, n)
                latencies = lindley(0.0, service[:-1] - gap[1:]) + service
                alarms += "capacity" in steady_state(np.cumsum(gap).astype(np.int64), latencies).explanation
            cells.append(f"{100 * alarms / runs:.1f}")
        print(f"| {rho} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs")
    runs = 100 if parser.parse_args().quick else 1000
    start = time.perf_counter()
    print_false_passes(0.99, (1000, 5000, 24_576), CASES, runs)
    print_false_passes(0.90, (100, 1000, 5000), CASES, runs)
    print_false_passes(0.99, (1000, 5000, 24_576), (bursts(10), bursts(30), bursts(100)), runs)
    print_power(runs // 5)
    print_cost(runs // 5)
    print_coverage(runs // 2)
    print_steady(runs // 5)
    print_overload(runs // 5)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
