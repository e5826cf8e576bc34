"""The arguments of selection functions, checked and made a batch of one instance."""

from __future__ import annotations

import torch
from torch import Tensor


def instance(x: Tensor, protected: Tensor | None) -> tuple[Tensor, Tensor]:
    """Checks the features of an instance.

    Args:
        x: [n, dim].
        protected: [n] bool. None for none.

    Returns:
        The features [1, n, dim], and the unprotected tokens [1, n] bool.

    Raises:
        ValueError: for another shape or dtype, and for NaN and infinity.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be the features of one instance, [n, dim] of a floating-point dtype, got {list(x.shape)} {x.dtype}:"
            " call it for each instance of a batch"
        )
    _finite(x, "x")
    return x[None], _free(protected, x)


def scored(scores: Tensor, protected: Tensor | None) -> tuple[Tensor, Tensor]:
    """Checks the scores of a choice that reads no features.

    Args:
        scores: [n].
        protected: [n] bool. None for none.

    Returns:
        The scores [1, n], and the unprotected tokens [1, n] bool.

    Raises:
        ValueError: for another shape or dtype, and for NaN and infinity.
    """
    if scores.dim() != 1:
        raise ValueError(f"scores must be those of one instance, [n], got {list(scores.shape)}")
    return column(scores, scores, "scores"), _free(protected, scores)


def _free(protected: Tensor | None, x: Tensor) -> Tensor:
    """The unprotected tokens of x [n, ...], [1, n] bool."""
    if protected is None:
        return torch.ones(1, len(x), dtype=torch.bool, device=x.device)
    return ~mask_of(protected, x, "protected")[None]


def window_ids(ids: Tensor, x: Tensor) -> Tensor:
    """Checks the windows of an instance's tokens.

    Args:
        ids: [n] int64.
        x: [n, ...], for the number of tokens and the device.

    Returns:
        The windows, [1, n] int64.

    Raises:
        ValueError: for another shape or dtype.
    """
    if ids.shape != x.shape[:1] or ids.dtype != torch.int64:
        raise ValueError(f"ids must be [{len(x)}] int64, the window of each token, got {list(ids.shape)} {ids.dtype}")
    return ids.to(x.device)[None]


def check_part_of_count(part: float, name: str) -> None:
    """Refuses what is no part of a count.

    Args:
        part: the value.
        name: of the argument.

    Raises:
        ValueError: for a part outside 0 .. 1.
    """
    if not 0 <= part <= 1:
        raise ValueError(f"{name}={part!r} must be in 0 .. 1: the part of count that is chosen so")


def mask_of(mask: Tensor, x: Tensor, name: str) -> Tensor:
    """Checks a mask.

    Args:
        mask: [n] bool.
        x: [n, ...], for the number of tokens and the device.
        name: of the argument.

    Returns:
        The mask, [n] bool.

    Raises:
        ValueError: for another shape or dtype.
    """
    if mask.shape != x.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be [{len(x)}] bool, one a row of x, got {list(mask.shape)} {mask.dtype}")
    return mask.to(x.device)


def column(values: Tensor, x: Tensor, name: str) -> Tensor:
    """Checks numbers, one a token.

    Args:
        values: [n].
        x: [n, ...], for the number of tokens and the device.
        name: of the argument.

    Returns:
        The numbers, [1, n].

    Raises:
        ValueError: for another shape or dtype, and for NaN and infinity.
    """
    if values.shape != x.shape[:1] or not values.is_floating_point():
        raise ValueError(
            f"{name} must be [{len(x)}] of a floating-point dtype, one a row of x, got {list(values.shape)} {values.dtype}"
        )
    _finite(values, name)
    return values.to(x.device)[None]


def _finite(values: Tensor, name: str) -> None:
    """Refuses NaN and infinity."""
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity: check what computed it; half precision overflows at 65,504")


def count_of(x: Tensor, count: int, name: str = "count") -> tuple[Tensor, int]:
    """Checks a number of tokens.

    Args:
        x: for the device.
        count: the number.
        name: of the argument.

    Returns:
        The number as [1] int64, and as it is.

    Raises:
        ValueError: for a negative number, and for what is no whole one.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"{name}={count!r} must be a whole number of tokens, 0 or more")
    return torch.tensor([count], device=x.device), count


def indices(keep: Tensor, candidates: Tensor) -> Tensor:
    """The indices of what stays.

    Args:
        keep: [1, n] bool, the candidates that stay.
        candidates: [1, n] bool; the others are protected and stay.

    Returns:
        The indices, ascending, int64.
    """
    return (keep | ~candidates)[0].nonzero().squeeze(1)
