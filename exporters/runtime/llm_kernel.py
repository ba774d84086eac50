# ruff: noqa: N803 (compile-time constants are written in capitals in this language)
"""Attention of one decode step over a paged KV cache, as kernels for CUDA in Triton, the language. Only llm_paged.py
uses it; imports nothing of this project.

Each program reads only the pages that its sequence has filled, so no length buckets are needed and a short sequence
costs nothing for a long one beside it. With few sequences the pages of one are shared among several programs
(`SPLITS`), whose partial softmaxes a second kernel joins (flash decoding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WARPS, STAGES = 2, 2  # with pages of 32 tokens the fastest of 18 choices on an H100 at 1, 64 and 256 sequences
_FILL = 1056  # programs that keep a large GPU busy: eight for each of 132 multiprocessors
_MAX_SPLITS = 16


@triton.jit
def _attend(
    query, key, value, keys, values, tables, positions, out, partial, stats,
    q_row, k_row, table_row, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One sequence, one KV head with its GROUP query heads, one split. ROWS and WIDE are GROUP and DIM rounded up."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions + row)
    lanes = tl.arange(0, WIDE)
    rows = tl.arange(0, ROWS)
    slots = tl.arange(0, PAGE)
    inside = lanes < DIM
    q_at = query + row * q_row + (head * GROUP + rows)[:, None] * DIM + lanes[None, :]
    q = tl.load(q_at, mask=(rows < GROUP)[:, None] & inside[None, :], other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDE], tl.float32)
    if split == 0:  # the new token: into the cache for later steps, and from registers into this one
        k_new = tl.load(key + row * k_row + head * DIM + lanes, mask=inside, other=0.0)
        v_new = tl.load(value + row * k_row + head * DIM + lanes, mask=inside, other=0.0)
        page = tl.load(tables + row * table_row + position // PAGE).to(tl.int64)
        at = ((page * KV_HEADS + head) * PAGE + position % PAGE) * DIM + lanes
        tl.store(keys + at, k_new, mask=inside)
        tl.store(values + at, v_new, mask=inside)
        top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
        total = tl.full([ROWS], 1.0, tl.float32)
        sums += v_new.to(tl.float32)[None, :]
    for start in tl.range(split * PAGE, position, SPLITS * PAGE):
        page = tl.load(tables + row * table_row + start // PAGE).to(tl.int64)
        base = (page * KV_HEADS + head) * PAGE * DIM
        at = base + slots[:, None] * DIM + lanes[None, :]
        filled = (start + slots) < position
        k = tl.load(keys + at, mask=filled[:, None] & inside[None, :], other=0.0)
        v = tl.load(values + at, mask=filled[:, None] & inside[None, :], other=0.0)
        if ROWS == 1:
            scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :] * scale
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(filled[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums *= shrink[:, None]
        if ROWS == 1:
            sums += tl.sum(tl.trans(weights) * v.to(tl.float32), 0)[None, :]
        else:
            sums += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top
    heads = KV_HEADS * GROUP
    index = row * heads + head * GROUP + rows
    keep = rows < GROUP
    if SPLITS == 1:
        answer = sums / total[:, None]
        tl.store(out + index[:, None] * DIM + lanes[None, :], answer.to(out.dtype.element_ty),
                 mask=keep[:, None] & inside[None, :])  # fmt: skip
    else:
        index = index * SPLITS + split
        tl.store(partial + index[:, None] * DIM + lanes[None, :], sums, mask=keep[:, None] & inside[None, :])
        tl.store(stats + index * 2, top, mask=keep)
        tl.store(stats + index * 2 + 1, total, mask=keep)


@triton.jit
def _join(partial, stats, out, DIM: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    """One query head of one sequence: its splits into one answer."""
    index = tl.program_id(0)
    lanes = tl.arange(0, WIDE)
    inside = lanes < DIM
    splits = tl.arange(0, SPLITS)
    tops = tl.load(stats + (index * SPLITS + splits) * 2)
    totals = tl.load(stats + (index * SPLITS + splits) * 2 + 1)
    shrink = tl.exp(tops - tl.max(tops, 0))  # a split without any page has -inf: its share is 0
    sums = tl.load(partial + (index * SPLITS + splits)[:, None] * DIM + lanes[None, :], mask=inside[None, :], other=0.0)
    answer = tl.sum(sums * shrink[:, None], 0) / tl.sum(totals * shrink, 0)
    tl.store(out + index * DIM + lanes, answer.to(out.dtype.element_ty), mask=inside)


def decode_attention(query, key, value, keys, values, tables, positions, scale: float) -> torch.Tensor:
    """[B, heads, D] from `query` [B, heads, D] and the new token's `key`, `value` [B, KV heads, D], which are also
    stored into the pages `keys`, `values` [pages, KV heads, page, D] at `positions` [B]. `tables` [B, pages of one].
    """
    batch, heads, dim = query.shape
    kv_heads, page = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    splits = 1
    while splits < _MAX_SPLITS and batch * kv_heads * splits * 2 <= _FILL:
        splits *= 2
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    partial = torch.empty((batch, heads, splits, dim), dtype=torch.float32, device=query.device) if splits > 1 else out
    stats = torch.empty((batch, heads, splits, 2), dtype=torch.float32, device=query.device) if splits > 1 else out
    wide = triton.next_power_of_2(dim)
    rows = 1 if group == 1 else max(16, triton.next_power_of_2(group))  # tl.dot wants 16 rows
    _attend[(batch, kv_heads, splits)](
        query, key, value, keys, values, tables, positions, out, partial, stats,
        query.stride(0), key.stride(0), tables.stride(0), scale,
        KV_HEADS=kv_heads, GROUP=group, ROWS=rows, DIM=dim, WIDE=wide, PAGE=page, SPLITS=splits,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if splits > 1:
        _join[(batch * heads,)](partial, stats, out, DIM=dim, WIDE=wide, SPLITS=splits, num_warps=1)
    return out
