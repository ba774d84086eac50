"""What a report shows of power and of the server: two tables, what is not known, and a panel over the run's time.

Nothing is measured here: the figures are those of `run.json`, the panel is drawn from `telemetry.parquet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from loadgen.core.metrics import metrics_of
from loadgen.edge.report_data import MISSING, Row, Section, number, value_row
from loadgen.edge.store import Run
from loadgen.edge.telemetry_table import TABLE

POINTS = 1000  # of a curve; each is then the mean of its bin
COLOURS = 7
# key in latency_ms → label and meaning, in the order in which a request meets them
PARTS = {
    "client_wait": ("client wait", "due to sent: the load generator's own delay"),
    "network": ("network and HTTP", "the client's time less the server's own account of the same requests"),
    "server_queue": ("server queue", "in Triton, before the model took the request"),
    "server_compute": ("server compute", "input, inference and output in the model"),
    "server_first_response": ("server, to first response", "from arrival in Triton to the first response"),
    "engine_wait": ("runtime queue (estimate)", "in the served runtime: mean waiting / completed per second"),
    "engine_run": ("runtime batch (estimate)", "in the served runtime: mean running / completed per second"),
    "send_to_first": ("sent to first response", "as the client saw it; network, queue and prefill"),
    "first_to_done": ("first response to end", "as the client saw it; decoding"),
}
PANELS = (("power, W", "power_w", 1.0), ("SM clock, MHz", "sm_clock_hz", 1e-6), ("busy, %", "utilisation", 100.0))


def sections(runs: Sequence[Run]) -> list[Section]:
    """The tables, of what at least one run has."""
    out = []
    power = [m for m in metrics_of({r.scenario.family for r in runs}) if m.of_power]
    if any(r.summary.get("energy_joules") is not None for r in runs):
        of = {(r.document.get("telemetry") or {}).get("energy_of") for r in runs} - {None}
        title = f"Energy ({' / '.join('GPU' if o == 'gpu' else 'CPU package' for o in sorted(of))})"
        rows = [*(value_row(m, runs) for m in power), *_power_rows(runs)]
        out.append(Section(title, "over exactly the time from T0 to the last response", (), tuple(rows)))
    splits = [(r.document.get("server_statistics") or {}).get("latency_ms") or {} for r in runs]
    if any(splits):
        rows = [Row(label, help_, " ms", tuple((number(s.get(key)),) for s in splits))
                for key, (label, help_) in PARTS.items() if any(key in s for s in splits)]  # fmt: skip
        out.append(Section("Where the time went", "means over completed requests", (), tuple(rows)))
    return out


def _power_rows(runs: Sequence[Run]) -> list[Row]:
    seen = [r.document.get("telemetry") or {} for r in runs]

    def row(label: str, help_: str, unit: str, texts: list[str]) -> Row:
        return Row(label, help_, unit, tuple((t,) for t in texts))

    limited = [at_power_limit(r) for r in runs]
    held = row("held back by its power limit", "share of samples; of several GPUs the most held back", "",
               [MISSING if share is None else f"{share:.0%}" for share in limited])  # fmt: skip
    return [
        row("energy by counter", "the devices' own counters over the same time", " J",
            [number(t.get("counter_joules"), 4) for t in seen]),
        row("power samples", "a second; and the share of the time they cover", "",
            [f"{number(t.get('rate_hz'))} /s, {t['coverage']:.1%}" if t.get("rate_hz") else MISSING for t in seen]),
        row("energy may be quoted", "no gap, no throttling, samples and counter agree", "",
            [("yes" if t["power_valid"] else "NO") if "power_valid" in t else MISSING for t in seen]),
        *([held] if any(limited) else []),
    ]  # fmt: skip


def at_power_limit(run: Run) -> float | None:
    """Share of samples in which the driver lowered clocks for the power limit, of the GPU with the most; None where
    no GPU was sampled. That is how a GPU is meant to work, so it is no reason against its energy: but with a higher
    limit it would be faster."""
    devices = (run.document.get("telemetry") or {}).get("devices") or []
    return max((d.get("throttled", {}).get("sw_power_cap", 0.0) for d in devices if d["device"].startswith("gpu")),
               default=None)  # fmt: skip


def lines(run: Run) -> list[str]:
    """What this run does not know of power and server, a line each."""
    telemetry, server = run.document.get("telemetry") or {}, run.document.get("server_statistics") or {}
    out = []
    if telemetry and telemetry.get("energy_of") is None and telemetry.get("source") != "off":
        gpus = (run.document.get("hardware") or {}).get("gpus")
        out.append("power was not measured: " + ("; ".join(telemetry["missing"]) if gpus else telemetry["missing"][-1]))
    return out + [f"server: {text}" for text in server.get("unknown", [])]


def section(run: Run, index: int, name: str = "") -> str:
    """The panel's place in the page, and what is not known; `name` is HTML."""
    notes = "".join(f"<li>{escape(text)}</li>" for text in lines(run))
    notes = f'<ul class="soft">{notes}</ul>' if notes else ""
    if not has_panel(run):
        return notes
    return (f"<h2>{name}Power, clocks and use <small>s from T0, as in the plots over time; telemetry began before and "
            f'ended after them</small></h2><div class="plot time" id="power{index}"></div>{notes}')  # fmt: skip


