"""Scenario files and command-line overrides → one resolved `Scenario`, validated once, here.

`loadgen/data/scenarios/*.toml` hold what a scenario is, `rules.toml` a round's seeds, `models.toml` the benchmark
whose limits judge a model. Every override is kept by name, so that it can be printed and sealed with the run.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from loadgen.core.scenario import Kind, Limits, Minimums, Scenario, Seeds
from loadgen.edge.errors import UserError

DATA = Path(__file__).parents[1] / "data"
ROUND = "v6.1"
ARRIVALS = ("poisson", "constant")
PRESETS = ("smoke", "mlperf")  # seconds, for a first look; MLPerf's real minimum durations and counts
MAX_SLOTS = 50_000_000  # 400 MB of due times; a typing error, not a plan


@cache
def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads((DATA / name).read_text())


def names() -> list[str]:
    """The scenarios there are, by file name."""
    return sorted(p.stem for p in (DATA / "scenarios").glob("*.toml"))


def resolve(name: str, model: str, preset: str = "smoke", overrides: Mapping[str, Any] | None = None) -> Scenario:
    """The scenario `name` for `model` under `preset`, with `overrides` on top.

    Overrides (None and "" are ignored): target_qps, duration_s, min_queries, concurrency, max_in_flight, warmup,
    output_tokens, timeout_s, arrivals, prompts, ttft_ms, tpot_ms, e2e_ms, schedule_seed. Raises UserError on unknown
    names and on numbers that make no sense.
    """
    name = name.replace("-", "_")
    if name not in names():
        raise UserError(f"unknown scenario {name!r}; choose one of: {', '.join(names())}")
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    over = {k: v for k, v in (overrides or {}).items() if v is not None and v != ""}
    data = _toml(f"scenarios/{name}.toml")
    kind = Kind(data["kind"])
    binding = _toml("models.toml").get(model, {"benchmark": "llama3.1-8b", "output_tokens": 64})
    mlperf = _minimums(data["mlperf"])
    minimums = mlperf if preset == "mlperf" else _minimums(data["presets"][preset])
    scenario = Scenario(
        name=name,
        kind=kind,
        preset=preset,
        rules=ROUND,
        benchmark=binding["benchmark"],
        percentile=data["percentile"],
        limits=_limits(data.get("limits", {}).get(binding["benchmark"], {}), over),
        minimums=Minimums(
            round(positive(over, "duration_s", minimums.duration_ns / 1e9) * 1e9),
            whole(over, "min_queries", minimums.queries, least=0),
            minimums.early_stopping,
        ),
        mlperf=mlperf,
        seeds=_seeds(over),
        target_qps=positive(over, "target_qps") if over.get("target_qps") is not None else None,
        arrivals=str(over.get("arrivals", "poisson")),
        concurrency=whole(over, "concurrency", data.get("concurrency", 1)),
        samples_per_query=data.get("samples_per_query", 1),
        max_in_flight=whole(over, "max_in_flight", data.get("max_in_flight", 4096)),
        warmup=whole(over, "warmup", 4, least=0),
        output_tokens=whole(over, "output_tokens", binding["output_tokens"]),
        timeout_s=positive(over, "timeout_s", 600.0),
        prompts=str(over.get("prompts", "builtin")),
    )
    _check(scenario)
    return scenario


def _check(scenario: Scenario) -> None:
    if scenario.kind.open_loop and scenario.target_qps is None:
        use = "the arrival rate" if scenario.kind is Kind.SERVER else "the rate you expect, which sets the sample count"
        raise UserError(f"scenario {scenario.name} needs --target-qps: {use}")
    if scenario.arrivals not in ARRIVALS:
        raise UserError(f"unknown arrivals {scenario.arrivals!r}; choose one of: {', '.join(ARRIVALS)}")
    if scenario.target_qps and scenario.target_qps * scenario.minimums.duration_ns / 1e9 > MAX_SLOTS:
        raise UserError(
            f"--target-qps {scenario.target_qps:g} makes over {MAX_SLOTS:,} requests; lower it or run shorter"
        )


def _minimums(data: Mapping[str, Any]) -> Minimums:
    return Minimums(round(data["duration_s"] * 1e9), data.get("queries", 0), data.get("early_stopping", False))


def _limits(data: Mapping[str, float], over: Mapping[str, Any]) -> Limits:
    values = {}
    for name in ("ttft", "tpot", "e2e"):
        if f"{name}_ms" in data or f"{name}_ms" in over:
            values[f"{name}_ns"] = round(positive(over, f"{name}_ms", data.get(f"{name}_ms")) * 1e6)
    return Limits(**values)


def _seeds(over: Mapping[str, Any]) -> Seeds:
    seeds = _toml("rules.toml")[ROUND]["seeds"]
    return Seeds(seeds["qsl"], seeds["sample"], whole(over, "schedule_seed", seeds["schedule"], least=0))


def positive(over: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """`over[name]` as a finite number above 0. Raises UserError naming the option."""
    value = over.get(name, default)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"{_option(name)} is {value}; it must be a number above 0")
    return number


def whole(over: Mapping[str, Any], name: str, default: int, least: int = 1) -> int:
    """`over[name]` as an integer of at least `least`. Raises UserError naming the option."""
    value = over.get(name, default)
    try:
        number = int(value)
        if number != float(value) and not isinstance(value, int):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        number = least - 1
    if number < least:
        raise UserError(f"{_option(name)} is {value}; it must be a whole number of at least {least}")
    return number


def _option(name: str) -> str:
    """The command-line option that sets an override."""
    return {"duration_s": "--run-time", "timeout_s": "--request-timeout"}.get(name, "--" + name.replace("_", "-"))
