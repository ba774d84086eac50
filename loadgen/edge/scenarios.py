"""Scenario files, a round's rules and command-line overrides → one resolved `Scenario`, validated once, here.

`loadgen/data/scenarios/*.toml` hold what a scenario is, `mlperf_rounds.toml` a round's seeds, `benchmarks.toml` the
limits and counts of each benchmark, `models.toml` which benchmark judges a model. Every override is kept by name, so
that it can be printed and sealed with the run.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from loadgen.core import lengths, sample_order
from loadgen.core.scenario import EQUAL_ISSUE, SAMPLE_ORDERS, UNIFORM, Clip, Kind, Limits, Minimums, Scenario, Seeds
from loadgen.edge.accuracy import read_reference
from loadgen.edge.errors import UserError

DATA = Path(__file__).parents[1] / "data"
RULES = ("v6.1", "v6.0", "v5.1")  # the newest, which is the default, first
ARRIVALS = ("poisson", "constant")
PRESETS = ("smoke", "mlperf")  # seconds, for a first look; MLPerf's real minimum durations and counts
BUILTIN, VIDEO_PROMPTS, SYNTHETIC = "builtin", "builtin-video", "synthetic"
VIDEO_WINDOW = 16  # requests open at once: one is made, the others wait, and none for longer than its timeout
MAX_SLOTS = 50_000_000  # 400 MB of due times; a typing error, not a plan
_DEFAULT_BINDING = {"benchmark": "llama3.1-8b", "output_tokens": 64}


@cache
def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads((DATA / name).read_text())


def names() -> list[str]:
    """The scenarios there are, by file name."""
    return sorted(p.stem for p in (DATA / "scenarios").glob("*.toml"))


def benchmarks() -> dict[str, dict[str, Any]]:
    """The benchmarks whose rules are known, by name."""
    return {name: entry for name, entry in _toml("benchmarks.toml").items() if name != "lengths"}


def length_statistics(side: str) -> dict[str, lengths.Statistics]:
    """What is published of each benchmark's token lengths; `side` is `input` or `output`."""
    known = _toml("benchmarks.toml")["lengths"]
    return {name: lengths.Statistics(entry[side]["max"], entry[side].get("mean")) for name, entry in known.items()}


def binding(model: str) -> dict[str, Any]:
    """The entry of `models.toml` for a served model: its own, or the longest whose name it begins with."""
    known = _toml("models.toml")
    fitting = [name for name in known if model == name or model.startswith(f"{name}-")]
    return dict(known[max(fitting, key=len)] if fitting else _DEFAULT_BINDING)


def resolve(name: str, model: str, preset: str = "smoke", overrides: Mapping[str, Any] | None = None) -> Scenario:
    """The scenario `name` for `model` under `preset`, with `overrides` on top.

    Overrides (None and "" are ignored): those that `options.OPTIONS` names, and duration_s. `library_size` is still 0:
    `sized` fills it in when the prompts are known. Raises UserError on unknown names, on numbers that make no sense,
    and where the round's rules have nothing for the model's benchmark.
    """
    name = name.replace("-", "_")
    if name not in names():
        raise UserError(f"unknown scenario {name!r}; choose one of: {', '.join(names())}")
    over = {k: v for k, v in (overrides or {}).items() if v is not None and v != ""}
    _one_of("preset", preset, PRESETS)
    rules = _one_of("rules", str(over.get("rules", RULES[0])), RULES)
    data, bound = _toml(f"scenarios/{name}.toml"), binding(model)
    benchmark = _benchmark(str(over.get("benchmark") or bound.get(name) or bound["benchmark"]), rules)
    kind = Kind(data["kind"])
    mlperf = _minimums(data["mlperf"], kind, benchmark)
    clip = _clip(bound, data, over)
    if clip:
        bound["output_tokens"] = clip.frames
    accuracy = _accuracy(data, over)
    scenario = Scenario(
        name=name,
        kind=kind,
        preset=preset,
        rules=rules,
        benchmark=benchmark,
        percentile=data["percentile"],
        limits=_limits(name, benchmark, rules, bool(data.get("limits_required")), over),
        minimums=_overridden(mlperf if preset == "mlperf" else _minimums(data["presets"][preset]), over),
        mlperf=mlperf,
        seeds=_seeds(rules, over),
        target_qps=positive(over, "target_qps") if over.get("target_qps") is not None else None,
        arrivals=_one_of("arrivals", str(over.get("arrivals", "poisson")), ARRIVALS),
        concurrency=whole(over, "concurrency", data.get("concurrency", 1)),
        samples_per_query=data.get("samples_per_query", 1),
        max_in_flight=whole(over, "max_in_flight", VIDEO_WINDOW if clip else data.get("max_in_flight", 4096)),
        warmup=whole(over, "warmup", 1 if clip else 4, least=0),
        timeout_s=positive(over, "timeout_s", 3600.0 if clip else 600.0),
        sample_order=_order(kind, preset, benchmark, over),
        clip=clip,
        **_prompts(over, bound["output_tokens"]),
        **accuracy,
    )
    _check(scenario)
    return scenario


