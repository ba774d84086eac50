"""What one run says about its rate: it passes, it fails, it can't tell, or it says nothing about the server.

A full-length run is judged by its verdict, and by one thing more: while it ran the backlog must not have grown, since a
rate above the server's throughput is no capacity even where the run ends before its limits are broken. A short probe is
too short for the verdict's minimums, so it is judged by how many of its requests were late, as a proportion:

    fails    so many late ones would be under 5 % likely at the share that is allowed; or any request failed
    passes   so few would be; or the percentile lies well inside its limit (80 %)
    unsure   otherwise

A queue makes neighbours alike, so counts are divided by the inflation of the variance (`core.dependence`) first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from scipy.stats import binom

from loadgen.core import early_stopping
from loadgen.core.dependence import latency_inflation
from loadgen.core.metrics import Summary, latency_columns, within_limits
from loadgen.core.record import Bool, Int64, Rows
from loadgen.core.scenario import Limits, Scenario
from loadgen.core.search import Outcome
from loadgen.core.verdict import limited

DOUBT = 0.05
WELL_INSIDE = 0.8  # of a limit; a percentile of a short probe that close to it may well lie beyond it
BACKLOG = 0.01  # p-value at which a backlog grows, as in core.steady_state
# No other rate would mend these.
BROKEN = {"tokens_uncounted", "token_mismatch", "output_length", "no_requests", "frames_differ", "steps_differ"}
CRITERION = {"ttft_limit", "tpot_limit", "e2e_limit", "early_stopping"}  # what a goodput below the percentile replaces
SHORTNESS = {"min_duration", "min_queries", "early_stopping"}  # what every short probe lacks
Finding = tuple[Outcome, str]


def assess(
    summary: Summary, rows: Rows, codes: Iterable[str], scenario: Scenario, *, full: bool, goodput: float | None = None
) -> Finding:
    """What a run with these measured rows and reason codes says, and why.

    `goodput` is the share of requests that must meet all limits jointly; None asks for the verdict alone.
    """
    found = sorted(set(codes))
    client = [c for c in found if c.startswith("client_") or c in ("missing_rows", "cut_off")]
    if client:
        return Outcome.CLIENT, ", ".join(client)
    if broken := [c for c in found if c in BROKEN]:
        return Outcome.BROKEN, ", ".join(broken)
    over = [c for c in found if c not in SHORTNESS and not c.endswith("_limit")]
    if over:
        return Outcome.FAIL, ", ".join(over)
    finding = _whole(rows, found, scenario, goodput) if full else _short(rows, scenario, goodput)
    growth = summary["steady_state"].get("backlog_p")
    if finding[0] is not Outcome.FAIL and growth is not None and growth < BACKLOG:
        return Outcome.FAIL, "the backlog grew throughout: above the server's throughput"
    return finding


def _whole(rows: Rows, codes: list[str], scenario: Scenario, goodput: float | None) -> Finding:
    """The verdict; for a goodput, the share of good requests, and the verdict as far as it asks no less than that."""
    if goodput is not None and goodput < scenario.percentile:
        codes = [c for c in codes if c not in CRITERION]
    if codes:
        return Outcome.FAIL, ", ".join(codes)
    if goodput is not None:
        good = int(within_limits(rows, scenario.limits).sum())
        if good < goodput * len(rows):
            return Outcome.FAIL, f"goodput {good / len(rows):.2%}, below {goodput:.2%}"
        if scenario.minimums.early_stopping and not early_stopping.passes(len(rows), len(rows) - good, goodput):
            return Outcome.FAIL, f"goodput {good / len(rows):.2%}: too few requests to be sure of {goodput:.2%}"
    return Outcome.PASS, "VALID"


def _short(rows: Rows, scenario: Scenario, goodput: float | None) -> Finding:
    """The worst of the limits, each by itself; for a goodput, all of them jointly."""
    order = np.lexsort((rows.seq, rows.due_ns))
    limits = limited(scenario.limits)
    share = 1 - (scenario.percentile if goodput is None else goodput)
    inside = {m: _quantile_ratio(rows, m, limit, 1 - share) for m, limit in limits}
    if goodput is not None:
        late = ~within_limits(rows, scenario.limits)[order]
        return _proportion("joint", late, _inflation(rows, order, late), share, max(inside.values()))
    findings = []
    for metric, limit in limits:
        late = ~within_limits(rows, Limits(**{metric: limit}))[order]
        findings.append(_proportion(metric[:-3].upper(), late, _inflation(rows, order, late), share, inside[metric]))
    worst = {Outcome.FAIL: 0, Outcome.UNSURE: 1, Outcome.PASS: 2}
    return min(findings, key=lambda f: worst[f[0]])


def _proportion(name: str, late: Bool, inflation: float, share: float, ratio: float) -> Finding:
    """Whether `late` requests are more than `share` of all. `ratio`: the percentile over its limit."""
    n, t = len(late), int(late.sum())
    text = f"{name}: {t} of {n} over the limit, percentile at {ratio:.0%} of it"
    trials, hits = max(1, round(n / inflation)), t / inflation
    if t and float(binom.sf(math.ceil(hits) - 1, trials, share)) < DOUBT:
        return Outcome.FAIL, text
    if ratio <= WELL_INSIDE or float(binom.cdf(math.ceil(hits), trials, share)) < DOUBT:
        return Outcome.PASS, text
    return Outcome.UNSURE, text


def _inflation(rows: Rows, order: Int64, late: Bool) -> float:
    latency = np.nan_to_num(latency_columns(rows)["e2e_ns"][order], nan=np.inf, posinf=np.inf)
    return latency_inflation(latency, late) if len(latency) > 3 else 1.0


def _quantile_ratio(rows: Rows, metric: str, limit: int, quantile: float) -> float:
    values = latency_columns(rows)[metric]
    present = np.sort(values[~np.isnan(values)])
    return float(present[int(len(present) * quantile)]) / limit if len(present) else 0.0
