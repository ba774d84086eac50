"""The diffusion transformer as a TensorRT engine, by torch-tensorrt. Runs beside model.py; imports nothing of this
project.

The transformer is exported with torch.export at one clip size (an engine has fixed shapes here) and compiled by
torch_tensorrt.dynamo, which keeps engines in the model's compile cache. Text encoder, scheduler and VAE stay eager.

What was run: `export_transformer` on the tiny model on a CPU, its program compared with the eager transformer.
What was NOT run: `compile_transformer`, since torch-tensorrt needs an NVIDIA GPU and TensorRT's libraries; it follows
torch-tensorrt's documentation (2.9 and later: types of the model are kept, `use_explicit_typing` is the default).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class Denoiser(torch.nn.Module):
    """The transformer with tensors only, as torch.export and TensorRT want it: no dictionaries, no tuple input."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden_states, encoder_hidden_states, timestep, cos, sin):  # type: ignore[no-untyped-def]
        """One forward pass: the predicted velocity, of the shape of `hidden_states`."""
        return self.transformer(
            hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, timestep=timestep,
            image_rotary_emb=(cos, sin), return_dict=False,
        )[0]  # fmt: skip


class EngineTransformer(torch.nn.Module):
    """Stands in for the transformer inside CogVideoXPipeline: the same call, answered by the engine."""

    def __init__(
        self, engine: torch.nn.Module, transformer: torch.nn.Module, example: tuple[torch.Tensor, ...]
    ) -> None:
        super().__init__()
        self.engine, self.config, self.dtype = engine, transformer.config, transformer.dtype
        self._shape = example[0].shape

    def cache_context(self, name: str):  # type: ignore[no-untyped-def]
        """The pipeline opens one around each call; an engine has no cache."""
        import contextlib

        return contextlib.nullcontext()

    def forward(self, hidden_states, encoder_hidden_states, timestep, image_rotary_emb, **_: Any):  # type: ignore[no-untyped-def]
        """As CogVideoXTransformer3DModel.forward with `return_dict=False`. ValueError for another clip size."""
        if hidden_states.shape != self._shape:
            raise ValueError(
                f"the TensorRT engine was built for latents {tuple(self._shape)}, not {tuple(hidden_states.shape)}:"
                " ask for the model's default clip size with guidance, or use torch-compile"
            )
        cos, sin = image_rotary_emb
        return (self.engine(hidden_states, encoder_hidden_states, timestep, cos, sin),)


def example_inputs(pipe: Any, settings: dict) -> tuple[torch.Tensor, ...]:
    """Inputs of one guided denoising step at the default clip size, on the transformer's device."""
    transformer = pipe.transformer
    weight = next(transformer.parameters())
    frames = (settings["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    scale, config = pipe.vae_scale_factor_spatial, transformer.config
    batch = 2 if settings["guidance_scale"] > 1 else 1
    latents = (batch, frames, config.in_channels, settings["height"] // scale, settings["width"] // scale)
    text = (batch, config.max_text_seq_length, config.text_embed_dim)
    cos, sin = pipe._prepare_rotary_positional_embeddings(settings["height"], settings["width"], frames, weight.device)
    return (
        torch.randn(latents, dtype=weight.dtype, device=weight.device),
        torch.randn(text, dtype=weight.dtype, device=weight.device),
        torch.full((batch,), 999, dtype=torch.int64, device=weight.device),
        cos, sin,
    )  # fmt: skip


def export_transformer(pipe: Any, settings: dict) -> tuple[torch.export.ExportedProgram, tuple[torch.Tensor, ...]]:
    """The transformer as an exported program of fixed shapes, and the inputs that it was traced with."""
    inputs = example_inputs(pipe, settings)
    with torch.no_grad():
        return torch.export.export(Denoiser(pipe.transformer).eval(), inputs, strict=False), inputs


def compile_transformer(pipe: Any, settings: dict, cache: Path | None) -> torch.nn.Module:
    """What takes the transformer's place in `pipe`. Raises ValueError in one line where torch-tensorrt is missing."""
    try:
        import torch_tensorrt
    except ImportError as error:
        raise ValueError(
            f"backend tensorrt needs torch-tensorrt and TensorRT's libraries ({error}): pip install torch-tensorrt"
        ) from None
    program, inputs = export_transformer(pipe, settings)
    caching: dict[str, Any] = {}
    if cache is not None:
        caching = {"cache_built_engines": True, "reuse_cached_engines": True, "immutable_weights": False,
                   "engine_cache_dir": str(cache / "tensorrt")}  # fmt: skip
    engine = torch_tensorrt.dynamo.compile(
        program, arg_inputs=inputs, min_block_size=1, truncate_double=True, **caching
    )
    return EngineTransformer(engine, pipe.transformer, inputs)
