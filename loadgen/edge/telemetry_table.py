"""`telemetry.jsonl`, as it was written while the test ran → `telemetry.parquet`, `server.parquet` and the figures.

The stream holds all that is needed, T0 included, so that a run whose load generator died is sealed the same way.
Lines are those of `telemetry_sampler`, and four of the load process's own: {"settings"}, {"t0"} (T0 on the monotonic
clock), {"before"} and {"after"} (the server's statistics).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loadgen.core.energy import Samples, measure, total
from loadgen.core.metrics import Context, Summary, power_figures
from loadgen.core.reason import Reason
from loadgen.core.record import Rows
from loadgen.core.scenario import Scenario
from loadgen.edge import server_stats

STREAM, TABLE, SERVER_TABLE = "telemetry.jsonl", "telemetry.parquet", "server.parquet"
NUMBERS = ("power_w", "energy_j", "power_limit_w", "utilisation", "memory_used_bytes", "sm_clock_hz",
           "memory_clock_hz", "temperature_c", "throttle", "sm_active", "dram_active", "tensor_active",
           "cpu_utilisation", "host_memory_used_bytes")  # fmt: skip
SCHEMA = pa.schema([("time_ns", pa.int64()), ("device", pa.string()), *((n, pa.float64()) for n in NUMBERS)])
SERVER_SCHEMA = pa.schema([("time_ns", pa.int64()), ("series", pa.string()), ("value", pa.float64())])
GROUP = 50_000  # rows of a Parquet row group
KEPT = ("power_w", "energy_j", "throttle", "utilisation", "cpu_utilisation", "host_memory_used_bytes")


@dataclass
class Seen:
    """What one pass over the stream leaves: sample times and KEPT columns of each device, and the single facts."""

    columns: dict[str, dict[str, array[float]]] = field(default_factory=dict)
    times: dict[str, array[int]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    tracks: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def conclude(folder: Path, document: dict[str, Any], scenario: Scenario, summary: Summary, rows: Rows
             ) -> tuple[dict[str, Any], list[Reason]]:  # fmt: skip
    """Writes the tables, adds energy to `summary`; returns what `run.json` gets beside it, and cautions.

    Raises OSError when the disk is full. A damaged stream costs the telemetry and not the run.
    """
    try:
        t0 = _t0(folder / STREAM)
        seen = Seen()
        _write_tables(folder, _tidied(folder / STREAM, t0, seen))
        context = Context(scenario.kind, scenario.limits)
        end_ns = context.window_ns(rows)
        telemetry, cautions = _power(seen, end_ns if t0 is not None else 0, document)
        if telemetry.get("joules") is not None and telemetry["mean_watts"] is not None:
            summary |= power_figures(rows, scenario, telemetry["joules"], telemetry["mean_watts"])
        decoupled = bool((document.get("server") or {}).get("decoupled", True))
        before, after = seen.facts.get("before"), seen.facts.get("after")
        server = server_stats.describe(before, after, seen.tracks, rows, end_ns, decoupled)
        return {"telemetry": telemetry, "server_statistics": server}, cautions
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
        for name in (TABLE, SERVER_TABLE):
            (folder / name).unlink(missing_ok=True)
        text = f"telemetry could not be read: {type(error).__name__}: {error}"
        return {}, [Reason("telemetry_unreadable", text, "a whole telemetry.jsonl", "please report this")]


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a stream; a torn one at its end is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _t0(path: Path) -> int | None:
    return next((line["t0"] for line in lines(path) if "t0" in line), None)


def _tidied(path: Path, t0: int | None, seen: Seen) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows for the tables ("telemetry" or "server"), with times relative to T0; all else goes to `seen`."""
    for line in lines(path):
        if t0 is None:  # cut off before T0: times count from the first line
            t0 = line.get("t", 0)
        at = line.pop("t", t0) - t0
        if "series" in line:
            for name, value in line["series"].items():
                if not server_stats.cumulative(name):
                    seen.tracks.setdefault(name, []).append((at, value))
                yield "server", {"time_ns": at, "series": name, "value": value}
        elif "missing" in line:
            seen.missing.append(line["missing"])
        elif "lost" in line:
            seen.lost[line["device"]] = line["lost"]
        elif "device" in line:
            device = line["device"]
            seen.times.setdefault(device, array("q")).append(at)
            columns = seen.columns.setdefault(device, {name: array("d") for name in KEPT})
            for name in KEPT:
                columns[name].append(line.get(name, float("nan")))
            yield "telemetry", {"time_ns": at, **line}
        else:
            seen.facts |= line


