"""One export from order to renamed folder: the single entry for the command line, the bench and the tests."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from exporters import layout
from exporters.catalogue import Model, find_model
from exporters.config_pbtxt import render
from exporters.disk import is_full
from exporters.errors import UserError
from exporters.hub import SYNTHETIC, locate
from exporters.reference import prompts, write_reference
from exporters.registry import Build, Order, find_exporter, no_path, plan_of, precisions_of
from exporters.verify import check_verifiable
from exporters.video_reference import MAX_CLIPS, parse_clip
from exporters.weights import hush_rope_keys

# Which of --tp, --pp and --ep a backend of language models does: the manifest must not state any other as a fact.
SPREAD = {
    "torch-eager": ("tp",),
    "torch-compile": ("tp",),  # to say itself why not
    "vllm": ("tp",),
    "vllm-python": ("tp",),
    "tensorrtllm": ("tp", "pp", "ep"),
    "tensorrtllm-llmapi": ("tp", "pp"),
}
SETTINGS = "1/settings.json"
TOOLS = ("tritonmark", "torch", "transformers", "tokenizers", "safetensors", "numpy", "diffusers", "av")


def export_model(
    model: str,
    backend: str = "torch-eager",
    weights: str = "synthetic",
    out: Path | str = "model_repository",
    *,
    name: str | None = None,
    precision: str | None = None,
    seed: int = 0,
    device: str = "auto",
    tp: int = 1,
    build: Build | None = None,
    force: bool = False,
    reference: int = 0,
    reference_prompts: Path | None = None,
    reference_clip: str = "",
    verify: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Path:
    """Write `out/name` and return it; `out/name/manifest.json` says what it is.

    `weights` is `synthetic`, `hub` or a folder; `precision` defaults to the model's first one, `name` to its own
    name. `device` is `auto` (the GPU that Triton gives, else the CPU) or `cpu`; `tp` GPUs share the model, and `build`
    says how a backend that compiles outside this process goes about it. That many `reference` answers of plain
    `generate` go into `reference.jsonl` (see `reference.py`); `reference_clip`, such as `frames=9,steps=8`, is what a
    video model is then asked for where its own clip would take long. `verify` says that the caller goes on to verify
    it, so that what cannot be is refused first. Bad input is a UserError, and so is a full disk; then, as after a
    crash, nothing appears in `out`.
    """
    tell = on_progress or (lambda message: None)
    clip = parse_clip(reference_clip)
    out = Path(out)
    build = replace(build or Build(), tell=tell, out=out)
    order = _check(model, backend, weights, name, precision, seed, device, tp, build)
    if clip and order.model.family != "video":
        raise UserError(f"--reference-clip is for video models, {model} is none; leave it out")
    if verify:
        check_verifiable(order, reference)
    if reference:
        prompts(min(reference, MAX_CLIPS) if order.model.family == "video" else reference, reference_prompts)
    hush_rope_keys()
    try:
        with layout.staged(out, order.name, force) as folder:
            tell(f"exporting {model} ({weights} weights, {order.precision}) for {backend}")
            facts = _fill(order, folder)
            if reference and json.loads((folder / SETTINGS).read_text(encoding="utf-8")).get("weights_elsewhere"):
                tell("no reference answers: the engine reads or draws the weights itself, they are not in the export")
            elif reference:
                tell(f"answering {reference} reference prompts with plain generate")
                write_reference(folder / "1", reference, reference_prompts, clip)
            layout.write_manifest(folder, facts)
    except Exception as error:
        if not is_full(error) or isinstance(error, UserError):
            raise
        cache = "" if weights == SYNTHETIC else " (HF_HOME moves the hub's cache)"
        raise UserError(
            f"the disk is full, nothing was exported to {out}; free some, or choose another --out{cache}"
        ) from None
    tell(f"wrote {out / order.name}")
    return out / order.name


def _fill(order: Order, folder: Path) -> dict:
    """Everything but the manifest and the reference answers into `folder`; returns what the manifest says."""
    version = folder / "1"
    version.mkdir()
    try:
        config = find_exporter(order.model.family, order.backend)(order, version)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        raise UserError(f"exporting needs {missing}; install it with: pip install 'tritonmark[embedded]'") from None
    facts = _facts(order, json.loads((folder / SETTINGS).read_text(encoding="utf-8"))) | {"code": _code(version)}
    config = replace(config, parameters={**config.parameters, **_provenance(facts)})
    (folder / "config.pbtxt").write_text(render(config), encoding="utf-8")
    return facts


def plan_export(
    model: str, backend: str, weights: str = "synthetic", *, name: str | None = None, precision: str | None = None,
    seed: int = 0, tp: int = 1, build: Build | None = None,
) -> list[str]:  # fmt: skip
    """The steps that `export_model` would take, as lines of text; nothing is written or started."""
    return plan_of(_check(model, backend, weights, name, precision, seed, "auto", tp, build or Build()))


def _check(
    model: str, backend: str, weights: str, name: str | None, precision: str | None, seed: int, device: str,
    tp: int, build: Build,
) -> Order:  # fmt: skip
    entry = find_model(model)
    can = precisions_of(entry, backend)
    if not can:
        raise UserError(no_path(entry, backend))
    chosen = precision or can[0]
    if chosen not in can:
        raise UserError(f"{model} has no precision {chosen!r} for {backend}; choose one of: {', '.join(can)}")
    _check_spread(entry, backend, {"tp": tp, "pp": build.pp, "ep": build.ep})
    if device not in ("auto", "cpu"):
        raise UserError(f"unknown device {device!r}; choose auto or cpu")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} is out of range; choose one from 0 to 2**63 - 1")
    if weights != SYNTHETIC:
        locate(entry, weights)
    return Order(entry, backend, chosen, weights, seed, layout.check_name(name or model), device, tp, build)


def _check_spread(model: Model, backend: str, counts: dict[str, int]) -> None:
    """A UserError where `model` cannot be spread over so many GPUs by `backend`. The engines of tensorrtllm have more
    rules, see trtllm_plan.py."""
    if min(counts.values()) < 1:
        raise UserError("--tp, --pp and --ep are numbers of GPUs; choose 1 or more")
    can = SPREAD.get(backend, ()) if model.family == "llm" else ()
    for option, count in counts.items():
        if count > 1 and option not in can:
            instead = f"; it has {' and '.join(f'--{name}' for name in can)}" if can else ""
            raise UserError(f"--{option} {count}: {backend} does not do that with {model.name}; leave it out{instead}")
    for size in ("num_attention_heads", "num_key_value_heads", "intermediate_size") if can else ():
        has, tp = model.config[size], counts["tp"]
        copied = size == "num_key_value_heads" and backend != "torch-eager" and tp % has == 0  # engines repeat KV heads
        if has % tp and not copied:
            raise UserError(f"--tp {tp} does not divide {model.name}'s {size} of {has}; choose a divisor of it")


def _provenance(facts: dict) -> dict[str, str]:
    """What a load test asks the server about the model, as parameters of its configuration."""
    named = {
        f"tritonmark.{name}": str(facts[name])
        for name in ("model", "backend", "precision", "weights", "seed", "tp", "code")
    }
    return named | {"tritonmark.tools": json.dumps(facts["tools"])}


def _code(version: Path) -> str:
    """A short hash of the Python files that Triton will run, or "none": runs of equal exports had equal code."""
    files = sorted(version.glob("*.py"))
    digest = hashlib.sha256(b"".join(f"{path.name}\0".encode() + path.read_bytes() for path in files))
    return digest.hexdigest()[:12] if files else "none"


def _facts(order: Order, settings: dict) -> dict:
    """What the manifest says beside hashes and time."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for tool in TOOLS:
        try:
            versions[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            versions[tool] = None
    source = dict(settings["source"])
    return {
        "name": order.name,
        "model": order.model.name,
        "family": order.model.family,
        "backend": order.backend,
        "precision": order.precision,
        "quantisation": settings.get("quantisation"),
        "work": settings.get("work"),  # of a video model: "exact", or what is done otherwise
        "tp": order.tp,
        "pp": order.build.pp,
        "ep": order.build.ep,
        "image": settings.get("image"),
        "weights": source["kind"],
        "source": source,
        "revision": source.get("revision"),
        "seed": order.seed if source["kind"] == "synthetic" else None,
        "licence": order.model.licence,
        "mlperf": order.model.mlperf,
        "parameters": order.model.parameters,
        "max_context": order.model.max_context,
        "tools": versions,
    }