def has_panel(run: Run) -> bool:
    """Was anything sampled that can be drawn?"""
    return (run.folder / TABLE).is_file()


def panel(run: Run, index: int, end_s: float) -> dict[str, Any]:
    """Power, clock and utilisation of every device over the run's time axis, as a Plotly figure."""
    columns = ["time_ns", "device", "power_w", "sm_clock_hz", "utilisation", "cpu_utilisation"]
    table = pq.read_table(run.folder / TABLE, columns=columns)
    device = np.asarray(table["device"].to_pylist())
    t = table["time_ns"].to_numpy() / 1e9
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "margin": {"l": 60, "r": 10, "t": 24, "b": 40}, "hovermode": "x", "showlegend": True,
        "legend": {"orientation": "h", "y": 1.08, "x": 0},
        "xaxis": {"range": [0, end_s], "anchor": "y3", "title": {"text": "s from T0"}},
    }  # fmt: skip
    for n, (title, column, scale) in enumerate(PANELS):
        axis, top = str(n + 1) if n else "", 1 - n * 0.345
        layout[f"yaxis{axis}"] = {"title": {"text": title}, "rangemode": "tozero",
                                  "domain": [round(top - 0.29, 3), round(top, 3)]}  # fmt: skip
        for d, name in enumerate(sorted(set(device))):
            own = "cpu_utilisation" if name == "host" and column == "utilisation" else column
            here = device == name
            x, y = _thin(t[here], table[own].to_numpy()[here] * scale)
            if len(x):
                data.append({
                    "type": "scatter", "mode": "lines", "x": x, "y": y, "xaxis": "x", "yaxis": f"y{axis}",
                    "name": "host CPU" if name == "host" else name, "legendgroup": name,
                    "showlegend": not any(o["legendgroup"] == name for o in data),
                    "line": {"color": f"--c{(index + d) % COLOURS}", "width": 1.5},
                })  # fmt: skip
    return {"data": data, "layout": layout}


def _thin(t: Any, values: Any) -> tuple[list[float], list[float]]:
    """At most POINTS points: means of equal parts. What is missing is left out."""
    there = np.isfinite(values)
    t, values = t[there], values[there]
    if len(t) > POINTS:
        edges = np.linspace(0, len(t), POINTS + 1).astype(np.int64)[:-1]
        counts = np.diff(np.append(edges, len(t)))
        t, values = np.add.reduceat(t, edges) / counts, np.add.reduceat(values, edges) / counts
    return [round(float(v), 4) for v in t], [round(float(v), 3) for v in values]
