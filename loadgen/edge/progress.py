"""The live display of a run, drawn by the parent process from the JSON lines that the load process writes.

In a terminal one block is redrawn; in a pipe a plain line appears every few seconds. Lines that are no JSON, and keys
that are missing or unknown, are passed over: a display must never end a measurement.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 5.0


def watch(lines: Iterable[str], console: Console) -> None:
    """Shows progress until `lines` end."""
    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            for state in _states(lines, console):
                live.update(_draw(state), refresh=True)
    else:
        last = 0.0
        for state in _states(lines, console):
            if time.monotonic() - last >= PLAIN_EVERY_S:
                console.print(plain(state), highlight=False, markup=False, soft_wrap=True)
                last = time.monotonic()


def _states(lines: Iterable[str], console: Console) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            state = json.loads(line)
        except ValueError:
            continue
        if isinstance(state, dict) and state.get("metrics"):
            text = f"metrics for Prometheus on {state['metrics']}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        if isinstance(state, dict) and isinstance(state.get("elapsed_s"), int | float):
            yield state


def plain(state: dict[str, Any]) -> str:
    """One line: phase, time, counts, rate, current percentiles."""
    parts = [
        f"{state.get('phase', '?')} {_time(state)}",
        _counts(state),
        _rate(state),
    ]
    parts += [f"{name} p50 {p50} p99 {p99} ms" for name, p50, p99 in _latencies(state)]
    return "  ".join(parts)


def _draw(state: dict[str, Any]) -> RenderableType:
    total, elapsed = state.get("total_s"), state["elapsed_s"]
    bar = ProgressBar(total=total or 1, completed=min(elapsed, total or 0), width=40)
    head = Table.grid(padding=(0, 2))
    head.add_row(Text(str(state.get("phase", "?")), style="bold"), bar, _time(state))
    body = Table.grid(padding=(0, 2))
    body.add_row(_counts(state), _rate(state))
    body.add_row(*(f"{name} p50 {p50}  p99 {p99} ms" for name, p50, p99 in _latencies(state)))
    return Group(head, body)


def _time(state: dict[str, Any]) -> str:
    total, elapsed = state.get("total_s"), state["elapsed_s"]
    if state.get("phase") == "measure" and isinstance(total, int | float) and total > elapsed:
        return f"{elapsed:.0f} s, {total - elapsed:.0f} s left"
    return f"{elapsed:.0f} s"


def _counts(state: dict[str, Any]) -> str:
    text = f"sent {state.get('sent', 0)}, done {state.get('done', 0)}, in flight {state.get('in_flight', 0)}"
    return text + (f", FAILED {state['failed']}" if state.get("failed") else "")


def _rate(state: dict[str, Any]) -> str:
    unit = "frames" if "frames_per_s" in state else "tokens"
    return f"{_number(state.get(f'{unit}_per_s'))} {unit}/s"


def _latencies(state: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    first = (("step_ms", "step"),) if "frames_per_s" in state else (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"))
    for key, name in (*first, ("e2e_ms", "E2E")):
        values = state.get(key)
        values = values if isinstance(values, dict) else {}
        yield name, _number(values.get("p50")), _number(values.get("p99"))


def _number(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) and abs(value) >= 100 else (
        f"{value:.1f}" if isinstance(value, int | float) else "–"
    )  # fmt: skip
