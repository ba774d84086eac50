"""TensorRT-LLM, in two forms.

`tensorrtllm` builds an engine in NVIDIA's container and serves it by Triton's C++ backend (images up to 26.07).
`tensorrtllm-llmapi` runs `tensorrt_llm.LLM` (PyTorch) behind this project's own `model.py`; it is what is left where
engines are gone, and it knows Llama only.

Written from NVIDIA's sources and tables. Neither form has been run: no machine at hand has the container.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from exporters import preflight, trtllm_plan
from exporters.catalogue import Model
from exporters.config_pbtxt import ModelConfig
from exporters.errors import UserError
from exporters.gpus import least_capability, weights_bytes
from exporters.layout import copy_runtime
from exporters.registry import Order, exporter
from exporters.trtllm_build import default_cache, place, run_steps, work_folder, work_path
from exporters.trtllm_config import checkpoint_config
from exporters.trtllm_images import ENGINES, LLMAPI, Image, least_driver, pick, table, why_not
from exporters.trtllm_repository import (
    DIALECT,
    OTHER_FRONT,
    PARTS,
    fill,
    fillings,
    front,
    launch_command,
    launch_llmapi,
    with_parameters,
)  # fmt: skip
from exporters.vllm import LIBRARY_FILES, check_served_from, outline, python_model
from exporters.weights import HUB, SYNTHETIC

LLMAPI_PRECISIONS = ("bf16", "fp16")  # fp8 and less need a checkpoint that was quantised before
LLMAPI_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
KV_SHARE = 0.9


def engine_precisions(model: Model) -> tuple[str, ...]:
    """What an engine of this architecture can be built in, the default first."""
    return tuple(table("models").get(model.model_class, {}).get("engine", ()))


def llmapi_precisions(model: Model) -> tuple[str, ...]:
    """What the LLM API can make of plain weights of this architecture."""
    return LLMAPI_PRECISIONS if table("models").get(model.model_class, {}).get("llmapi") else ()


def plan(order: Order) -> list[str]:
    """Image, what stands in the way here, every command, and how to serve the result."""
    machine, image = _look(order)
    lines = [_about(image)]
    lines += [f"not on this machine: {problem}" for problem in preflight.problems(_needs(order, image), machine)]
    lines += _remarks(order)
    work = _work(order, image)
    steps = trtllm_plan.steps(order, image, work, _user())
    lines.append(f"folder: {shlex.join(['mkdir', '-p', str(work / 'parts')])}")
    if order.weights == SYNTHETIC:
        written = shlex.join(["printf", "%s", _checkpoint_json(order)])
        lines.append(f"model.json: {written} > {shlex.quote(str(work / 'model.json'))}")
    lines += [trtllm_plan.show(step) for step in steps]
    for part, values in _fillings(order).items():
        lines.append(f"fill-{part}: {', '.join(f'{key}={value}' for key, value in values.items())}")
    lines.append(
        f"repository: the export puts engine and filled parts into {order.build.out.absolute() / order.name}/1"
    )
    return [*lines, f"serve: {_serve(order, image, _launch(order))}"]


def plan_llmapi(order: Order) -> list[str]:
    """Image, what stands in the way of serving here, and how to serve the result. Nothing is built."""
    image, remarks = _look_llmapi(order)
    return [_about(image), *remarks, f"serve: {_serve_llmapi(order, image)}"]


@exporter(
    "llm", "tensorrtllm", precisions=engine_precisions, plan=plan,
    no_path=lambda model: why_not(ENGINES, model.model_class),
)  # fmt: skip
def export_tensorrtllm(order: Order, version: Path) -> ModelConfig:
    """Build the engine in the container and lay the repository around it; steps that are done are skipped."""
    tell = order.build.tell
    machine, image = _look(order)
    if order.build.check:
        preflight.require(_needs(order, image), machine)
    serve = _serve(order, image, _launch(order))
    for line in (_about(image), *_remarks(order)):
        tell(line)
    _, settings = outline(order, version)
    with work_folder(_work(order, image)) as work:
        steps = trtllm_plan.steps(order, image, work, _user())
        (work / "model.json").write_text(_checkpoint_json(order), encoding="utf-8")
        run_steps(steps, work, _checkpoint_json(order), tell, {"parts": lambda: _filled(order, work, tell)})
        place(work, version, ("engine",))
        _place_parts(order, work, version)
    launch = {"image": image.name, "command": _launch(order)}
    (version / "launch.json").write_text(json.dumps(launch, indent=2) + "\n", encoding="utf-8")
    made = table("precisions")[order.precision]
    settings |= {"max_context": trtllm_plan.context(order), "image": image.name, "trtllm": image.trtllm}
    settings |= {"quantisation": made.get("quant_algo"), "pp": order.build.pp, "ep": order.build.ep}
    (version / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tell(f"serve: {serve}")
    return front(order.name, trtllm_plan.max_batch_size(order))


@exporter(
    "llm", "tensorrtllm-llmapi", precisions=llmapi_precisions, plan=plan_llmapi,
    no_path=lambda model: why_not(LLMAPI, model.model_class),
)  # fmt: skip
def export_tensorrtllm_llmapi(order: Order, version: Path) -> ModelConfig:
    """`tensorrt_llm.LLM` behind this project's own model.py; the same requests and responses as torch-eager."""
    image, remarks = _look_llmapi(order)
    serve = _serve_llmapi(order, image)
    _, settings = outline(order, version)
    copy_runtime(version, "llm_model", (*LIBRARY_FILES, "trtllm_engine"))
    settings["max_context"] = trtllm_plan.context(order)
    settings |= {"engine": "tensorrtllm", "device": "cuda", "quantisation": None}
    settings |= {"image": image.name, "trtllm": image.trtllm}
    settings["engine_arguments"] = llmapi_arguments(order, settings["max_context"])
    (version / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for line in (_about(image), *remarks, f"serve: {serve}"):
        order.build.tell(line)
    return python_model(order)


def llmapi_arguments(order: Order, max_context: int) -> dict[str, Any]:
    """Arguments of `tensorrt_llm.LLM`; an empty `model` is the folder that model.py finds beside it."""
    if order.weights == HUB:
        model = order.model.hub_id
    else:
        model = "" if order.weights == SYNTHETIC else str(Path(order.weights).expanduser().resolve())
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": LLMAPI_DTYPES[order.precision],
        "skip_tokenizer_init": True,  # model.py encodes and decodes
        "tensor_parallel_size": order.tp,
        "pipeline_parallel_size": order.build.pp,
        "max_batch_size": order.model.runtime["max_sequences"],
        "max_num_tokens": trtllm_plan.MAX_NUM_TOKENS,
        "max_seq_len": max_context,
        "kv_cache_config": {"free_gpu_memory_fraction": KV_SHARE, "enable_block_reuse": False},
    }
    if order.weights == HUB:
        arguments["revision"] = order.model.revision or "main"
    if order.weights == SYNTHETIC:
        arguments["load_format"] = "dummy"
    return arguments


