"""A paged KV cache and the attention over it, put under transformers' own model classes. Runs inside Triton; imports
nothing of this project.

`install` registers one attention function for all layers, `give_pages` gives each layer its pages. Two kinds of call
reach that function:
- prompts (`pages` given): plain causal attention within each row of a right-padded batch; keys and values go to the
  pages named for each token. Padding lies to the right, where causal attention never looks, and is stored on page 0,
  which belongs to nobody.
- one decode step (`tables` and `positions` given): every row is one sequence with one new token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the name that torch's own documentation uses)
from transformers import AttentionInterface

NAME = "tritonmark_paged"
PAGE = 32  # tokens in one page: one tile of the kernel


# The cache is written inside the operators, although their schemas say that they change nothing: a declared mutation
# makes the compiler consider copies of the whole cache. Safe, since nothing but them touches the pages of a layer.
@torch.library.custom_op("tritonmark::decode_attention", mutates_args=())
def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    tables: torch.Tensor, positions: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """[B, heads, D]; see llm_kernel.decode_attention, which CUDA runs. Elsewhere the same in plain torch."""
    if query.is_cuda:
        from llm_kernel import decode_attention as run

        return run(query.contiguous(), key.contiguous(), value.contiguous(), keys, values, tables, positions, scale)
    page = keys.shape[2]
    rows = torch.arange(len(positions), device=positions.device)
    at = tables[rows, positions // page], positions % page
    keys[at[0], :, at[1]] = key
    values[at[0], :, at[1]] = value
    used = tables[:, : int(positions.max()) // page + 1]
    batch, heads, dim = query.shape
    k, v = (store[used].transpose(1, 2).reshape(batch, keys.shape[1], -1, dim) for store in (keys, values))
    visible = torch.arange(k.shape[2], device=positions.device) <= positions[:, None]
    answer = F.scaled_dot_product_attention(
        query[:, :, None], k, v, visible[:, None, None], scale=scale, enable_gqa=heads != keys.shape[1]
    )
    return answer[:, :, 0].contiguous()


@decode_attention.register_fake
def _(query, key, value, keys, values, tables, positions, scale):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op("tritonmark::prompt_attention", mutates_args=())
def prompt_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    pages: torch.Tensor, places: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """[B, T, heads, D] of causal attention within each row of `query` [B, heads, T, D]; `key` and `value` go where
    `pages` and `places` within them, both [B, T], say for each token."""
    keys[pages, :, places] = key.transpose(1, 2)
    values[pages, :, places] = value.transpose(1, 2)
    answer = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return answer.transpose(1, 2).contiguous()


@prompt_attention.register_fake
def _(query, key, value, keys, values, pages, places, scale):
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


def attention(
    module, query, key, value, attention_mask, scaling=None, tables=None, positions=None, pages=None, places=None, **_
):
    """transformers' attention interface: `query` [B, heads, T, D] in, ([B, T, heads, D], None) out."""
    cache = module.key_pages, module.value_pages
    if tables is None:
        return prompt_attention(query, key, value, *cache, pages, places, scaling), None
    out = decode_attention(query[:, :, 0], key[:, :, 0], value[:, :, 0], *cache, tables, positions, scaling)
    return out[:, None], None


class RotaryTable(torch.nn.Module):
    """Takes the place of a model's rotary embedding: the same values, looked up. Some models' own one asks the device
    for the longest position in every step, which a CUDA graph cannot hold."""

    def __init__(self, original: torch.nn.Module, positions: int, like: torch.Tensor) -> None:
        super().__init__()
        every = torch.arange(positions, device=like.device)[None]
        cos, sin = original(like.new_empty(1, 1, 1), position_ids=every)
        self.register_buffer("cos", cos[0].contiguous(), persistent=False)
        self.register_buffer("sin", sin[0].contiguous(), persistent=False)

    def forward(self, _, position_ids):
        return self.cos[position_ids], self.sin[position_ids]


def token_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of cache for one token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * dtype.itemsize


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def install(model: torch.nn.Module, max_context: int) -> None:
    """Route every layer's attention here, over no more than the scratch page so far. Context in tokens."""
    AttentionInterface.register(NAME, attention)
    decoder = model.model
    decoder.rotary_emb = RotaryTable(decoder.rotary_emb, max_context, decoder.embed_tokens.weight)
    model.set_attn_implementation(NAME)
    give_pages(model, 1)


def give_pages(model: torch.nn.Module, pages: int) -> None:
    """Make the cache of every layer, `pages` pages long (page 0 is scratch), in place of the one it had."""
    weight = model.model.embed_tokens.weight
    shape = (pages, model.config.num_key_value_heads, PAGE, head_size(model.config))
    for layer in model.model.layers:
        for name in ("key_pages", "value_pages"):
            # Zeros, since a kernel multiplies what it masks: garbage could be NaN.
            layer.self_attn.register_buffer(name, weight.new_zeros(shape), persistent=False)
