"""The last lines of `tritonmark bench`: what was INVALID, why, what to do, what the exit code means."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from loadgen.edge.store import Run

BUSY = 0.25  # of all cores, used by others; above it arrivals wait for a core
OPTION = re.compile(r"--[a-z][a-z0-9-]+")
CLIENT = ("client_late", "client_lag", "client_cpu")
EXIT_CODE_3 = (
    "Exit code 3 (make says 'Error 3'): every run was measured and sealed, but at least one is INVALID: do not quote "
    "its numbers. 0 would be all VALID, 2 bad input, 1 a bug."
)


def last_lines(runs: Sequence[Run], page: Path, options: Iterable[str], others: float | None) -> list[str]:
    """What to print at the end. `options`: those that bench has, such as `--run-time`; advice names no others.

    `others` is the share (0 to 1) of all cores that other programs used just before the bench, None where unknown.
    """
    lines = [f"Next: open {page}. Another try: {command()} bench; all commands: {command()} --help"]
    invalid = [run for run in runs if not run.valid]
    if not invalid:
        return lines
    known = set(options)
    told = [f"{len(invalid)} of {len(runs)} runs INVALID:"]
    advice: dict[str, None] = {}  # a set that keeps its order
    for run in invalid:
        for reason in run.document["verdict"]["reasons"]:
            told.append(f"  {run.scenario.name}: {reason['seen']}; needs {reason['limit']} [{reason['code']}]")
            advice[_advice(reason, known, others)] = None
    return [*told, "What to do:", *(f"  → {text}" for text in advice), EXIT_CODE_3, *lines]


def _advice(reason: dict[str, str], options: set[str], others: float | None) -> str:
    """What a reason asks for, in what the bench's user can do: it starts server and client itself, on one machine."""
    if reason["code"] in CLIENT:
        if others is not None and others > BUSY:
            return f"other programs used {others:.0%} of this machine's cores: end them or wait, then run it again"
        return (
            "the load generator had to wait for a core that it shares with the server: run it again on an idle machine,"
            f" or load a server on another one: {command()} run server --host http://HOST:8000 --model NAME"
        )
    if set(OPTION.findall(reason["advice"])) - options:
        return f"not with bench, but with `{command()} serve` and `{command()} run` against it: {reason['advice']}"
    return reason["advice"]


def command() -> str:
    """How this user can type `tritonmark`: `make` leaves it in a folder that no shell looks into."""
    if shutil.which("tritonmark"):
        return "tritonmark"
    beside = Path(sys.executable).with_name("tritonmark")
    if not beside.exists():
        return f"{sys.executable} -m tritonmark"
    here = Path.cwd()
    return str(beside.relative_to(here)) if beside.is_relative_to(here) else str(beside)
