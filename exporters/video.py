"""Exporters of the text-to-video models: the version folder of one Triton model for each backend.

All three share one runtime; they differ in how the diffusion transformer runs (`transformer_mode`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporters.catalogue import Model, check_parameters, first_difference
from exporters.config_pbtxt import ModelConfig, Tensor
from exporters.disk import require_space
from exporters.errors import UserError
from exporters.hub import HUB, SYNTHETIC, loading, locate, require_cache_space
from exporters.layout import copy_runtime, import_path
from exporters.registry import Order, exporter
from exporters.weights import CORPUS, train_tokenizer

RUNTIME_FILES = (
    "devices", "request_fields", "settings_file", "triton_model", "video_engine", "video_output", "video_request",
    "video_tensorrt", "video_weights",
)  # fmt: skip
NETWORKS = ("transformer", "vae", "text_encoder")
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>"}  # T5's own special tokens, with T5's ids 0 and 1
UNCHECKED = ("dropout", "dropout_rate", "tie_word_embeddings")  # no part of what an encoder or a sampler computes
EXACT = "exact"  # the work that the model's settings do unless an operator changes them: see runtime/video_engine.py


def _optional(*names: str, kind: str) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, kind, optional=True) for name in names)  # so that the runtime can say what is missing


INPUTS = (
    *_optional("text_input", "negative_prompt", "output", kind="TYPE_STRING"),
    *_optional("seed", kind="TYPE_INT64"),
    *_optional("num_frames", "height", "width", "num_inference_steps", "fps", kind="TYPE_INT32"),
    *_optional("guidance_scale", kind="TYPE_FP32"),
    *_optional("stream", kind="TYPE_BOOL"),
)
OUTPUTS = (
    *(Tensor(name, "TYPE_INT32") for name in ("step", "steps")),
    Tensor("step_s", "TYPE_FP64"),
    *(Tensor(name, "TYPE_STRING") for name in ("finish_reason", "work", "video")),
    *(Tensor(name, "TYPE_INT32") for name in ("num_output_frames", "height", "width", "num_input_tokens")),
    *(Tensor(name, "TYPE_FP64") for name in ("queue_s", "text_encode_s", "denoise_s", "vae_decode_s", "output_s")),
    Tensor("peak_memory_bytes", "TYPE_INT64"),
    Tensor("frames", "TYPE_UINT8", (-1, -1, -1, 3)),
)
OPERATOR_SETTINGS = (
    "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "max_pixels", "max_steps", "max_queue",
    "dynamic_cfg", "vae_tiling", "vae_slicing", "threads", "quantisation", "step_cache", "step_cache_threshold",
)  # fmt: skip


@exporter("video", "torch-eager")
def export_video_torch_eager(order: Order, version: Path) -> ModelConfig:
    """diffusers' own pipeline, eager, served by Triton's python backend."""
    return _python_model(order, version, "eager")


@exporter("video", "torch-compile")
def export_video_torch_compile(order: Order, version: Path) -> ModelConfig:
    """The same with each block of the transformer under torch.compile; compiled when the model is loaded."""
    return _python_model(order, version, "compile")


@exporter("video", "tensorrt")
def export_video_tensorrt(order: Order, version: Path) -> ModelConfig:
    """The same with the transformer as a TensorRT engine, built by torch-tensorrt when the model is loaded.

    Serving it was not tried: it needs an NVIDIA GPU with TensorRT's libraries. See runtime/video_tensorrt.py.
    """
    if order.device == "cpu":
        raise UserError("backend tensorrt needs a GPU; leave out --device cpu, or choose torch-compile")
    return _python_model(order, version, "tensorrt")


def _python_model(order: Order, version: Path, mode: str) -> ModelConfig:
    folder = version / "weights"
    folder.mkdir()
    source = write_weights(order, folder)
    copy_runtime(version, "video_model", RUNTIME_FILES)
    settings = {
        "model": order.model.name,
        "family": order.model.family,
        "precision": order.precision,
        "device": order.device,
        "seed": order.seed,
        "draw_on_load": order.weights == SYNTHETIC and not order.model.synthetic_on_disk,
        "transformer_mode": mode,
        "work": EXACT,
        **order.model.runtime,
        "parts": order.model.parts,
        "source": source,
    }
    (version / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    named = {name: str(settings[name]) for name in OPERATOR_SETTINGS}
    return ModelConfig(
        name=order.name,
        backend="python",
        inputs=INPUTS,
        outputs=OUTPUTS,
        decoupled=True,
        instance_kind={"cpu": "KIND_CPU"}.get(order.device, "KIND_AUTO"),
        parameters=named | {"device": order.device, "tritonmark.work": EXACT, "tritonmark.family": "video"},
    )


def write_weights(order: Order, folder: Path) -> dict[str, Any]:
    """Tokenizer and networks into `folder`; returns the manifest's source. Raises UserError."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    check_parameters(order.model)
    if order.weights != SYNTHETIC:
        return _write_pretrained(order, folder)
    import diffusers
    import torch

    # In place of T5's sentencepiece file, which no package carries. Its ids mean nothing to real weights.
    train_tokenizer(folder / "tokenizer", SPECIAL, ends=True)
    if order.model.synthetic_on_disk:
        with import_path():
            from video_weights import DTYPES, draw_network
        for name in NETWORKS:
            network = draw_network(name, order.model.parts[name], order.seed, DTYPES[order.precision], "cpu")
            network.save_pretrained(folder / name)
    return {"kind": SYNTHETIC, "seed": order.seed, "torch": torch.__version__, "diffusers": diffusers.__version__,
            "tokenizer": f"trained on {CORPUS.name}, not T5's"}  # fmt: skip


def _write_pretrained(order: Order, folder: Path) -> dict[str, Any]:
    """A pipeline's weights from the hub or a local folder of `save_pretrained`, converted to the precision."""
    with import_path():
        from video_weights import DTYPES, load_network
    import transformers

    where, options, source = locate(order.model, order.weights)
    dtype = DTYPES[order.precision]
    with loading(order.model, order.weights):
        for name in NETWORKS:  # before much is read or written
            _check_architecture(order.model, name, _config_file(where, name, options))
        if order.weights == HUB:
            require_cache_space(order.model)
        require_space(folder, order.model.parameters * dtype.itemsize, f"{order.model.name} in {order.precision}")
        for name in NETWORKS:
            kind = order.model.parts[name]["class"]
            network = load_network(name, kind, where, dtype, subfolder=name, **options)
            network.save_pretrained(folder / name)
            del network
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, subfolder="tokenizer", **options)
        tokenizer.save_pretrained(folder / "tokenizer")
    return source


def _config_file(where: str, name: str, options: dict) -> Path:
    if "revision" not in options:
        return Path(where) / name / "config.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(where, f"{name}/config.json", **options))


def _check_architecture(model: Model, name: str, file: Path) -> None:
    """Weights of another size are refused, not served under this model's name."""
    needed = {key: value for key, value in model.parts[name]["config"].items() if key not in UNCHECKED}
    if different := first_difference(needed, json.loads(file.read_text(encoding="utf-8"))):
        raise UserError(
            f"the {name} of these weights has {different} as {model.name} needs; export the model that they are of"
        )
