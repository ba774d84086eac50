"""How often the intervals of `tritonmark compare` cover the true ratio, and how often it says "not separable" at 1.

python benchmarks/compare_coverage.py                      1000 comparisons a line; some 10 minutes on 2 cores
python benchmarks/compare_coverage.py --comparisons 200    quicker, coarser

Latencies are drawn, nobody is served. Single runs are compared by blocks of requests, repeats by their scatter, grids
by `decompose`. Prints the tables of docs/compare.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.signal import lfilter

from loadgen.core import bootstrap
from loadgen.core.bootstrap import Estimate
from loadgen.core.compare import mean, ratio
from loadgen.core.decompose import Grid, decompose
from loadgen.core.dependence import Float
from loadgen.core.interleave import look

TRUE = 1.1
Draw = Callable[[np.random.Generator, int], Float]
STATISTICS: dict[str, Callable[[Float, int], Estimate | None]] = {
    "mean": bootstrap.mean,
    "p50": lambda x, seed: bootstrap.quantile(x, 0.5, seed),
    "p90": lambda x, seed: bootstrap.quantile(x, 0.9, seed),
    "p99": lambda x, seed: bootstrap.quantile(x, 0.99, seed),
}


def autoregressive(phi: float) -> Draw:
    """Log-normal latencies whose logarithm is AR(1), with a standard deviation of 0.3."""

    def draw(rng: np.random.Generator, n: int) -> Float:
        noise = rng.normal(size=n + 300) * math.sqrt(1 - phi * phi)
        return np.exp(0.3 * lfilter([1], [1, -phi], noise)[300:] + 5)

    return draw


def queue(load: float) -> Draw:
    """Time in an M/M/1 system, started long before."""

    def draw(rng: np.random.Generator, n: int) -> Float:
        total = n + 5000
        service = rng.exponential(1, total)
        steps = np.concatenate([[0], np.cumsum(service[:-1] - rng.exponential(1 / load, total - 1))])
        return (steps - np.minimum.accumulate(steps) + service)[5000:]

    return draw


FAMILIES: dict[str, Draw] = {
    "independent": autoregressive(0), "AR(1) 0.5": autoregressive(0.5), "AR(1) 0.9": autoregressive(0.9),
    "M/M/1 0.5": queue(0.5), "M/M/1 0.8": queue(0.8),
}  # fmt: skip


def singles(draw: Draw, n: int, statistic: str, comparisons: int, true: float = TRUE) -> tuple[float, float]:
    """Share of intervals that hold `true` between two single runs, and share of comparisons that got an interval."""
    hits = given = 0
    for k in range(comparisons):
        rng = np.random.default_rng(k)
        a, b = draw(rng, n), draw(rng, n) * true
        x, y = STATISTICS[statistic](a, 1), STATISTICS[statistic](b, 2)
        assert x and y
        found = ratio([y], [x])
        if found.low is not None and found.high is not None:
            given += 1
            hits += found.low <= true <= found.high
    return hits / max(given, 1), given / comparisons


def paired(draw: Draw, n: int, comparisons: int) -> tuple[float, float, float]:
    """Two runs that share most of what makes them slow: coverage of the paired interval, share given, and its width
    as a share of the unpaired one."""
    hits = given = 0
    widths = []
    for k in range(comparisons):
        rng = np.random.default_rng(k)
        common = draw(rng, n)
        a, b = common * np.exp(0.05 * rng.normal(size=n)), TRUE * common * np.exp(0.05 * rng.normal(size=n))
        together = bootstrap.paired_quantile(a, b, 0.5)
        x, y = bootstrap.quantile(a, 0.5, 1), bootstrap.quantile(b, 0.5, 2)
        assert together and x and y
        found, apart = ratio([y], [x], together), ratio([y], [x])
        if found.low is None or found.high is None or apart.low is None or apart.high is None:
            continue
        given += 1
        hits += found.low <= TRUE <= found.high
        widths.append(math.log(found.high / found.low) / math.log(apart.high / apart.low))
    return hits / max(given, 1), given / comparisons, float(np.median(widths)) if widths else math.nan


def repeats(counts: tuple[int, int], spreads: tuple[float, float], comparisons: int, true: float = TRUE) -> float:
    """Coverage where runs scatter by `spreads` (of the logarithm), which is far more than requests inside a run do."""
    hits = 0
    for k in range(comparisons):
        rng = np.random.default_rng(k)
        a = [Estimate(x) for x in rng.normal(0, spreads[0], counts[0])]
        b = [Estimate(x) for x in rng.normal(math.log(true), spreads[1], counts[1])]
        found = ratio(b, a)
        hits += found.low is not None and found.high is not None and found.low <= true <= found.high
    return hits / comparisons


def grids(number: int, holes: Sequence[tuple[str, str]], comparisons: int) -> dict[str, float]:
    """Coverage of each kind of gain on a 3 × 3 grid with `number` repeats; cells in `holes` are missing."""
    hardware, backends = ("h0", "h1", "h2"), ("b0", "b1", "b2")
    gain_h, gain_b = dict(zip(hardware, (1, 1.7, 2.4), strict=True)), dict(zip(backends, (1, 1.5, 2.6), strict=True))
    both = {("h2", "b2"): 1.3, ("h1", "b2"): 1.1}
    tally: dict[str, list[bool]] = {"hardware": [], "compiler": [], "both together": [], "whole": []}
    for k in range(comparisons):
        rng = np.random.default_rng(k)
        cells = {(h, b): mean([Estimate(math.log(gain_h[h] * gain_b[b] * both.get((h, b), 1)) + 0.02 * rng.normal())
                               for _ in range(number)])
                 for h in hardware for b in backends if (h, b) not in holes}  # fmt: skip
        found = decompose(Grid(hardware, backends, cells), ("h0", "b0"))
        for name, gains, true in (
            ("hardware", found.hardware, gain_h), ("compiler", found.compiler, gain_b),
            ("both together", found.interaction, {c: both.get(c, 1.0) for c in found.interaction}),
            ("whole", found.total, {(h, b): gain_h[h] * gain_b[b] * both.get((h, b), 1) for h, b in found.total}),
        ):  # fmt: skip
            tally[name] += [g.low <= true[c] <= g.high for c, g in gains.items()
                            if g and g.low is not None and g.high is not None and g.low != g.high]  # fmt: skip
    return {name: float(np.mean(values)) for name, values in tally.items()}


def false_differences(blocks: int, comparisons: int, drift: float) -> float:
    """Share of A/B experiments between equals that are ever told apart in up to `blocks` looks, with a linear drift."""
    wrong = 0
    for k in range(comparisons):
        rng = np.random.default_rng(k)
        a: list[float] = []
        b: list[float] = []
        for n in range(blocks):
            at = drift * np.arange(4 * n, 4 * n + 4) + 0.02 * rng.normal(size=4)
            outer, inner = at[[0, 3]].tolist(), at[[1, 2]].tolist()
            a += outer if n % 2 == 0 else inner
            b += inner if n % 2 == 0 else outer
            if look(a, b).decided:
                wrong += 1
                break
    return wrong / comparisons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=1000)
    r = parser.parse_args().comparisons
    print(f"Two single runs, true ratio {TRUE}: % covered (% that got an interval), {r} comparisons a cell\n")
    print("| latencies | n | " + " | ".join(STATISTICS) + " |\n|---|---|" + "---|" * len(STATISTICS))
    for name, draw in FAMILIES.items():
        for n in (300, 1000, 5000):
            found = [singles(draw, n, s, r) for s in STATISTICS]
            cells = [f"{100 * c:.1f} ({100 * g:.0f})" if g else "– (0)" for c, g in found]
            print(f"| {name} | {n} | " + " | ".join(cells) + " |", flush=True)
    print("\nTrue ratio 1, p50 and mean: % called not separable\n\n| latencies | n | p50 | mean |\n|---|---|---|---|")
    for name, n in (("independent", 1000), ("AR(1) 0.5", 1000), ("AR(1) 0.9", 5000), ("M/M/1 0.5", 5000)):
        print(f"| {name} | {n} | " + " | ".join(f"{100 * singles(FAMILIES[name], n, s, r, 1.0)[0]:.1f}"
                                                for s in ("p50", "mean")) + " |", flush=True)  # fmt: skip
    print("\nPaired by slot, p50\n\n| latencies | n | % covered (% given) | width, unpaired = 1 |\n|---|---|---|---|")
    for name, n in (("independent", 1000), ("AR(1) 0.9", 5000), ("M/M/1 0.8", 5000)):
        c, g, w = paired(FAMILIES[name], n, r)
        print(f"| {name} | {n} | {100 * c:.1f} ({100 * g:.0f}) | {w:.2f} |", flush=True)
    print("\nRepeats\n\n| runs | scatter | % covered | % not separable at 1 |\n|---|---|---|---|")
    for counts, spreads in (((2, 2), (0.02, 0.02)), ((3, 3), (0.02, 0.02)), ((5, 5), (0.02, 0.02)),
                            ((3, 3), (0.01, 0.04)), ((1, 3), (0.02, 0.02)), ((2, 2), (0.005, 0.05))):  # fmt: skip
        c, one = repeats(counts, spreads, 10 * r), repeats(counts, spreads, 10 * r, 1.0)
        runs, scatter = f"{counts[0]} and {counts[1]}", f"{spreads[0]:.1%} and {spreads[1]:.1%}"
        print(f"| {runs} | {scatter} | {100 * c:.1f} | {100 * one:.1f} |")
    print("\nA 3 × 3 grid, scatter 2 %\n\n| repeats | holes | hardware | compiler | both | whole |")
    print("|---|---|---|---|---|---|")
    for number, holes in ((2, ()), (3, ()), (3, (("h0", "b2"),)), (3, (("h1", "b1"), ("h2", "b0")))):
        shares = grids(number, holes, r)
        print(f"| {number} | {len(holes)} | " + " | ".join(f"{100 * v:.1f}" for v in shares.values()) + " |")
    print("\nA/B between equals: % ever told apart\n\n| looks | no drift | 0.5 % a run |\n|---|---|---|")
    for blocks in (2, 6, 12):
        wrong = [false_differences(blocks, r, d) for d in (0.0, 0.005)]
        print(f"| {blocks} | {100 * wrong[0]:.1f} | {100 * wrong[1]:.1f} |")


if __name__ == "__main__":
    main()
