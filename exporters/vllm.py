"""vLLM, in two forms that are given the same engine arguments.

`vllm` is the layout of Triton's own vLLM backend (`1/model.json`), for images that have it. `vllm-python` runs the vLLM
library behind this project's own `model.py`, where that backend is not installed: the engine in a process of its own,
several instances of the model in front of it.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from exporters.catalogue import Model
from exporters.config_pbtxt import ModelConfig
from exporters.errors import UserError
from exporters.layout import copy_runtime
from exporters.llm import INPUTS, OUTPUTS, SERVED_FILES, runtime_settings
from exporters.registry import Order, exporter
from exporters.weights import HUB, HUB_ARCHITECTURES, SYNTHETIC, Written, write_outline, write_synthetic

LIBRARY_FILES = (*SERVED_FILES, "async_engine")  # a library with a batch loop of its own behind model.py
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "bfloat16"}
STORED = {"fp8": "bf16"}  # what the weights on disk are in, where that differs
QUANTIZATION = {"fp8": "fp8"}  # weights are quantised while they are loaded; needs compute capability 8.9
ONLINE = tuple(DTYPES)
MEMORY_SHARE = 0.9
INSTANCES = 4  # one instance streams about 8,000 responses a second at most


def precisions(model: Model) -> tuple[str, ...]:
    """What vLLM makes of plain weights: the catalogue's own types, and fp8 by quantising at load."""
    return tuple(dict.fromkeys((*(name for name in model.precisions if name in ONLINE), "fp8")))


@exporter("llm", "vllm", precisions=precisions)
def export_vllm(order: Order, version: Path) -> ModelConfig:
    """Triton's vLLM backend. It looks for the model from its own working folder, so the path in `model.json` is
    absolute: where the server sees this repository (`order.build.served_from`)."""
    written, settings = outline(order, version)
    seen = PurePosixPath(check_served_from(order.build.served_from)) / order.name / "1" / "weights"
    arguments = engine_arguments(order, _source(order, str(seen)), settings["max_context"])
    if written.source["kind"] == SYNTHETIC or order.weights != HUB:
        arguments["tokenizer"] = str(seen)
    (version / "model.json").write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
    settings |= {"quantisation": QUANTIZATION.get(order.precision)}
    (version / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return ModelConfig(
        name=order.name,
        backend="vllm",
        inputs=(),  # the backend completes inputs, outputs and the decoupled policy itself
        outputs=(),
        instance_kind="KIND_MODEL",  # vLLM picks the devices; KIND_GPU would pin it to one
        parameters={"REPORT_CUSTOM_METRICS": "true", "tritonmark.dialect": "vllm"},
    )


@exporter("llm", "vllm-python", precisions=precisions)
def export_vllm_python(order: Order, version: Path) -> ModelConfig:
    """The vLLM library behind this project's own model.py; the same requests and responses as torch-eager."""
    written, settings = outline(order, version)
    where = "" if written.source["kind"] == SYNTHETIC else _source(order, "")
    copy_runtime(version, "llm_model", (*LIBRARY_FILES, "vllm_engine"))
    arguments = engine_arguments(order, where, settings["max_context"])
    arguments["skip_tokenizer_init"] = True  # model.py encodes and decodes
    settings |= {"engine": "vllm", "device": "cuda", "quantisation": QUANTIZATION.get(order.precision)}
    settings |= {"engine_arguments": arguments}
    (version / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return python_model(order)


def python_model(order: Order) -> ModelConfig:
    """The configuration of this project's own model.py in front of an engine process that picks its own devices."""
    return ModelConfig(
        name=order.name,
        backend="python",
        inputs=INPUTS,
        outputs=OUTPUTS,
        decoupled=True,
        instance_kind="KIND_CPU",
        instance_count=INSTANCES,
    )


def engine_arguments(order: Order, model: str, max_context: int) -> dict[str, Any]:
    """vLLM's AsyncEngineArgs. `model` is a folder or a hub id; empty for the folder that model.py finds beside it."""
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": DTYPES[order.precision],
        "seed": order.seed % 2**32,
        "max_model_len": max_context,
        "max_num_seqs": order.model.runtime["max_sequences"],
        "tensor_parallel_size": order.tp,
        "gpu_memory_utilization": MEMORY_SHARE,
        "enable_prefix_caching": False,  # or repeated prompts would look faster than they are
        "disable_log_stats": False,  # the backend's metrics come from them
    }
    if order.precision in QUANTIZATION:
        arguments["quantization"] = QUANTIZATION[order.precision]
    if order.weights == SYNTHETIC and not loads_drawn_weights(order):
        arguments["load_format"] = "dummy"
    if order.weights == HUB:
        arguments["revision"] = arguments["tokenizer_revision"] = order.model.revision or "main"
    return arguments


def check_served_from(path: str) -> str:
    """`path` if it is absolute, without `..` and of characters that need no quoting anywhere."""
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/")
    if not path.startswith("/") or set(path) - allowed or ".." in PurePosixPath(path).parts:
        raise UserError(
            f"bad path {path!r}: give an absolute one of letters, digits, '.', '_', '-' and '/', without .."
        )
    return path


def outline(order: Order, version: Path) -> tuple[Written, dict[str, Any]]:
    """Write configuration and tokenizer to `version/weights`; what was written, and the settings that describe it."""
    if order.device == "cpu":
        raise UserError(f"{order.backend} needs an NVIDIA GPU; export torch-eager for a CPU")
    weights = version / "weights"
    weights.mkdir()
    if loads_drawn_weights(order):
        written = write_synthetic(order.model, STORED.get(order.precision, order.precision), order.seed, weights)
    else:
        written = write_outline(order.model, order.precision, order.weights, order.seed, weights)
    if not (weights / "tokenizer.json").is_file():
        raise UserError(f"{order.weights} has no fast tokenizer (tokenizer.json); add one to the folder")
    settings = runtime_settings(order, written) | {"weights_elsewhere": not loads_drawn_weights(order)}
    return written, settings


def loads_drawn_weights(order: Order) -> bool:
    """Whether synthetic weights are on disk, so that every backend computes with the same ones: those of small models.
    vLLM reads PhiMoE's experts in the hub's layout only, so there it draws its own."""
    small = order.weights == SYNTHETIC and order.model.synthetic_on_disk and order.backend.startswith("vllm")
    return small and order.model.model_class not in HUB_ARCHITECTURES


def _source(order: Order, synthetic: str) -> str:
    """Where the engine reads the weights: the hub, the user's folder as this machine names it, or `synthetic`."""
    if order.weights == SYNTHETIC:
        return synthetic
    return order.model.hub_id if order.weights == HUB else str(Path(order.weights).expanduser().resolve())