def _write_tables(folder: Path, rows: Iterator[tuple[str, dict[str, Any]]]) -> None:
    """One Parquet file a kind, in groups; none where there is nothing to tell."""
    schemas = {"telemetry": (TABLE, SCHEMA), "server": (SERVER_TABLE, SERVER_SCHEMA)}
    writers: dict[str, pq.ParquetWriter] = {}
    pending: dict[str, list[dict[str, Any]]] = {"telemetry": [], "server": []}

    def flush(kind: str) -> None:
        if pending[kind]:
            name, schema = schemas[kind]
            if kind not in writers:
                writers[kind] = pq.ParquetWriter(folder / name, schema, compression="zstd")
            writers[kind].write_table(pa.Table.from_pylist(pending[kind], schema))
            pending[kind] = []

    try:
        for kind, row in rows:
            pending[kind].append(row)
            if len(pending[kind]) >= GROUP:
                flush(kind)
        for kind in pending:
            flush(kind)
    finally:
        for writer in writers.values():
            writer.close()


def _power(seen: Seen, end_ns: int, document: dict[str, Any]) -> tuple[dict[str, Any], list[Reason]]:
    """The `telemetry` part of `run.json`, and cautions where a GPU is there and its energy is not to be quoted."""
    devices = {name: _samples(seen, name) for name in sorted({*seen.times, *seen.lost} - {"host"})}
    wanted = (seen.facts.get("settings") or {}).get("gpus")
    gpus = {n: s for n, s in devices.items() if n.startswith("gpu")}
    used = {n: s for n, s in gpus.items() if (n[3:] in wanted if wanted else _busy(seen, n, end_ns))} or gpus
    measured = used or devices
    energies = [measure(s, 0, end_ns) for s in measured.values()]
    out: dict[str, Any] = {
        "source": (seen.facts.get("settings") or {}).get("source"),
        "energy_of": ("gpu" if used else "cpu") if energies else None,
        "rate_hz": _rate(measured),
        **(total(energies) if energies else {"power_valid": False, "reasons": []}),
        "devices": [e.to_json() for e in energies],
        "idle_gpus": sorted(gpus.keys() - used.keys()),
        "host": _host(seen, end_ns),
        "missing": seen.missing,
    }  # fmt: skip
    if not energies:
        out["missing"] = [*seen.missing, "neither a GPU nor a CPU package told its power"]
    cautions = [Reason(**r) for r in out["reasons"]]
    if not gpus and (document.get("hardware") or {}).get("gpus"):
        text = "; ".join(seen.missing) or "no source was asked"
        cautions.append(Reason("telemetry_missing", f"no power of the GPUs: {text}", "telemetry of every GPU",
                               "install tritonmark[gpu], or give --telemetry the URL of a DCGM exporter"))  # fmt: skip
    return out, cautions if used or cautions else []


def _samples(seen: Seen, device: str) -> Samples:
    c = seen.columns.get(device) or {name: array("d") for name in KEPT}
    floats = {name: np.array(c[name], dtype=np.float64) for name in ("power_w", "energy_j", "throttle")}
    bits = np.nan_to_num(floats["throttle"]).astype(np.int64)
    times = np.array(seen.times.get(device, array("q")), dtype=np.int64)
    return Samples(device, times, floats["power_w"], floats["energy_j"], bits, seen.lost.get(device))


def _busy(seen: Seen, device: str, end_ns: int) -> bool:
    """Did a kernel run on this GPU during the window? One that did not is no part of the run."""
    if device not in seen.columns:
        return True  # lost before it told anything
    t = np.array(seen.times[device])
    use = np.array(seen.columns[device]["utilisation"])[(t >= 0) & (t <= end_ns)]
    return bool((np.nan_to_num(use, nan=1.0) > 0).any())


def _rate(devices: dict[str, Samples]) -> float | None:
    steps = [float(np.median(np.diff(s.t_ns))) for s in devices.values() if len(s.t_ns) > 1]
    return 1e9 / max(steps) if steps and max(steps) > 0 else None


def _host(seen: Seen, end_ns: int) -> dict[str, float] | None:
    if "host" not in seen.times:
        return None
    t = np.array(seen.times["host"])
    inside = (t >= 0) & (t <= end_ns)
    if not inside.any():
        return None
    cpu, memory = (np.array(seen.columns["host"][n])[inside] for n in ("cpu_utilisation", "host_memory_used_bytes"))
    return {"mean_cpu_utilisation": float(cpu.mean()), "max_memory_used_bytes": float(memory.max())}
