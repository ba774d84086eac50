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
from pathlib import Path, PurePosixPath
from typing import Any

from exporters import preflight, trtllm_plan
from exporters.catalogue import Model
from exporters.config_pbtxt import ModelConfig
from exporters.errors import UserError
from exporters.layout import copy_runtime
from exporters.registry import Order, exporter
from exporters.trtllm_build import default_cache, place, run_steps, work_folder
from exporters.trtllm_config import checkpoint_config
from exporters.trtllm_images import ENGINES, LLMAPI, Image, least_driver, pick, table
from exporters.trtllm_repository import PARTS, fill, fillings, front, launch_command
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
    lines = [f"image: {image.name} (TensorRT-LLM {image.trtllm}, TensorRT {image.tensorrt}, CUDA {image.cuda})"]
    lines += [f"not on this machine: {problem}" for problem in preflight.problems(_needs(order, image), machine)]
    lines += _remarks(order)
    cache = order.build.cache or default_cache()
    lines += [trtllm_plan.show(step) for step in trtllm_plan.steps(order, image, cache.absolute() / "WORK", _user())]
    for part, values in _fillings(order).items():
        lines.append(f"fill-{part}: {', '.join(f'{key}={value}' for key, value in values.items())}")
    serve = trtllm_plan.serve_command(order, image, Path("model_repository"), _launch(order))
    return [*lines, f"serve: {shlex.join(serve)}"]


@exporter("llm", "tensorrtllm", precisions=engine_precisions, plan=plan)
def export_tensorrtllm(order: Order, version: Path) -> ModelConfig:
    """Build the engine in the container and lay the repository around it; steps that are done are skipped."""
    tell = order.build.tell
    machine, image = _look(order)
    if order.build.check:
        preflight.require(_needs(order, image), machine)
    tell(f"image {image.name} (TensorRT-LLM {image.trtllm})")
    for remark in _remarks(order):
        tell(remark)
    _, settings = outline(order, version)
    source = json.dumps(checkpoint_config(order.model, order.precision, order.tp, order.build.pp, order.build.ep))
    identity = {
        "image": image.name, "model": order.model.name, "weights": order.weights, "precision": order.precision,
        "revision": order.model.revision, "tp": order.tp, "pp": order.build.pp, "ep": order.build.ep,
    }  # fmt: skip
    with work_folder(order.build.cache or default_cache(), order.name, identity) as work:
        steps = trtllm_plan.steps(order, image, work, _user())
        (work / "model.json").write_text(source, encoding="utf-8")
        run_steps(steps, work, source, tell)
        place(work, version, ("engine",))
        for part, values in _fillings(order).items():
            shutil.copytree(work / "parts" / part, version / "parts" / part)
            template = version / "parts" / part / "config.pbtxt"
            template.write_text(fill(part, template.read_text(encoding="utf-8"), values), encoding="utf-8")
    launch = {"image": image.name, "command": _launch(order)}
    (version / "launch.json").write_text(json.dumps(launch, indent=2) + "\n", encoding="utf-8")
    made = table("precisions")[order.precision]
    settings |= {"max_context": trtllm_plan.context(order), "image": image.name, "trtllm": image.trtllm}
    settings |= {"quantisation": made.get("quant_algo"), "pp": order.build.pp, "ep": order.build.ep}
    (version / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return front(order.name, trtllm_plan.max_batch_size(order))


@exporter("llm", "tensorrtllm-llmapi", precisions=llmapi_precisions)
def export_tensorrtllm_llmapi(order: Order, version: Path) -> ModelConfig:
    """`tensorrt_llm.LLM` behind this project's own model.py; the same requests and responses as torch-eager."""
    pick(LLMAPI, order.model.model_class, None)
    _, settings = outline(order, version)
    copy_runtime(version, "llm_model", (*LIBRARY_FILES, "trtllm_engine"))
    settings["max_context"] = trtllm_plan.context(order)
    settings |= {"engine": "tensorrtllm", "device": "cuda", "quantisation": None, "image": order.build.image or None}
    settings["engine_arguments"] = llmapi_arguments(order, settings["max_context"])
    (version / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
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
    if not engine_precisions(order.model):
        raise UserError(f"TensorRT-LLM builds no engine of {order.model.name}; choose another backend")
    check_served_from(order.build.served_from)
    trtllm_plan.check_parallel(order)
    folder = order.build.cache or default_cache()
    newest = pick(ENGINES, order.model.model_class, None, order.build.image)
    machine = preflight.probe(newest.name, folder)
    return machine, pick(ENGINES, order.model.model_class, machine.driver, order.build.image)


def _needs(order: Order, image: Image) -> preflight.Needs:
    made = table("precisions")[order.precision]
    size = preflight.weight_bytes(order.model, order.precision)
    plain = preflight.weight_bytes(order.model, "bf16")
    disk = size if order.weights == SYNTHETIC else 2 * size + (plain if order.weights == HUB else 0)
    return preflight.Needs(
        what=f"{order.model.name} in {order.precision}",
        capability=max(made["capability"], table("images")["min_capability"]),
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
