"""Honest remarks beside a verdict: they don't make a run INVALID under LoadGen's rules, but they are printed.

Codes: `confidence_autocorrelated` (LoadGen's early stopping passed, and would not have, had it allowed for queueing),
`not_steady` (warm-up, drift or a growing backlog), `window_differs` (LoadGen's throughput flatters by over 2 %).
"""

from __future__ import annotations

import numpy as np

from loadgen.core.confidence import CorrectedStop, corrected_early_stopping
from loadgen.core.early_stopping import passes
from loadgen.core.metrics import Summary, latency_columns, within_limits
from loadgen.core.reason import Reason
from loadgen.core.record import Rows
from loadgen.core.scenario import Kind, Limits, Scenario

WINDOW_LIMIT = 1.02  # LoadGen's throughput over that to the last response


def cautions(summary: Summary, rows: Rows, scenario: Scenario, limited: list[tuple[str, int]]) -> list[Reason]:
    """The remarks on measured `rows` and their `summary`; `limited` are metric names and limits (ns) in force."""
    if not len(rows):
        return []
    found = [*_steadiness(summary), *_window(summary)]
    if scenario.kind is Kind.SERVER:
        found = [*_confidence(rows, scenario.percentile, limited), *found]
    return found


def _confidence(rows: Rows, percentile: float, limited: list[tuple[str, int]]) -> list[Reason]:
    """One remark, on the limit that would need the longest run."""
    order = np.lexsort((rows.seq, rows.due_ns))
    latencies = latency_columns(rows)
    unproven: list[tuple[str, CorrectedStop]] = []
    for metric, limit in limited:
        over = ~within_limits(rows, Limits(**{metric: limit}))[order]
        if passes(len(over), int(over.sum()), percentile):
            values = np.nan_to_num(latencies[metric][order], nan=0.0, posinf=np.inf)  # one-token answers have no TPOT
            stop = corrected_early_stopping(over, percentile, latencies=values)
            unproven += [] if stop.passes else [(metric, stop)]
    if not unproven:
        return []
    metric, stop = max(unproven, key=lambda pair: pair[1].needed or 0)
    seconds = (stop.needed or 0) * (int(rows.due_ns.max()) - int(rows.due_ns.min())) / 1e9 / max(len(rows) - 1, 1)
    advice = f"run about {stop.needed} queries ({seconds:.0f} s at this rate), or lower the rate"
    seen = f"{metric.removesuffix('_ns').upper()}: {stop.explanation}"
    limit_text = (
        "99% confidence that also holds for queueing latencies; LoadGen's early stopping takes them as unrelated"
    )
    return [Reason("confidence_autocorrelated", seen, limit_text, advice)]


def _steadiness(summary: Summary) -> list[Reason]:
    state = summary.get("steady_state")
    if not state or state["steady"]:
        return []
    advice = "figures without the warm-up stand beside the headline; warm up or run longer, or lower a rate too high"
    return [Reason("not_steady", state["explanation"], "no warm-up, drift or growing backlog", advice)]


def _window(summary: Summary) -> list[Reason]:
    name = "tokens_per_s" if summary.get("tokens_out") else "qps"
    honest, flattered = summary[name], summary[f"loadgen_{name}"]
    if not honest or not flattered or flattered <= WINDOW_LIMIT * honest:
        return []
    seen = f"{flattered:.4g} {name} by LoadGen's window, {honest:.4g} to the last response"
    advice = "quote the figure to the last response; a longer run makes the tail that LoadGen leaves out matter less"
    return [Reason("window_differs", seen, f"at most {WINDOW_LIMIT - 1:.0%} apart", advice)]
