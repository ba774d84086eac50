"""What stands beside a summary: intervals of its figures, and whether the run was steady."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from loadgen.core.confidence import percentile_interval, rate_interval
from loadgen.core.dependence import Float
from loadgen.core.record import Bool, Int64, Rows
from loadgen.core.steady_state import SteadyState, steady_state

PERCENTS = (50, 90, 99)


def beside(rows: Rows, latencies: Mapping[str, Float], window_ns: int, ordered: bool) -> dict[str, Any]:
    """`intervals` and `steady_state` of measured `rows`, in any order, with `latencies` from `latency_columns`.

    `window_ns` is the honest window of throughput; see `intervals` for `ordered`. The steady state is that of E2E.
    """
    order: Any = np.lexsort((rows.seq, rows.due_ns))
    if np.array_equal(order, np.arange(len(rows))):
        order = slice(None)  # views instead of copies
    due, done, ok = rows.due_ns[order], rows.done_ns[order], rows.ok[order]
    tokens = np.where(ok, rows.tokens_out[order], 0)
    columns = {name: values[order] for name, values in latencies.items()}
    state = steady_state(due, columns["e2e_ns"])
    figures = steady_figures(state, due, columns, np.where(ok, done, 0), tokens)
    return {
        "intervals": intervals(columns, rows.first_ns[order], done, tokens, ok, window_ns, ordered),
        "steady_state": state.to_json() | {"summary": figures},
    }


def intervals(
    latencies: Mapping[str, Float],
    first_ns: Int64,
    done_ns: Int64,
    tokens: Int64,
    ok: Bool,
    window_ns: int,
    ordered: bool,
) -> dict[str, Any]:
    """95 % intervals of a summary: p50, p90 and p99 of each latency (ns), and QPS and tokens a second.

    Arrays have a row each, in due order; `latencies` are +inf for a failure and NaN where a row has none. An interval
    is [low, high], high None where nothing bounds it, or None where the run is too short. `ordered` is False where
    all was due at once (Offline), so that no order of due times tells how latencies depend: their intervals are None.
    """
    out: dict[str, Any] = {}
    for name, values in latencies.items():
        present = values[~np.isnan(values)]
        found = {f"p{p}": percentile_interval(present, p / 100) if ordered else None for p in PERCENTS}
        out[name] = {
            key: pair and [round(x) if math.isfinite(x) else None for x in pair] for key, pair in found.items()
        }
    for name, amounts in (("qps", np.broadcast_to(1.0, len(ok))), ("tokens_per_s", tokens.astype(np.float64))):
        rate = rate_interval(first_ns[ok], done_ns[ok], amounts[ok], window_ns)
        out[name] = None if rate is None else list(rate)
    return out


def steady_figures(
    state: SteadyState, due_ns: Int64, latencies: Mapping[str, Float], done_ns: Int64, tokens: Int64
) -> dict[str, Any]:
    """The figures of the rows after the warm-up: how many, p50 and p99 (ns) of each latency, and tokens a second.

    Arrays have a row each, in due order. `latencies` are +inf for a failure and NaN where a row has none; percentiles
    are LoadGen's, None among failures. `tokens` is 0 for failed rows; they count from the cut to the last response.
    """
    start = state.truncation_ns if state.truncation_ns is not None else 0
    kept = slice(state.excluded, None)
    out: dict[str, Any] = {"requests": len(due_ns[kept])}
    for name, values in latencies.items():
        ascending = np.sort(values[kept][~np.isnan(values[kept])])
        at = {f"p{p}": float(ascending[len(ascending) * p // 100]) for p in (50, 99) if len(ascending)}
        out[name] = {key: int(value) if math.isfinite(value) else None for key, value in at.items()}
    window_ns = int(done_ns[kept].max(initial=start)) - start
    out["tokens_per_s"] = int(tokens[kept].sum()) / (window_ns / 1e9) if window_ns > 0 else None
    return out
