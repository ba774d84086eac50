"""The parts of a video pipeline on their device: loaded, or drawn from a seed. Runs inside Triton and at export;
imports nothing of this project.

`parts` is {part: {"class": ..., "config": {...}}} as in the catalogue: transformer, vae, text_encoder, scheduler.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NETWORKS = ("transformer", "vae", "text_encoder")
VELOCITY = 0.5  # deviation of the transformer's answer: guidance multiplies differences of two of them by about 6
SHARPNESS = 2.0  # of the norms of queries and keys: at 1 attention is an even mean, and prompts hardly matter
PIXELS = 0.5  # deviation of the decoder's answer, which is clipped at -1 and 1


def make_network(name: str, part: Mapping[str, Any]) -> torch.nn.Module:
    """One network with its default initial weights, on torch's current default device and type."""
    config = dict(part["config"])
    if name == "text_encoder":
        return getattr(transformers, part["class"])(transformers.T5Config(**config))
    return getattr(diffusers, part["class"])(**config)


def make_scheduler(part: Mapping[str, Any]):
    """The noise scheduler; it has no weights."""
    return getattr(diffusers, part["class"])(**part["config"])


def count_parameters(name: str, part: Mapping[str, Any]) -> int:
    """Parameters of one network, counted on the meta device: no memory, a second or two."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in make_network(name, part).parameters())


def draw_network(name: str, part: Mapping[str, Any], seed: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A network made on `device` in `dtype` with seeded random weights; no copy on disk or in host memory.

    Equal seeds give equal weights on one kind of device and one dtype, not across them.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = make_network(name, part)
    finally:
        torch.set_default_dtype(previous)
    generator = torch.Generator(device=device).manual_seed(seed * len(NETWORKS) + NETWORKS.index(name))
    with torch.no_grad():
        for title, weight in sorted(network.named_parameters()):
            mean, spread = _scale(name, title, weight, part["config"])
            if spread:
                weight.normal_(mean, spread, generator=generator)
            else:
                weight.fill_(mean)
    return network.eval().requires_grad_(False)


def _scale(name: str, title: str, weight: torch.Tensor, config: Mapping[str, Any]) -> tuple[float, float]:
    """Mean and deviation of one parameter: sums keep the size of their inputs, and what writes into a residual stream
    is divided by sqrt(2 layers), so that nothing overflows fp16 and frames are neither constant nor all clipped."""
    if title.endswith("bias") and weight.ndim < 2:
        return (1.0 if title.endswith("conv_y.conv.bias") else 0.0), 0.0  # conv_y multiplies the normalised features
    if weight.ndim < 2:
        return (SHARPNESS if title.endswith(("norm_q.weight", "norm_k.weight")) else 1.0), 0.0
    spread = 1 / math.sqrt(weight[0].numel())
    if name == "text_encoder":
        return 0.0, _text_spread(title, spread, config)
    if name == "transformer":
        if title.endswith(("attn1.to_out.0.weight", "ff.net.2.weight")):
            spread /= math.sqrt(2 * config["num_layers"])
        return 0.0, spread * (VELOCITY if title == "proj_out.weight" else 1.0)
    if "conv_y" in title or "conv_b" in title:
        return 0.0, 0.3 * spread
    return 0.0, spread * (PIXELS if title == "decoder.conv_out.conv.weight" else 1.0)


def _text_spread(title: str, spread: float, config: Mapping[str, Any]) -> float:
    if "shared" in title or "embed_tokens" in title:
        return 1.0
    if "relative_attention_bias" in title:
        return 0.1
    if title.endswith(".q.weight"):
        return spread / math.sqrt(config["d_kv"])  # T5 does not divide its attention scores
    if title.endswith((".o.weight", ".wo.weight")):
        return spread / math.sqrt(2 * config["num_layers"])
    return spread


def load_network(name: str, kind: str, where: str, dtype: torch.dtype, **options: Any) -> torch.nn.Module:
    """A network by `from_pretrained`, of diffusers or, for the text encoder, of transformers; on the CPU."""
    if name == "text_encoder":
        transformers.utils.logging.disable_progress_bar()
        return getattr(transformers, kind).from_pretrained(where, dtype=dtype, **options)
    sparing = importlib.util.find_spec("accelerate") is not None  # what diffusers needs to load without a second copy
    return getattr(diffusers, kind).from_pretrained(where, torch_dtype=dtype, low_cpu_mem_usage=sparing, **options)


def load_parts(folder: Path, settings: dict, device: str) -> dict[str, Any]:
    """transformer, vae, text_encoder, scheduler and tokenizer, ready for `CogVideoXPipeline(**parts)`.

    Networks come from `folder` in the layout of `save_pretrained`, or are drawn from the seed when `draw_on_load`.
    """
    dtype = DTYPES[settings["precision"]]
    found: dict[str, Any] = dict(_networks(folder, settings, dtype, device))
    found["scheduler"] = make_scheduler(settings["parts"]["scheduler"])
    found["tokenizer"] = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return found


def _networks(folder: Path, settings: dict, dtype: torch.dtype, device: str) -> Iterator[tuple[str, torch.nn.Module]]:
    for name in NETWORKS:
        part = settings["parts"][name]
        if settings["draw_on_load"]:
            yield name, draw_network(name, part, settings["seed"], dtype, device)
            continue
        network = load_network(name, part["class"], str(folder / name), dtype, local_files_only=True)
        yield name, network.to(device).eval().requires_grad_(False)