def _look(order: Order) -> tuple[preflight.Machine, Image]:
    """This machine, and the newest image that it can run; the checks that need no machine come first."""
    check_served_from(order.build.served_from)
    trtllm_plan.check_parallel(order)
    newest = pick(ENGINES, order.model.model_class, None, order.build.image)
    trtllm_plan.check_mount("--out", order.build.out)
    trtllm_plan.steps(order, newest, _work(order, newest), _user())
    machine = preflight.probe(newest.name, order.build.cache or default_cache())
    return machine, pick(ENGINES, order.model.model_class, machine.driver, order.build.image)


def _look_llmapi(order: Order) -> tuple[Image, list[str]]:
    """The newest image that this machine can run, and what stands in the way of serving here: remarks, because nothing
    is built here and the export may be served elsewhere."""
    check_served_from(order.build.served_from)
    trtllm_plan.check_parallel(order, LLMAPI)
    newest = pick(LLMAPI, order.model.model_class, None, order.build.image)
    if not order.build.check:
        return newest, []
    machine = preflight.probe(newest.name, order.build.out)
    image = pick(LLMAPI, order.model.model_class, machine.driver, order.build.image)
    needs = replace(_needs(order, image), disk_bytes=0.0, image_gb=0.0)  # where docker keeps images is not known
    return image, [f"not on this machine: {problem}" for problem in preflight.problems(needs, machine)]


def _about(image: Image) -> str:
    return f"image: {image.name} (TensorRT-LLM {image.trtllm}, TensorRT {image.tensorrt}, CUDA {image.cuda})"


