"""`tritonmark check PATH`: does a result say what its own figures say?

PATH is a LoadGen detail log (v4.1 to v6.1), a folder of logs, a submission tree, or a sealed run of ours.

    $ tritonmark check results_v5.1/closed/SUBMITTER
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from loadgen.core import schedule
from loadgen.core.loadgen_verdict import discards
from loadgen.core.metrics import summarise
from loadgen.core.recheck import Recheck, recheck
from loadgen.core.scenario import Kind, Seeds
from loadgen.core.verdict import Audit, WorkerAudit, judge
from loadgen.edge import store
from loadgen.edge.errors import UserError
from loadgen.edge.mlperf_run import LoadGenView, view
from loadgen.edge.samples import sample_indices
from loadgen.edge.scenarios import DATA

_MARK = ":::MLLOG"
_LOG_NAME = re.compile(r"mlperf_log_.*detail.*\.txt$")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="one JSON document instead of text")
@click.option("--round", "wanted", help="demand the seeds of this MLPerf round, such as v6.1")
def check(path: Path, as_json: bool, wanted: str | None) -> None:
    """Recompute verdict, schedule and honest throughput of any LoadGen log, submission tree or sealed run.

    Exit code 0: all VALID and consistent; 3: something is INVALID or contradicts its own figures; 2: unreadable.
    """
    if wanted and wanted not in rounds():
        raise UserError(f"unknown round {wanted!r}; choose one of: {', '.join(rounds())}")
    results = [(found, check_one(found)) for found in find(path)]
    for _, result in results:
        if wanted and result.seeds_of != wanted:
            result.differences.append(f"seeds are not those of {wanted}")
    if as_json:
        click.echo(json.dumps({"results": [{"path": str(p), **r.to_json()} for p, r in results]}, indent=1))
    else:
        for found, result in results:
            click.echo("\n".join([str(found), *(f"  {line}" for line in describe(result))]))
        bad = sum(not r.valid for _, r in results)
        click.echo(f"{len(results)} checked, {len(results) - bad} VALID and consistent, {bad} not")
    sys.exit(0 if all(r.valid for _, r in results) else 3)


def find(path: Path) -> list[Path]:
    """Sealed runs (their folders) and detail logs at or below `path`. Raises UserError where there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a detail log, a folder or a sealed run")
    runs = {p.parent for p in path.rglob("run.json")}
    logs = {p for p in path.rglob("mlperf_log_*.txt") if _LOG_NAME.match(p.name) and p.parent not in runs}
    if not runs and not logs:
        raise UserError(f"{path} holds no mlperf_log_detail.txt and no run.json; give a folder that does")
    return sorted(runs | logs)


def check_one(path: Path) -> Recheck:
    """One detail log, or one sealed run given by its folder. Raises UserError when it cannot be read."""
    return check_run(store.load(path)) if path.is_dir() else check_log(path)


def check_log(path: Path) -> Recheck:
    """A detail log against its own figures."""
    log, errors = read_log(path)
    try:
        return recheck(log, rounds(), errors)
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not a LoadGen detail log this tool can read: {error!r}") from error


def rounds() -> dict[str, Seeds]:
    """The seeds of each MLPerf round that this tool knows."""
    return {name: Seeds(**s) for name, s in tomllib.loads((DATA / "mlperf_rounds.toml").read_text()).items()}


