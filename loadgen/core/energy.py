"""Energy of exactly the measured window, from samples of power and of a device's own energy counter.

Energy is the trapezoid over the power samples, with both edges of the window interpolated between the samples around
them; nothing is extrapolated. The device's counter, where it has one, measures the same thing a second time: the two
must agree. What was not seen is told by `coverage`; `reasons` says why a figure should not be quoted.

All times are ns of one clock, relative to T0. A sample that lacks a value holds NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from loadgen.core.reason import Reason
from loadgen.core.record import Int64

Float = npt.NDArray[np.float64]
MAX_GAP_NS = 2_000_000_000  # between samples further apart anything may have happened
MIN_COVERAGE = 0.95
MAX_DIFFERENCE = 0.05  # between the trapezoid and the counter

# The bits in which NVML says why clocks are held down, and DCGM after it. Power capping is how a GPU under full load
# works as it was sold; the others mean that it could not do what it was sold for.
THROTTLE_BITS = {"sw_power_cap": 0x4, "hw_slowdown": 0x8, "sync_boost": 0x10, "sw_thermal": 0x20, "hw_thermal": 0x40,
                 "hw_power_brake": 0x80}  # fmt: skip
ABNORMAL = ("hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake")


@dataclass(frozen=True)
class Samples:
    """What was sampled of one device, in the order of time: W, J of its counter, and throttle bits (0 = none)."""

    device: str
    t_ns: Int64
    watts: Float
    counter_j: Float
    throttle: Int64
    lost: str | None = None  # why the device stopped answering


@dataclass(frozen=True)
class Energy:
    """One device over the window. None stands where it was not measured; it is never 0 instead."""

    device: str
    samples: int
    joules: float | None
    counter_joules: float | None
    mean_watts: float | None
    max_watts: float | None
    coverage: float  # share of the window between samples at most MAX_GAP_NS apart
    largest_gap_s: float
    throttled: dict[str, float]  # reason to the share of samples that named it
    reasons: tuple[Reason, ...]

    @property
    def complete(self) -> bool:
        """The window was seen from end to end, so `joules` is the energy of all of it."""
        return self.joules is not None and self.coverage >= MIN_COVERAGE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(samples: Samples, start_ns: int, end_ns: int) -> Energy:
    """Energy of one device from `start_ns` to `end_ns`, with the reasons that speak against it."""
    t, watts = _sorted(samples.t_ns, samples.watts)
    inside = (samples.t_ns >= start_ns) & (samples.t_ns <= end_ns)
    joules, seen_ns, covered_ns, gap_ns = trapezoid(t, watts, start_ns, end_ns)
    length = max(end_ns - start_ns, 1)
    counter = counter_difference(*_sorted(samples.t_ns, samples.counter_j), start_ns, end_ns)
    bits = samples.throttle[inside]
    throttled = {name: float((bits & bit != 0).mean()) for name, bit in THROTTLE_BITS.items() if len(bits)}
    throttled = {name: share for name, share in throttled.items() if share > 0}
    within = watts[(t >= start_ns) & (t <= end_ns)]
    figure = Energy(
        samples.device, int(inside.sum()),
        joules=joules if seen_ns else None,
        counter_joules=counter,
        mean_watts=joules / (seen_ns / 1e9) if seen_ns else None,
        max_watts=float(within.max()) if len(within) else None,
        coverage=covered_ns / length,
        largest_gap_s=gap_ns / 1e9,
        throttled=throttled,
        reasons=(),
    )  # fmt: skip
    return replace(figure, reasons=tuple(_reasons(figure, samples)))


def trapezoid(t_ns: Int64, watts: Float, start_ns: int, end_ns: int) -> tuple[float, int, int, int]:
    """Joules, ns seen, ns covered, and the largest gap in ns, of the part of the window that lies between samples.

    `seen` reaches from the first to the last sample (or edge); `covered` leaves out what lies in gaps over MAX_GAP_NS.
    """
    length = max(end_ns - start_ns, 0)
    if len(t_ns) < 2 or not length or t_ns[-1] <= start_ns or t_ns[0] >= end_ns:
        return 0.0, 0, 0, length
    low, high = max(int(t_ns[0]), start_ns), min(int(t_ns[-1]), end_ns)
    inner = t_ns[(t_ns > low) & (t_ns < high)]
    at = np.concatenate([[low], inner, [high]])
    power = np.interp((at - low).astype(np.float64), (t_ns - low).astype(np.float64), watts)
    joules = float(np.sum((power[1:] + power[:-1]) / 2 * np.diff(at)) / 1e9)
    gaps = np.diff(t_ns)
    overlap = np.minimum(t_ns[1:], high) - np.maximum(t_ns[:-1], low)
    touched = overlap > 0
    covered = int(overlap[touched & (gaps <= MAX_GAP_NS)].sum())
    largest = max(int(gaps[touched].max(initial=0)), low - start_ns, end_ns - high)
    return joules, high - low, covered, largest


def counter_difference(t_ns: Int64, joules: Float, start_ns: int, end_ns: int) -> float | None:
    """Difference of an energy counter over exactly the window, its edges interpolated.

    None where the counter does not span the window, or went backwards in it (a device that was reset).
    """
    if len(t_ns) < 2 or t_ns[0] > start_ns or t_ns[-1] < end_ns:
        return None
    used = joules[np.searchsorted(t_ns, start_ns, "right") - 1 : np.searchsorted(t_ns, end_ns, "left") + 1]
    if (np.diff(used) < 0).any():
        return None
    base = int(t_ns[0])
    edges = np.interp([start_ns - base, end_ns - base], (t_ns - base).astype(np.float64), joules)
    return float(edges[1] - edges[0])


def total(devices: Sequence[Energy]) -> dict[str, Any]:
    """Sums over devices: joules, counter_joules, mean_watts, coverage (the worst), power_valid and reasons.

    Joules and mean_watts are None where any device was not seen over the whole window: a part of the energy would
    flatter.
    """
    whole = bool(devices) and all(d.complete for d in devices)
    counted = bool(devices) and all(d.counter_joules is not None for d in devices)
    reasons = [r for d in devices for r in d.reasons]
    return {
        "joules": sum(d.joules or 0.0 for d in devices) if whole else None,
        "counter_joules": sum(d.counter_joules or 0.0 for d in devices) if counted else None,
        "mean_watts": sum(d.mean_watts or 0.0 for d in devices) if whole else None,
        "coverage": min((d.coverage for d in devices), default=0.0),
        "power_valid": whole and not reasons,
        "reasons": [asdict(r) for r in reasons],
    }


def _reasons(figure: Energy, samples: Samples) -> list[Reason]:
    """Why the energy of one device is not to be quoted."""
    name, out = figure.device, []
    if samples.lost:
        out.append(Reason("power_lost", f"{name}: {samples.lost}", "a device that answers to the end",
                          "look at dmesg and nvidia-smi; the GPU may have to be reset"))  # fmt: skip
    if figure.joules is None:
        out.append(Reason("power_missing", f"{name} gave no power in the measured window", "power samples",
                          "look at telemetry.parquet; the device may not report its power"))  # fmt: skip
        return out
    if figure.largest_gap_s > MAX_GAP_NS / 1e9:
        out.append(Reason("power_gap", f"{name}: {figure.largest_gap_s:.1f} s without a sample",
                          f"≤ {MAX_GAP_NS / 1e9:g} s", "sample faster; a DCGM exporter wants -c 1000"))  # fmt: skip
    if figure.coverage < MIN_COVERAGE:
        out.append(Reason("power_coverage", f"{name}: {figure.coverage:.1%} of the window was sampled",
                          f"≥ {MIN_COVERAGE:.0%}", "sample faster, or run longer"))  # fmt: skip
    seen = [f"{reason} in {figure.throttled[reason]:.0%} of samples" for reason in ABNORMAL
            if reason in figure.throttled]  # fmt: skip
    if seen:
        out.append(Reason("throttled", f"{name}: {', '.join(seen)}", "no slowdown for heat or supply",
                          "cool the machine, or look at its power supply, and run again"))  # fmt: skip
    if figure.complete and figure.counter_joules:
        apart = abs((figure.joules or 0.0) / figure.counter_joules - 1)
        if apart > MAX_DIFFERENCE:
            seen_text = f"{name}: {figure.joules:.4g} J by samples, {figure.counter_joules:.4g} J by its counter"
            out.append(Reason("power_disagrees", seen_text, f"at most {MAX_DIFFERENCE:.0%} apart",
                              "sample faster, or run longer"))  # fmt: skip
    return out


def _sorted(t_ns: Int64, values: Float) -> tuple[Int64, Float]:
    """The finite samples in the order of time, one a time stamp."""
    there = np.isfinite(values)
    t, first = np.unique(t_ns[there], return_index=True)
    return t, values[there][first]