def _work(order: Order, image: Image) -> Path:
    """Where the build keeps its steps: the same for the same order."""
    identity = {
        "image": image.name, "model": order.model.name, "weights": order.weights, "precision": order.precision,
        "revision": order.model.revision, "tp": order.tp, "pp": order.build.pp, "ep": order.build.ep,
    }  # fmt: skip
    return work_path(order.build.cache or default_cache(), order.name, identity)


def _checkpoint_json(order: Order) -> str:
    return json.dumps(checkpoint_config(order.model, order.precision, order.tp, order.build.pp, order.build.ep))


def _filled(order: Order, work: Path, tell: Callable[[str], None] = lambda line: None) -> dict[str, str]:
    """The image's templates filled, by part: also before the engine is built, so that a template that cannot be filled
    costs seconds. The other front is left out where only that one cannot."""
    texts = {}
    for part, values in _fillings(order).items():
        try:
            template = (work / "parts" / part / "config.pbtxt").read_text(encoding="utf-8")
            texts[part] = fill(part, template, values)
        except UserError as error:
            if part != OTHER_FRONT:
                raise
            tell(f"note: {part} is left out, which the ensemble does not need: {error}")
    return texts


def _place_parts(order: Order, work: Path, version: Path) -> None:
    """The image's models with their templates filled; the other front says what a load test wants to know of it."""
    for part, text in _filled(order, work).items():
        shutil.copytree(work / "parts" / part, version / "parts" / part)
        if part == OTHER_FRONT:
            facts = {"model": order.model.name, "backend": order.backend, "precision": order.precision}
            facts |= {"weights": order.weights, "seed": str(order.seed), "tp": str(order.tp)}
            text = with_parameters(text, DIALECT | {f"tritonmark.{key}": value for key, value in facts.items()})
        (version / "parts" / part / "config.pbtxt").write_text(text, encoding="utf-8")


def _serve(order: Order, image: Image, launch: list[str], more: tuple[str, ...] = ()) -> str:
    return shlex.join(trtllm_plan.serve_command(order, image, launch, more))


def _serve_llmapi(order: Order, image: Image) -> str:
    """The library reads the weights itself: from the user's folder under its own path, or from the hub's cache."""
    more: tuple[str, ...] = ()
    if local := trtllm_plan.local_weights(order):
        more = ("-v", f"{local}:{local}:ro")
    elif order.weights == HUB:
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        more = ("-v", f"{trtllm_plan.check_mount('HF_HOME', home)}:/hub", "-e", "HF_HOME=/hub", "-e", "HF_TOKEN")
    return _serve(order, image, launch_llmapi(order.name, order.build.served_from), more)


def _needs(order: Order, image: Image) -> preflight.Needs:
    size = weights_bytes(order.model, order.precision)
    plain = weights_bytes(order.model, "bf16")
    disk = size if order.weights == SYNTHETIC else 2 * size + (plain if order.weights == HUB else 0)
    return preflight.Needs(
        what=f"{order.model.name} in {order.precision}",
        capability=least_capability(order.backend, order.precision),
        capability_for=f"TensorRT-LLM {image.trtllm} in {order.precision}",
        gpus=order.tp * order.build.pp,
        weight_bytes=size,
        disk_bytes=disk,
        image_gb=image.size_gb,
        least_driver=least_driver(image),
        gated=order.model.gated and order.weights == HUB,
    )


def _remarks(order: Order) -> list[str]:
    remarks = []
    if order.precision in table("models")[order.model.model_class]["unlisted"]:
        remarks.append(f"note: NVIDIA's matrix does not list {order.precision} for {order.model.name}; the flags exist")
    if order.weights != SYNTHETIC and table("precisions")[order.precision]["script"] == "quantize":
        remarks.append("note: quantize.py calibrates with the data set cnn_dailymail, which the container downloads")
    return remarks


def _fillings(order: Order) -> dict[str, dict[str, str]]:
    seen = PurePosixPath(order.build.served_from) / order.name / "1"
    known = fillings(str(seen / "engine"), str(seen / "weights"), trtllm_plan.max_batch_size(order))
    return {part: known[part] for part in PARTS}


def _launch(order: Order) -> list[str]:
    return launch_command(order.name, order.build.served_from, order.tp * order.build.pp)


def _user() -> str:
    return f"{os.getuid()}:{os.getgid()}"
