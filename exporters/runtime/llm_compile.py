"""Compiled layers of a transformers model, for decode steps and for prompts. Runs inside Triton; imports nothing of
this project.

Layers are compiled one by one: all are the same code, so one compile serves all of them, and a start takes seconds
where a whole model takes minutes. Decode steps measured on an H100 with Phi-2 (bf16, one sequence): 2.98 ms with
products written as reductions and tuned, 2.63 ms with small kernels combined and activations computed once, and 2.27 ms
with the two halves of Phi's parallel block on two streams, where reading the weights alone takes 1.75 ms.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.fx.experimental._config
import torch.nn.functional as F  # noqa: N812 (the name that torch's own documentation uses)

PARALLEL_BLOCKS = ("phi",)  # model types whose attention and MLP read the same input and are added up
CUDA_OPTIONS = {
    "coordinate_descent_tuning": True,  # also turns the products of a single row into tuned reductions
    "combo_kernels": True,  # independent small kernels in one launch
}


def compile_layers(model: torch.nn.Module, cuda: bool) -> list[Callable]:
    """The forward functions for the decode step, one for each decoder layer; compiled when they are first called. On
    CUDA linear layers themselves are changed, so that prompts run through `_linear` too."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64
    layers = model.model.layers
    # Products of 8 bit weights are library calls, so there is no product to tune, and tuning all else takes minutes.
    tuned = all(weight.dtype.itemsize > 1 for weight in layers.parameters())
    options = CUDA_OPTIONS if tuned else {**CUDA_OPTIONS, "coordinate_descent_tuning": False}
    settings = {"options": options} if cuda else {"dynamic": True}
    for module in layers.modules() if cuda else ():
        if type(module) is torch.nn.Linear:
            module.forward = types.MethodType(_linear, module)
    if not cuda or model.config.model_type not in PARALLEL_BLOCKS:
        return [torch.compile(layer.forward, **settings) for layer in layers]
    side = torch.cuda.Stream()
    add = torch.compile(lambda attended, fed, residual: attended + fed + residual, **settings)
    return [_parallel(layer, side, add, settings) for layer in layers]


def compile_prompts(model: torch.nn.Module, backend: str | Callable = "inductor") -> list[Callable]:
    """As compile_layers, for prompts: compiled once for several prompts of any length, and once for a lone one."""
    return [_any_length(torch.compile(layer.forward, dynamic=True, backend=backend)) for layer in model.model.layers]


def _any_length(compiled: Callable) -> Callable:
    """`compiled` with equal sizes taken for different ones, or a first prompt as long as the model is wide would be
    compiled for such prompts only."""

    def forward(*positional, **named):
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            return compiled(*positional, **named)

    return forward


def compile_head(choose: Callable, cuda: bool) -> Callable:
    """`choose` (hidden states to logits and tokens), compiled."""
    return torch.compile(choose, **({"options": CUDA_OPTIONS} if cuda else {"dynamic": True}))


def _linear(self, hidden: torch.Tensor) -> torch.Tensor:
    """A linear layer as product plus bias, since the compiler rewrites a lone product only. Its input is written to
    memory first: an activation that is computed inside the reduction is computed again for every output."""
    hidden = torch.ops.prims.inductor_force_stride_order(hidden, hidden.stride())
    product = F.linear(hidden, self.weight)
    return product if self.bias is None else product + self.bias


def _parallel(layer: torch.nn.Module, side: torch.cuda.Stream, add: Callable, settings: dict) -> Callable:
    """A parallel block whose MLP runs on a stream of its own beside the attention: with few sequences most of the
    attention's kernels are too small to fill the device."""
    norm = torch.compile(layer.input_layernorm.forward, **settings)
    attend = torch.compile(layer.self_attn.forward, **settings)
    feed = torch.compile(layer.mlp.forward, **settings)

    def forward(hidden_states, position_embeddings=None, tables=None, positions=None, **_):
        normed = norm(hidden_states)
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            fed = feed(normed)
        attended, _ = attend(
            hidden_states=normed,
            attention_mask=None,
            position_embeddings=position_embeddings,
            tables=tables,
            positions=positions,
        )
        here.wait_stream(side)
        return add(attended, fed, hidden_states)

    return forward


def can_compile(device: str) -> bool:
    """Compiled code for the CPU needs a C++ compiler and Python's headers; CUDA brings its own."""
    if device.startswith("cuda"):
        return True
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.is_file() and shutil.which(os.environ.get("CXX", "g++")) is not None
