"""A run's telemetry against nvidia-smi, sampled at the same time by measure.py --smi.

    python benchmarks/gpu/telemetry_check.py RESULTS

For every run below RESULTS that overlaps RESULTS/nvidia-smi.csv: mean power over the run's window by nvidia-smi, by our
samples and by the GPU's own energy counter, and how many of our samples have the SM clock of the nearest sample of
nvidia-smi. Asked for: power within 2 %, clocks equal. nvidia-smi writes local time: run it in the zone that measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loadgen.core.energy import trapezoid

NEAR_NS = 60_000_000  # a sample of nvidia-smi that is at most this far away


def smi(path: Path) -> dict[int, np.ndarray]:
    """By GPU index: rows of (Unix ns, W, SM MHz)."""
    found: dict[int, list[tuple[float, float, float]]] = {}
    with path.open() as lines:
        for at, index, watts, sm, *_ in csv.reader(lines, skipinitialspace=True):
            ns = round(datetime.strptime(at, "%Y/%m/%d %H:%M:%S.%f").timestamp() * 1e9)
            found.setdefault(int(index), []).append((ns, float(watts), float(sm)))
    return {index: np.array(rows) for index, rows in found.items()}


def check(folder: Path, samples: dict[int, np.ndarray]) -> dict | None:
    """What one run's telemetry and nvidia-smi say; None where they do not overlap."""
    document = json.loads((folder / "run.json").read_text())
    t0, end = document["t0_wall_ns"], round(document["summary"]["duration_s"] * 1e9)
    if not end:
        return None
    table = pq.read_table(folder / "telemetry.parquet").to_pydict()
    out: dict = {"run": document["run_id"], "ours_w": document["summary"].get("mean_power_watts"), "smi_w": 0.0}
    devices = {device["device"]: device for device in document["telemetry"]["devices"]}
    counters = [device["counter_joules"] for device in devices.values()]
    out["counter_w"] = sum(counters) / (end / 1e9) if counters and None not in counters else None
    equal, compared = 0, 0
    for index, rows in samples.items():
        if f"gpu{index}" not in devices:  # it did other work
            continue
        at = (rows[:, 0] - t0).astype(np.int64)
        if not len(at) or at[0] > 0 or at[-1] < end:
            return None
        joules, *_ = trapezoid(at, rows[:, 1], 0, end)
        out["smi_w"] += joules / (end / 1e9)
        for ns, device, hertz in zip(table["time_ns"], table["device"], table["sm_clock_hz"], strict=True):
            nearest = int(np.abs(at - ns).argmin())
            if device == f"gpu{index}" and hertz is not None and 0 <= ns <= end and abs(at[nearest] - ns) <= NEAR_NS:
                compared += 1
                equal += round(hertz / 1e6) == rows[nearest, 2]
    if out["ours_w"]:
        out["power_differs"] = f"{out['ours_w'] / out['smi_w'] - 1:+.2%}"
    return out | {"clocks_compared": compared, "clocks_equal": int(equal)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    results = parser.parse_args().results
    samples = smi(results / "nvidia-smi.csv")
    for path in sorted(results.rglob("telemetry.parquet")):
        if found := check(path.parent, samples):
            print(json.dumps(found))


if __name__ == "__main__":
    main()