def read_log(path: Path) -> tuple[dict[str, Any], int]:
    """First value of each key, and the number of error lines. Raises UserError naming the line."""
    values: dict[str, Any] = {}
    errors = 0
    for number, line in _lines(path):
        if not line.startswith(_MARK):
            continue
        try:
            entry = _entry(line.removeprefix(_MARK).strip())
            values.setdefault(str(entry["key"]), entry["value"])
            errors += bool(entry.get("metadata", {}).get("is_error"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} line {number} is no {_MARK} line: {error!r}") from error
    if not values:
        raise UserError(f"{path} has no {_MARK} line: not a LoadGen detail log")
    return values, errors


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from enumerate(file, 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _entry(text: str) -> dict[str, Any]:
    """JSON, or nearly: C++ prints 0/0 and 1/0 as nan and inf."""
    try:
        entry: dict[str, Any] = json.loads(text)
    except ValueError:
        text = re.sub(r'"value": -?nan\b', '"value": NaN', text)
        entry = json.loads(re.sub(r'"value": (-?)inf\b', r'"value": \1Infinity', text))
    return entry


def check_run(run: store.Run) -> Recheck:
    """A sealed run from its rows: our verdict, LoadGen's figures, schedule, sample order and the logs beside it."""
    scenario, document = run.scenario, run.document
    summary, rows = summarise(run.rows(), scenario)
    out = Recheck(scenario.kind.value, f"sealed run, preset {scenario.preset}", int(summary["queries"]))
    out.written_by = "Tritonmark"
    out.logged_verdict = "VALID" if run.valid else "INVALID"
    seeds = {name for name, s in rounds().items() if s == scenario.seeds}
    out.seeds_of = next(iter(seeds), None)
    verdict = judge(summary, rows, scenario, _audit(document["audit"]))
    out.verdict = "VALID" if verdict.valid else "INVALID"
    sealed = sorted(r["code"] for r in document["verdict"]["reasons"] if r["code"] != "accuracy")  # needs the reference
    if sorted(r.code for r in verdict.reasons) != sealed:
        out.differences.append(f"sealed reasons are {sealed}, the rows give {sorted(r.code for r in verdict.reasons)}")
    if scenario.kind in (Kind.SINGLE_STREAM, Kind.MULTI_STREAM):
        out.discards = discards(out.queries, scenario.percentile)
    _traffic(run, rows, out)
    out.completed_per_s, out.tokens_per_s = summary["loadgen_qps"], summary.get("loadgen_tokens_per_s")
    out.honest_samples_per_s, out.honest_tokens_per_s = summary["qps"], summary.get("tokens_per_s")
    out.true_window_s = summary["duration_s"] or None
    if summary.get("tokens_per_s") and summary["loadgen_tokens_per_s"]:
        out.ratio = summary["loadgen_tokens_per_s"] / summary["tokens_per_s"]
        out.used_window_s = summary["duration_s"] / out.ratio
    if scenario.keep_outputs:
        out.notes.append("an accuracy run: its answers are not compared again")
    elif seen := view(run):
        _beside(run, seen, out)
    return out


def _audit(data: dict[str, Any]) -> Audit:
    fields = {k: v for k, v in data.items() if k != "client_ceiling_qps"}
    return Audit(**fields | {"workers": tuple(WorkerAudit(**w) for w in data["workers"])})


def _traffic(run: store.Run, rows: Any, out: Recheck) -> None:
    """Due times to the ns and samples in LoadGen's order, for the slots that have a row."""
    scenario, library = run.scenario, int(run.document.get("prompts", {}).get("count") or 0)
    if not len(rows):
        return
    slots = int(rows.seq.max()) + 1
    if scenario.kind is Kind.SERVER and scenario.arrivals == "poisson" and scenario.target_qps:
        due = schedule.loadgen_poisson(scenario.target_qps, slots, scenario.seeds.schedule)
        off = int((due[rows.seq] != rows.due_ns).sum())
        out.schedule_ns, out.logged_schedule_ns = int(due[-1]), int(rows.due_ns.max())
        out.schedule_match = "different" if off else "exact"
        out.differences += [f"{off} due times are not those of the seed"] if off else []
    if library and scenario.kind is not Kind.CONCURRENCY:
        wrong = int((sample_indices(scenario, library, slots)[rows.seq] != rows.sample).sum())
        out.differences += [f"{wrong} samples are not those of the seed"] if wrong else []


def _beside(run: store.Run, seen: LoadGenView, out: Recheck) -> None:
    """The LoadGen files in the run's folder, when there are any, against the rows."""
    facts = seen.judge(run).facts
    out.scheduled_per_s = facts.get("result_scheduled_samples_per_sec")  # type: ignore[assignment]
    path = run.folder / "mlperf_log_detail.txt"
    if not path.is_file():
        out.notes.append("no LoadGen files beside this run")
        return
    log, _ = read_log(path)
    for key, value in facts.items():
        logged = log.get(key)
        rounded = float(f"{value:.6g}") if isinstance(value, float) and np.isfinite(value) else value
        if logged != rounded and not (isinstance(value, float) and np.isnan(value)):
            out.differences.append(f"{path.name}: {key} is {logged}, the rows give {rounded}")
    for text in recheck(log, rounds()).differences:
        out.differences.append(f"{path.name}: {text}")


def describe(result: Recheck) -> list[str]:
    """Lines for a person."""
    who = result.written_by
    rest = [f"DIFFERENT: {d}" for d in result.differences] + [f"note: {n}" for n in result.notes]
    if result.logged_verdict is None:
        return [f"{result.scenario}, {result.mode}, seeds of {result.seeds_of or 'no known round'}", *rest]
    verdicts = f"{who} says {result.logged_verdict}, recomputed {result.verdict}"
    seeds = f"seeds of {result.seeds_of or 'no known round'}"
    lines = [f"{result.scenario}, n = {result.queries}: {verdicts}; {seeds}"]
    if result.discards is not None or result.logged_discards is not None:
        logged = f", logged {result.logged_discards}" if result.logged_discards is not None else ""
        lines.append(f"early stopping discards {result.discards}{logged}")
    if result.schedule_ns is not None:
        lines.append(
            f"schedule {result.schedule_ns} ns, logged {result.logged_schedule_ns} ns: {result.schedule_match}"
        )
    rates = [("scheduled", result.scheduled_per_s, "samples/s"), ("completed", result.completed_per_s, "samples/s"),
             ("", result.tokens_per_s, "tokens/s")]  # fmt: skip
    text = ", ".join(f"{name} {value:.6g} {unit}".strip() for name, value, unit in rates if value is not None)
    lines += [f"{who if who == 'LoadGen' else 'LoadGen formula'}: {text}"] if text else []
    if result.true_window_s:
        ratio = f", {result.ratio:.4f} x the {result.used_window_s:.3f} s used" if result.ratio else ""
        tokens = f", {result.honest_tokens_per_s:.6g} tokens/s" if result.honest_tokens_per_s else ""
        samples = f"{result.honest_samples_per_s:.6g} samples/s" if result.honest_samples_per_s else "nothing completed"
        lines.append(f"to the last response: {result.true_window_s:.3f} s{ratio}: {samples}{tokens}")
    return lines + rest
