"""Cosine similarity of tokens and orders by it, for padded batches: values within rounding are equal, ties go by position.

Products of other shapes differ in their last digits. What is decided here is the same for an instance alone and in a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from ...core import precision

# absolute: within what two cosines count as equal
ROUNDING = precision.ROUNDING
# absolute: what products of equal features leave in doubt. Nearer ties are decided as a published algorithm decides them
NEAR = 2e-7
_INFINITY = float("inf")

P = ParamSpec("P")
R = TypeVar("R")


def decides(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Makes a function of tensors compute without gradients and without autocast."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), precision.without_autocast(first.device):
            return function(first, *args, **kwargs)

    return wrapped


def unit(features: Tensor, candidates: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Divides features by their length, in single precision at least.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool. Other rows become zero, whatever they hold.
        dtype: the least dtype of the result.

    Returns:
        The unit vectors, [batch, n, dim]. Zero vectors stay zero.
    """
    x = features.to(torch.promote_types(features.dtype, dtype)).masked_fill(~candidates[..., None], 0.0)
    # by the largest entry first: squares of large and of small entries leave the range of single precision
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    x = x / largest.clamp(min=torch.finfo(x.dtype).tiny)
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1.0)


def cosine(features: Tensor, candidates: Tensor) -> Tensor:
    """Cosine similarities of all pairs of an instance.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool.

    Returns:
        The similarities, [batch, n, n]; zero where either is no candidate or has length zero.
    """
    x = unit(features, candidates)
    return x @ x.mT


def first_best(values: Tensor, within: Tensor | float = ROUNDING) -> tuple[Tensor, Tensor]:
    """The position of the largest value of each row; of several that are equal within rounding, the first.

    Args:
        values: [..., n], n at least 1, minus infinity where none may be taken.
        within: the absolute tolerance, broadcastable to [..., 1].

    Returns:
        The largest value [...] and the position [...] int64.
    """
    largest = values.amax(-1, keepdim=True)
    # int: not every device has argmax of bool. Of equal values argmax gives the first
    return largest.squeeze(-1), (values >= largest - within).int().argmax(-1)


def order_by_similarity(values: Tensor, among: Tensor, within: float = ROUNDING) -> Tensor:
    """Slots in descending order of a similarity or of a sum of few; neighbors within rounding tie, and ties go by position.

    Args:
        values: [batch, n].
        among: [batch, n] bool. The others come last.
        within: the absolute tolerance.

    Returns:
        The order, [batch, n] int64.
    """
    ordered, order = values.masked_fill(~among, -_INFINITY).sort(dim=1, descending=True, stable=True)
    apart = ordered[:, :-1] - ordered[:, 1:] > within
    group = torch.zeros_like(order)
    group[:, 1:] = apart.cumsum(1)
    return torch.empty_like(order).scatter_(1, order, group).argsort(dim=1, stable=True)


def order_by_score(scores: Tensor, among: Tensor, descending: bool = True) -> Tensor:
    """Slots in order of scores of any scale; those that `precision.equalize` makes equal go by position.

    Args:
        scores: [batch, n].
        among: [batch, n] bool. The others come last.
        descending: whether the largest comes first.

    Returns:
        The order, [batch, n] int64.
    """
    equal = precision.equalize(precision.single(scores).masked_fill(~among, -_INFINITY))
    key = (-equal if descending else equal).masked_fill(~among, _INFINITY)
    return key.argsort(dim=1, stable=True)


def scaled(scores: Tensor, candidates: Tensor) -> Tensor:
    """Scales scores to 0 .. 1 over the candidates of each instance.

    Args:
        scores: [batch, n], of any scale.
        candidates: [batch, n] bool.

    Returns:
        The scaled scores, [batch, n], in single precision at least; 0 where all are equal within rounding, and for others than
        candidates.
    """
    equal = precision.equalize(precision.single(scores).masked_fill(~candidates, -_INFINITY))
    low = equal.masked_fill(~candidates, _INFINITY).amin(1, keepdim=True)
    width = (equal.amax(1, keepdim=True) - low).clamp(min=torch.finfo(equal.dtype).tiny)
    return ((equal - low) / width).masked_fill(~candidates, 0.0)


def put_last(values: Tensor, counted: Tensor) -> Tensor:
    """Whole numbers, with one above the largest of the row in place of those that do not count.

    The largest integer of 64 bits would be negative in OpenVINO, which has 32.

    Args:
        values: [..., n] int64.
        counted: bool, of a shape that broadcasts with `values`.

    Returns:
        Values of the broadcast shape.
    """
    return torch.where(counted, values, values.amax(-1, keepdim=True) + 1)


def ranks(order: Tensor) -> Tensor:
    """The inverse of an order: the rank of each slot, [batch, n] int64 -> [batch, n] int64."""
    return torch.empty_like(order).scatter_(1, order, positions(order).expand_as(order))


def positions(rows: Tensor) -> Tensor:
    """The numbers 0 .. n - 1 on the device of rows [batch, n], [1, n] int64."""
    return torch.arange(rows.shape[1], device=rows.device)[None]
