"""Exporters of the language models: the version folder of one Triton model for each backend."""

from __future__ import annotations

import json
from pathlib import Path

from exporters.config_pbtxt import ModelConfig, Tensor
from exporters.errors import UserError
from exporters.layout import copy_runtime
from exporters.registry import Order, exporter
from exporters.weights import SYNTHETIC, Written, write_pretrained, write_synthetic

EIGHT_BIT = ("fp8", "int8")
SERVED_FILES = (  # on Triton's side, whatever computes
    "devices", "llm_link", "llm_request", "llm_settings", "llm_text", "request_fields", "settings_file", "triton_model",
)  # fmt: skip
ENGINE_FILES = ("llm_quantised", "llm_sampling", "llm_weights")
EAGER_FILES = ("llm_engine", "llm_ranks")
COMPILE_FILES = ("llm_compile", "llm_kernel", "llm_paged", "llm_slots", "llm_steps")
INPUTS = (
    Tensor("text_input", "TYPE_STRING", optional=True),  # optional, so that the runtime can say what is missing
    Tensor("max_tokens", "TYPE_INT32", optional=True),
    Tensor("min_tokens", "TYPE_INT32", optional=True),
    Tensor("ignore_eos", "TYPE_BOOL", optional=True),
    Tensor("temperature", "TYPE_FP32", optional=True),
    Tensor("top_k", "TYPE_INT32", optional=True),
    Tensor("top_p", "TYPE_FP32", optional=True),
    Tensor("seed", "TYPE_UINT64", optional=True),
    Tensor("stream", "TYPE_BOOL", optional=True),
    Tensor("return_token_ids", "TYPE_BOOL", optional=True),
)
OUTPUTS = (
    Tensor("text_output", "TYPE_STRING"),
    Tensor("num_output_tokens", "TYPE_INT32"),
    Tensor("output_ids", "TYPE_INT32", (-1,)),
    Tensor("finish_reason", "TYPE_STRING"),
    Tensor("num_input_tokens", "TYPE_INT32"),
    Tensor("total_output_tokens", "TYPE_INT32"),
)
OPERATOR_SETTINGS = ("max_sequences", "max_batch_tokens", "kv_tokens", "kv_memory_share", "threads")


@exporter("llm", "torch-eager")
def export_llm_torch_eager(order: Order, version: Path) -> ModelConfig:
    """transformers' eager model under its own continuous batching, served by Triton's python backend; with `--tp` on
    several GPUs."""
    if order.tp > 1 and order.precision in EIGHT_BIT:
        raise UserError(f"--tp {order.tp} with {order.precision} is not supported by torch-eager; take bf16 or vllm")
    return _python_model(order, version, "batching", EAGER_FILES, instances=1)


@exporter("llm", "torch-compile")
def export_llm_torch_compile(order: Order, version: Path) -> ModelConfig:
    """transformers' model classes with compiled and captured steps over a paged cache, in an engine process which
    several instances share: one instance streams about 8,000 responses a second at most."""
    if order.tp > 1:
        raise UserError("torch-compile runs on one GPU; take --backend torch-eager or vllm for --tp, or leave --tp out")
    return _python_model(order, version, "slots", COMPILE_FILES, instances=1 if order.model.tiny_of else 4)


def _python_model(order: Order, version: Path, engine: str, files: tuple[str, ...], instances: int) -> ModelConfig:
    weights = version / "weights"
    weights.mkdir()
    if order.weights == SYNTHETIC:
        written = write_synthetic(order.model, order.precision, order.seed, weights)
    else:
        written = write_pretrained(order.model, order.precision, order.weights, weights)
    copy_runtime(version, "llm_model", (*SERVED_FILES, *ENGINE_FILES, *files))
    settings = runtime_settings(order, written) | {"engine": engine}
    (version / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return ModelConfig(
        name=order.name,
        backend="python",
        inputs=INPUTS,
        outputs=OUTPUTS,
        decoupled=True,
        # With several ranks the engine places itself; Triton would make an instance for each GPU.
        instance_kind="KIND_CPU" if order.device == "cpu" or order.tp > 1 else "KIND_AUTO",
        instance_count=instances,
        parameters={name: str(settings[name]) for name in OPERATOR_SETTINGS} | {"device": order.device},
    )


def runtime_settings(order: Order, written: Written) -> dict:
    """`settings.json`: what the export fixed, and the defaults of what the operator may change in config.pbtxt."""
    return {
        "model": order.model.name,
        "model_class": order.model.model_class,
        "precision": order.precision,
        "device": order.device,
        "seed": order.seed,
        "tp": order.tp,
        "draw_on_load": written.draw_on_load,
        "decodable_tokens": written.decodable_tokens,
        "end_token_ids": written.end_token_ids,
        "max_context": order.model.max_context,
        **order.model.runtime,
        "source": written.source,
    }
