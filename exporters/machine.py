"""Figures of this machine that decide whether what it measures can be trusted: cores, and who uses them."""

from __future__ import annotations

import os

import psutil

SAMPLE_S = 0.5


def cores() -> int:
    """Cores that this process may use; taskset and container CPU sets count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_share(sample_s: float = SAMPLE_S) -> float:
    """The share (0 to 1) of all cores that somebody used in the next `sample_s`, in which the caller does nothing."""
    return psutil.cpu_percent(sample_s) / 100