def sized(scenario: Scenario, library: int) -> Scenario:
    """The scenario for a library of that many prompts. SingleStream with equal issue gets LoadGen's minimum count.

    LoadGen makes that from the expected latency, which here is 1 / target_qps; without a target nothing is expected,
    and the minimum is the next whole pass.
    """
    minimums = scenario.minimums
    if scenario.sample_order == EQUAL_ISSUE and scenario.kind is Kind.SINGLE_STREAM:
        milliseconds = minimums.duration_ns // 1_000_000 if scenario.target_qps else 0
        latency_ns = max(1, round(1e9 / (scenario.target_qps or 1.0)))
        count = sample_order.single_stream_min_queries(minimums.queries, milliseconds, latency_ns, library)
        minimums = replace(minimums, queries=count)
    if scenario.keep_outputs:
        minimums = Minimums(queries=library)
    return replace(scenario, library_size=library, minimums=minimums)


def _check(scenario: Scenario) -> None:
    if scenario.kind.open_loop and scenario.target_qps is None and not scenario.keep_outputs:
        use = "the arrival rate" if scenario.kind is Kind.SERVER else "the rate you expect, which sets the sample count"
        raise UserError(f"scenario {scenario.name} needs --target-qps: {use}")
    if scenario.target_qps and scenario.target_qps * scenario.minimums.duration_ns / 1e9 > MAX_SLOTS:
        raise UserError(
            f"--target-qps {scenario.target_qps:g} makes over {MAX_SLOTS:,} requests; lower it or run shorter"
        )


def _benchmark(name: str, rules: str) -> str:
    """`name`, if that round has it."""
    _one_of("benchmark", name, tuple(benchmarks()))
    rounds = benchmarks()[name]["rounds"]
    if rules not in rounds:
        raise UserError(f"MLPerf {rules} has no benchmark {name}; it is in {', '.join(rounds)}: choose with --rules")
    return name


def _minimums(data: Mapping[str, Any], kind: Kind | None = None, benchmark: str = "") -> Minimums:
    """As the scenario's file has them; Offline's samples under MLPerf's rules are the benchmark's whole library."""
    queries = benchmarks()[benchmark]["library"] if kind is Kind.OFFLINE else data.get("queries", 0)
    return Minimums(round(data["duration_s"] * 1e9), queries, data.get("early_stopping", False))


def _overridden(minimums: Minimums, over: Mapping[str, Any]) -> Minimums:
    duration_ns = minimums.duration_ns
    if "duration_s" in over:
        duration_ns = round(positive(over, "duration_s") * 1e9)
    return Minimums(duration_ns, whole(over, "min_queries", minimums.queries, least=0), minimums.early_stopping)


