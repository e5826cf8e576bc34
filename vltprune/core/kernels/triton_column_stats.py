"""Triton kernels of the column statistics of attention. Importing this imports triton."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def column_sums(
    q: Tensor, k: Tensor, offsets: Tensor, longest: int, scale: float, free: Tensor, present: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Sums of the columns of attention maps over queries: of the largest weight over heads, and of their mean.

    Args:
        q: queries, [total, heads, head_dim].
        k: keys, [total, heads, head_dim].
        offsets: [batch + 1] int32, where each instance starts, and the total.
        longest: the tokens of the longest instance.
        scale: the factor of the dot products.
        free: [total] float32, how much each query counts in the first sum.
        present: [total] float32, how much each query counts in the second.
        causal: whether a token attends to itself and earlier tokens only.

    Returns:
        Both sums, [total] float32 each.
    """
    q, k = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k))
    total, heads, head_dim = q.shape
    width = max(16, triton.next_power_of_2(head_dim))
    # larger tiles spill registers in single precision, and overfill shared memory (64 kB here at most) in half
    block = 64 if q.element_size() == 2 and width <= 128 else 32
    tiles = triton.cdiv(longest, block)
    row_sums = torch.empty(heads, total, dtype=torch.float32, device=q.device)
    of_largest, of_mean = (torch.empty(total, dtype=torch.float32, device=q.device) for _ in range(2))
    # Triton computes powers of two
    strides, base_two = (*q.stride()[:2], *k.stride()[:2]), scale / math.log(2)
    inputs: tuple[Any, ...] = (q, k, offsets, *strides, base_two, total, heads, tiles, row_sums)
    sums: tuple[Any, ...] = (free.contiguous(), present.contiguous(), of_largest, of_mean)
    settings: dict[str, Any] = {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK": block, "CAUSAL": causal}
    settings |= {"num_warps": 4, "num_stages": 2}

    programs = (len(offsets) - 1) * tiles
    if programs:
        with torch.cuda.device_of(q):  # Triton launches on the current device
            _row_log_sums[(programs, heads)](*inputs, **settings)
            _column_sums[(programs,)](*inputs, *sums, **settings)
    return of_largest, of_mean


@triton.jit
def _logits(q, k, rows, columns, q_token, k_token, length, scale, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Scaled products of a tile of queries and one of keys of a head, [BLOCK, BLOCK]; 0 beyond the instance."""
    dims = tl.arange(0, WIDTH)
    q_mask = (rows[:, None] < length) & (dims[None, :] < HEAD_DIM)
    k_mask = (columns[None, :] < length) & (dims[:, None] < HEAD_DIM)
    q_tile = tl.load(q + rows[:, None].to(tl.int64) * q_token + dims[None, :], mask=q_mask, other=0.0)
    k_tile = tl.load(k + columns[None, :].to(tl.int64) * k_token + dims[:, None], mask=k_mask, other=0.0)
    # the exact path has no TF32 either
    return tl.dot(q_tile, k_tile, input_precision="ieee") * scale


@triton.jit
def _row_log_sums(
    q,
    k,
    offsets,
    q_token,
    q_head,
    k_token,
    k_head,
    scale,
    total,
    heads,
    tiles,
    row_sums,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The base-2 logarithm of the sum of 2 ** logits of each row, for a tile of queries and a head."""
    instance, begin, head = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK, tl.program_id(1)
    start = tl.load(offsets + instance).to(tl.int64)
    length = (tl.load(offsets + instance + 1) - start).to(tl.int32)
    if begin < length:
        rows = begin + tl.arange(0, BLOCK)
        own_q = q + start * q_token + head * q_head
        own_k = k + start * k_token + head * k_head
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, tl.minimum(begin + BLOCK, length) if CAUSAL else length, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            logits = _logits(own_q, own_k, rows, columns, q_token, k_token, length, scale, HEAD_DIM, WIDTH)
            seen = columns[None, :] < length
            if CAUSAL:
                seen = seen & (columns[None, :] <= rows[:, None])
            logits = tl.where(seen, logits, float("-inf"))
            # finite from the first tile on: every query sees the first key
            maximum = tl.maximum(largest, tl.max(logits, 1))
            sums = sums * tl.exp2(largest - maximum) + tl.sum(tl.exp2(logits - maximum[:, None]), 1)
            largest = maximum
        own_sums = row_sums + head.to(tl.int64) * total + start
        tl.store(own_sums + rows, largest + tl.log2(sums), mask=rows < length)


@triton.jit
def _column_sums(
    q,
    k,
    offsets,
    q_token,
    q_head,
    k_token,
    k_head,
    scale,
    total,
    heads,
    tiles,
    row_sums,
    free,
    present,
    of_largest,
    of_mean,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Both sums, for a tile of keys, over all queries of its instance."""
    instance, begin = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK
    start = tl.load(offsets + instance).to(tl.int64)
    length = (tl.load(offsets + instance + 1) - start).to(tl.int32)
    if begin < length:
        columns = begin + tl.arange(0, BLOCK)
        own_q, own_k, own_sums = q + start * q_token, k + start * k_token, row_sums + start
        sum_of_largest = tl.zeros([BLOCK], tl.float32)
        sum_of_mean = tl.zeros([BLOCK], tl.float32)
        for first in range(begin if CAUSAL else 0, length, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            is_row = rows < length
            largest = tl.zeros([BLOCK, BLOCK], tl.float32)
            added = tl.zeros([BLOCK, BLOCK], tl.float32)
            for head in range(heads):
                head_q, head_k = own_q + head * q_head, own_k + head * k_head
                logits = _logits(head_q, head_k, rows, columns, q_token, k_token, length, scale, HEAD_DIM, WIDTH)
                log_sum = tl.load(own_sums + head * total + rows, mask=is_row, other=float("inf"))
                weight = tl.exp2(logits - log_sum[:, None])
                if CAUSAL:
                    weight = tl.where(columns[None, :] <= rows[:, None], weight, 0.0)
                largest = tl.maximum(largest, weight)
                added += weight
            count = tl.load(free + start + rows, mask=is_row, other=0.0)
            sum_of_largest += tl.sum(largest * count[:, None], 0)
            count = tl.load(present + start + rows, mask=is_row, other=0.0)
            sum_of_mean += tl.sum(added * count[:, None], 0)
        tl.store(of_largest + start + columns, sum_of_largest, mask=columns < length)
        tl.store(of_mean + start + columns, sum_of_mean / heads, mask=columns < length)
