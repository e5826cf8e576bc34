"""Column statistics of attention beside fused attention, without a map in memory: for CUDA, by Triton."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ..checks import is_recorded
from ..layout import Layout
from ..statistics import Stat

COLUMNS = Stat.RECEIVED | Stat.COLUMN
_HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 256  # head_dim; a tile of wider heads does not fit into shared memory


def applies(q: Tensor, k: Tensor, needs: Stat) -> bool:
    """Whether the kernel can compute these statistics of a map without biases, and should.

    It has no backward pass, so that it is not used where gradients are wanted. Recorded graphs (torch.compile, torch.export,
    torch.jit.trace) get plain torch, which other engines know.

    Args:
        q: queries, [total, heads, head_dim].
        k: keys, [total, heads, head_dim].
        needs: statistics of the whole map.

    Returns:
        Whether `column_statistics` may be called.
    """
    if q.device.type != "cuda" or needs == Stat.NONE or needs & ~COLUMNS:
        return False
    wants_gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return (
        not is_recorded()
        and not wants_gradients
        and q.dtype in _DTYPES
        and q.dtype == k.dtype
        and q.shape[2] <= _WIDEST
        and _HAS_TRITON
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def column_statistics(
    q: Tensor, k: Tensor, layout: Layout, scale: float, needs: Stat, free: Tensor, present: Tensor, causal: bool = False
) -> dict[Stat, Tensor]:
    """RECEIVED and COLUMN, in single precision, from queries and keys.

    The first pass computes the log-sum-exp of each row. The second computes, for a tile of keys, the weights of one tile of
    queries after the other, head by head, and sums them. So the result of an instance depends on no other one.

    Args:
        q: queries, [total, heads, head_dim].
        k: keys, [total, heads, head_dim].
        layout: their instances.
        scale: the factor of the dot products.
        needs: which of the two.
        free: [total] float32, how much a query counts in RECEIVED.
        present: [total] float32, how much a query counts in COLUMN.
        causal: whether a token attends to itself and earlier tokens only.

    Returns:
        Those in `needs`, [total] float32 each.
    """
    from . import triton_column_stats  # here, since it imports triton

    sums = triton_column_stats.column_sums(
        q.detach(), k.detach(), layout.offsets, layout.longest, scale, free.detach(), present.detach(), causal
    )
    found = dict(zip((Stat.RECEIVED, Stat.COLUMN), sums, strict=True))
    return {stat: value for stat, value in found.items() if stat in needs}
