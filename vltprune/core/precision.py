"""Numerical precision: the dtype that scores are computed in, and when two scores count as equal.

Scores and their sums are in single precision whatever the model's dtype is. Rounding never decides which tokens stay:
scores that differ by rounding alone are made equal here, and ties go by position. An instance alone and in a batch, where
sums are computed in another order, then keeps the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import is_recorded
from .kernels.native import kernels

# relative: within what scores count as equal. A softmax of logits near 50 leaves in doubt 50 times what single precision
# rounds: scores of copies in random towers differed by 7e-6 and less, and others by 5e-5 and more
ROUNDING = 2e-5
_HALF = (torch.float16, torch.bfloat16)


def single(values: Tensor) -> Tensor:
    """Values in half precision converted to float32; others unchanged."""
    return values.float() if values.dtype in _HALF else values


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, which would take sums and products of scores in half precision.

    Args:
        device: where they are computed.

    Returns:
        The context; one that does nothing where autocast is off already, as at nearly every layer.
    """
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def widest_float(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype of a device: float64, or float32 where it has none, as MPS."""
    try:
        torch.empty((), dtype=torch.float64, device=device)
    except Exception:  # each backend has an error of its own for it
        return torch.float32
    return torch.float64


def float_tensor(values: Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Converts numbers to a tensor of a device's widest floating-point dtype.

    Args:
        values: the numbers, nested or not.
        device: where the tensor is.

    Returns:
        The tensor, in the shape of the nesting.
    """
    return torch.tensor(values, dtype=widest_float(device), device=device)


def rounding(dtype: torch.dtype) -> float:
    """The relative tolerance of numbers that were computed in this dtype from whole numbers."""
    return 1e-8 if dtype == torch.float64 else 2e-6


def surely_none(true: Tensor) -> bool:
    """Whether no element is known to be true. False without reading it on accelerators and in recorded graphs."""
    return true.device.type == "cpu" and not is_recorded() and not bool(true.any())


def equalize(rows: Tensor, within: float = ROUNDING) -> Tensor:
    """Makes scores of a row that are equal within rounding exactly equal.

    In sorted order, neighbors that differ by less than `within` of the larger one form a group. All of a group get its
    largest score. Gradients are those of the original scores.

    Args:
        rows: [batch, n], minus infinity on padding.
        within: the relative tolerance.

    Returns:
        The scores, [batch, n].
    """
    return rank(rows, within)[0]


def rank(rows: Tensor, within: float = ROUNDING) -> tuple[Tensor, Tensor]:
    """Makes scores of a row that are equal within rounding exactly equal, as `equalize` does, and sorts them.

    Args:
        rows: [batch, n], minus infinity on padding.
        within: the relative tolerance.

    Returns:
        The scores, [batch, n], and their indices from the largest to the smallest, ties by position, [batch, n] int64.
    """
    native = kernels(rows)
    if native is not None:
        return native.rank(rows, within)
    ordered, order = rows.detach().sort(dim=1, descending=True, stable=True)
    above, below = ordered[:, :-1], ordered[:, 1:]
    # the larger one of their absolute values, since the first is not below the second
    gap, rounding = above - below, torch.maximum(above, -below) * within
    if surely_none((gap < rounding) & (gap > 0)):  # as nearly always
        return rows, order

    apart = gap >= rounding  # true on padding, where both are infinite
    index = torch.arange(1, rows.shape[1], device=rows.device)
    # [batch, n]: the index at which each one's group begins
    leader = F.pad(torch.where(apart, index, 0), (1, 0)).cummax(1).values
    equalized = torch.empty_like(ordered).scatter_(1, order, ordered.gather(1, leader))
    order = equalized.argsort(dim=1, descending=True, stable=True)
    if not rows.requires_grad:
        return equalized, order
    return torch.where(equalized > rows, rows + (equalized - rows).detach(), rows), order
