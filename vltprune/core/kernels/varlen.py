"""Variable-length attention on CUDA: one kernel for instances of unequal lengths, `torch.nn.attention.varlen`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout

_DTYPES = (torch.float16, torch.bfloat16)
_WIDEST = 192  # head_dim; some GPUs have no backward pass for wider heads


def applies(q: Tensor, k: Tensor, v: Tensor, layout: Layout, keys: Layout, causal: bool = False) -> bool:
    """Whether the kernel can attend, and should: to instances of unequal lengths, in half precision, on an NVIDIA GPU.

    The kernel takes no biases and no dropout; who has some asks no further. It aligns a causal mask with the end of the
    sequences, so that queries and keys must be equally many.

    Args:
        q: queries, [total, heads, head_dim].
        k: keys, [key total, heads, head_dim].
        v: values, [key total, heads, head_dim].
        layout: the instances of the queries.
        keys: the instances of the keys.
        causal: whether a token attends to itself and earlier tokens only.

    Returns:
        Whether `attend` may be called.
    """
    if q.device.type != "cuda" or (layout.is_uniform and keys.is_uniform):
        return False
    width = q.shape[2]
    return (
        q.dtype in _DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.shape[1] == k.shape[1] == v.shape[1]
        and width == v.shape[2]
        and width % 8 == 0
        and width <= _WIDEST
        and min(layout.lengths) > 0
        and min(keys.lengths) > 0
        and (not causal or layout.lengths == keys.lengths)
        and _has_flash_attention(q.device)
        and _kernel() is not None
    )


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, keys: Layout, scale: float, causal: bool = False) -> Tensor:
    """Attention within each instance by one call of the kernel, where `applies` says so.

    Args:
        q, k, v, layout, keys, causal: as in `applies`.
        scale: the factor of the dot products.

    Returns:
        The context of each query, [total, heads, head_dim].
    """
    kernel = _kernel()
    assert kernel is not None
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    window = (-1, 0) if causal else (-1, -1)
    offsets, longest = (layout.offsets, keys.offsets), (layout.longest, keys.longest)
    return kernel(q, k, v, *offsets, *longest, scale=scale, window_size=window)


def _kernel() -> Callable[..., Any] | None:
    """`torch.nn.attention.varlen.varlen_attn`. None where torch has none yet, or one without a scale."""
    try:  # here, since it imports triton
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    named = varlen_attn.__kwdefaults__ or {}
    return varlen_attn if "scale" in named and "window_size" in named else None


def _has_flash_attention(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU of the Ampere generation or later."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
