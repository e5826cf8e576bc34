"""Numerical precision: in what type scores are computed, and when two of them count as equal.

Scores and their sums are in single precision whatever the model's type is. Rounding never decides what stays: scores that
differ by rounding alone are made equal here, once, and equal scores go by place. An instance by itself and in a batch,
whose sums are made in another order, then keeps the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import is_traced

# relative: within what scores count as equal. A softmax of logits near 50 leaves in doubt 50 times what single precision
# rounds: scores of copies in random towers differed by 7e-6 and less, and others by 5e-5 and more
ROUNDING = 2e-5
_HALF = (torch.float16, torch.bfloat16)


def single(values: Tensor) -> Tensor:
    """values, in single precision where they are in half; others as they are."""
    return values.float() if values.dtype in _HALF else values


def widest_float(device: torch.device) -> torch.dtype:
    """The widest floating-point type that the device computes in: float64, or float32 where it refuses that, as MPS does."""
    try:
        torch.empty((), dtype=torch.float64, device=device)
    except Exception:  # each backend has an error of its own for it
        return torch.float32
    return torch.float64


def float_tensor(values: Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """Numbers, nested or not, as a tensor on the device, of the widest floating-point type that it computes in."""
    return torch.tensor(values, dtype=widest_float(device), device=device)


def rounding(dtype: torch.dtype) -> float:
    """Within what share of themselves two numbers are equal that were computed in this type from whole numbers."""
    return 1e-8 if dtype == torch.float64 else 2e-6


def surely_none(true: Tensor) -> bool:
    """Whether no element is true, asked only where that is cheap and holds: on CPUs, and not while a trace is recorded."""
    return true.device.type == "cpu" and not is_traced() and not bool(true.any())


def equalize(rows: Tensor, within: float = ROUNDING) -> Tensor:
    """Scores in which those of one row that are equal within rounding are equal: rows [batch, n] -> [batch, n].

    In the order of their size, neighbors closer than `within` of the larger one are one group, and take its largest score.
    Gradients are those of the scores as they came. Minus infinity marks padding.
    """
    ordered, order = rows.detach().sort(dim=1, descending=True, stable=True)
    above, below = ordered[:, :-1], ordered[:, 1:]
    apart = above - below > within * torch.maximum(above.abs(), below.abs()).nan_to_num(posinf=0.0)
    if surely_none(~apart & (above > below)):  # as nearly always
        return rows

    place = torch.arange(1, rows.shape[1], device=rows.device)
    leader = F.pad(torch.where(apart, place, 0), (1, 0)).cummax(1).values  # [batch, n]: where each one's group begins
    equalized = torch.empty_like(ordered).scatter_(1, order, ordered.gather(1, leader))
    if not rows.requires_grad:
        return equalized
    return torch.where(equalized > rows, rows + (equalized - rows).detach(), rows)