def _accuracy(data: Mapping[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Accuracy mode's fields. A reference brings its prompts and its answer length; a salt would change the answers."""
    if not data.get("keep_outputs"):
        for name in ("reference", "min_agreement"):
            if name in over:
                raise UserError(f"{_option(name)} belongs to `tritonmark run accuracy`; leave it out")
        return {}
    over.setdefault("salt", "off")
    if "reference" in over:
        over.setdefault("prompts", over["reference"])
        over.setdefault("output_tokens", max(map(len, read_reference(Path(str(over["reference"]))).values())))
    elif "min_agreement" in over:
        raise UserError("--min-agreement needs --reference FILE to agree with")
    least = positive(over, "min_agreement") if "min_agreement" in over else None
    if least and least > 1:
        raise UserError(f"--min-agreement is {least:g}; it is a share, at most 1")
    return {"keep_outputs": True, "reference": over.get("reference"), "min_agreement": least}


def _clip(bound: Mapping[str, Any], data: Mapping[str, Any], over: dict[str, Any]) -> Clip | None:
    """The clip that a video model is asked for: the model's, changed by `--clip`. None for a language model.

    A video has its own prompts and no salt: no server keeps prefixes of them, and equal runs ask for equal videos.
    """
    if "clip" not in bound:
        if "clip" in over:
            raise UserError("--clip is for video models; leave it out")
        return None
    wrong = [name for name in ("ttft_ms", "tpot_ms", "output_tokens", "input_tokens", "tokenizer") if name in over]
    if wrong or data.get("keep_outputs"):
        what = _option(wrong[0]) if wrong else "scenario accuracy"
        raise UserError(f"{what} is for language models, not for a video; leave it out")
    over.setdefault("salt", "off")
    if over.get("prompts", BUILTIN) == BUILTIN:
        over["prompts"] = VIDEO_PROMPTS
    values = dict(bound["clip"])
    for word in str(over.get("clip", "")).split(","):
        name, _, value = word.partition("=")
        name = name.strip()
        if name and name not in (*bound["clip"], "seed"):
            known = ", ".join((*bound["clip"], "seed"))
            raise UserError(f"--clip has no {name!r}; it takes {known}, such as frames=9,steps=4")
        if name:
            at = {"clip": value}
            least = 0 if name == "seed" else 1
            values[name] = positive(at, "clip") if name == "guidance" else whole(at, "clip", 0, least)
    return Clip(**values)


def _limits(name: str, benchmark: str, rules: str, required: bool, over: Mapping[str, Any]) -> Limits:
    """The benchmark's limits in this scenario, then the user's. Interactive without any is refused."""
    data = benchmarks()[benchmark].get(name, {})
    values = {}
    for limit in ("ttft", "tpot", "e2e"):
        if f"{limit}_ms" in data or f"{limit}_ms" in over:
            values[f"{limit}_ns"] = round(positive(over, f"{limit}_ms", data.get(f"{limit}_ms")) * 1e6)
    if required and not values:
        have = ", ".join(b for b, entry in benchmarks().items() if name in entry and rules in entry["rounds"])
        raise UserError(
            f"MLPerf {rules} has no {name} rules for {benchmark} (it has them for {have}); "
            "run server instead, or give your own limits with --ttft-ms and --tpot-ms"
        )
    return Limits(**values)


def _seeds(rules: str, over: Mapping[str, Any]) -> Seeds:
    seeds = _toml("mlperf_rounds.toml")[rules]
    return Seeds(seeds["qsl"], seeds["sample"], whole(over, "schedule_seed", seeds["schedule"], least=0))


def _order(kind: Kind, preset: str, benchmark: str, over: Mapping[str, Any]) -> str:
    """Equal issue where MLPerf prescribes it (preset mlperf) or the user asks for it, else uniform."""
    prescribed = preset == "mlperf" and kind.equal_issue and benchmarks()[benchmark].get("equal_issue", False)
    order = str(over.get("sample_order", EQUAL_ISSUE if prescribed else UNIFORM))
    _one_of("sample order", order, SAMPLE_ORDERS)
    if order == EQUAL_ISSUE and not kind.equal_issue:
        raise UserError(f"--sample-order {EQUAL_ISSUE} does not change {kind.value}'s samples; leave it out")
    return order


def _prompts(over: Mapping[str, Any], output_tokens: int) -> dict[str, Any]:
    """The fields that say which prompts there are, and how long they and their answers should be."""
    source, given = str(over.get("prompts", "builtin")), over.get("input_tokens")
    if source == SYNTHETIC and given is None:
        raise UserError(f"--prompts {SYNTHETIC} needs --input-tokens: {lengths.FORMS}")
    if source != SYNTHETIC and given is not None:
        raise UserError(f"--input-tokens needs --prompts {SYNTHETIC}: a given text has the length it has")
    salt = _one_of("salt", str(over.get("salt", "on")), ("on", "off"))
    return {
        "prompts": source,
        "max_prompts": whole(over, "max_prompts", 1) if "max_prompts" in over else None,
        "tokenizer": str(over["tokenizer"]) if "tokenizer" in over else None,
        "input_tokens": _spec("input", str(given)) if given is not None else None,
        "output_tokens": _spec("output", str(over.get("output_tokens", output_tokens))),
        "prompt_seed": whole(over, "prompt_seed", 0, least=0),
        "salt": salt == "on",
        "salt_seed": whole(over, "salt_seed", 0, least=0) if "salt_seed" in over else None,
    }


def _spec(side: str, text: str) -> str:
    try:
        lengths.parse(text, length_statistics(side))
    except ValueError as error:
        raise UserError(f"--{side}-tokens {error}") from None
    return text


def _one_of(what: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UserError(f"unknown {what} {value!r}; choose one of: {', '.join(choices)}")
    return value


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
