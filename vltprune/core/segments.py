"""Segment operations: sums, softmax and ranks over the tokens of each instance, as functions of values [total, ...].

They compute on the padded batch, which is a view where all instances are equally long. They are meant for scores and
statistics, with few numbers per token: token contents are never padded on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import precision
from .layout import Layout


def pad(values: Tensor, layout: Layout, fill: float = 0.0) -> Tensor:
    """Pads values per token to the longest instance.

    Args:
        values: [total, ...].
        layout: their instances.
        fill: the value where an instance has no token.

    Returns:
        The padded values, [batch, longest, ...]; a view where the layout is uniform.
    """
    shape = (layout.batch, layout.longest, *values.shape[1:])
    if layout.is_uniform:
        return values.view(shape)
    padded = values.new_full((layout.batch * layout.longest, *values.shape[1:]), fill)
    return padded.index_copy(0, layout.padded_index, values).view(shape)


def unpad(padded: Tensor, layout: Layout) -> Tensor:
    """Removes the padding of values: the inverse of `pad`.

    Args:
        padded: [batch, longest, ...].
        layout: their instances.

    Returns:
        The values, [total, ...]; a view where the layout is uniform.
    """
    rows = padded.flatten(0, 1)
    return rows if layout.is_uniform else rows.index_select(0, layout.padded_index)


def sum(values: Tensor, layout: Layout) -> Tensor:
    """Sums values over the tokens of each instance.

    Args:
        values: [total, ...]. Half precision is summed in single, because it overflows at 65,504.
        layout: their instances.

    Returns:
        The sums, [batch, ...].
    """
    return pad(precision.single(values), layout).sum(1)


def count(mask: Tensor, layout: Layout) -> Tensor:
    """Counts the true entries of each instance.

    Args:
        mask: [total] bool.
        layout: the instances of its entries.

    Returns:
        The counts, [batch] int64.
    """
    return pad(mask, layout, False).sum(1)


def softmax(values: Tensor, layout: Layout, where: Tensor) -> Tensor:
    """Softmax over the tokens of each instance.

    Args:
        values: logits, [total, ...].
        layout: their instances.
        where: [total] bool, the tokens that take part. The others get zero.

    Returns:
        The weights, [total, ...].
    """
    hides = _like(~where, values)
    weight = torch.softmax(_hidden(values, layout, hides), 1)
    return unpad(weight, layout).to(values.dtype).masked_fill(hides, 0.0)


def sparsemax(values: Tensor, layout: Layout, where: Tensor) -> Tensor:
    """Sparsemax over the tokens of each instance (Martins and Astudillo, arXiv 1602.02068, algorithm 1).

    Args:
        values, layout, where: as in `softmax`.

    Returns:
        The weights, [total, ...].
    """
    hides = _like(~where, values)
    hidden = _hidden(values, layout, hides)
    is_candidate = hidden > _LOWEST
    # as softmax does: large sums lose digits
    hidden = torch.where(is_candidate, hidden - hidden.amax(1, keepdim=True), _LOWEST)
    ordered = hidden.sort(1, descending=True).values
    index = torch.arange(1, layout.longest + 1, device=values.device).view(1, -1, *[1] * (values.dim() - 1))
    cumulative = ordered.masked_fill(ordered <= _LOWEST, 0.0).cumsum(1) - 1

    support = (ordered * index > cumulative) & (ordered > _LOWEST)
    size = support.sum(1, keepdim=True).clamp(min=1)
    threshold = cumulative.gather(1, size - 1) / size
    weight = unpad((hidden - threshold).clamp(min=0.0), layout).to(values.dtype)
    return weight.masked_fill(hides, 0.0)


def rank(scores: Tensor, layout: Layout) -> Tensor:
    """Ranks the scores of each instance.

    Args:
        scores: [total].
        layout: their instances.

    Returns:
        The ranks, [total] int64: 0 for the largest score of an instance, ties by position.
    """
    order = pad(scores, layout, float("-inf")).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(layout.longest, device=scores.device).expand_as(order)
    return unpad(torch.empty_like(order).scatter_(1, order, ranks), layout)


def rank_apart(scores: Tensor, layout: Layout, apart: Tensor) -> tuple[Tensor, Tensor]:
    """Makes scores of an instance that are equal within rounding exactly equal, and sorts them, some tokens left out.

    Args:
        scores: [total].
        layout: their instances.
        apart: [total] bool, tokens whose scores are left as they are, and which come last.

    Returns:
        The scores, [total], and the slots of each instance's tokens from the largest score to the smallest, ties by position,
        [batch, longest] int64.
    """
    hidden = pad(scores.masked_fill(apart, float("-inf")), layout, float("-inf"))
    ranked, order = precision.rank(hidden)
    return scores if ranked is hidden else torch.where(apart, scores, unpad(ranked, layout)), order


def equalize(scores: Tensor, layout: Layout, within: float = precision.ROUNDING) -> Tensor:
    """Makes scores of an instance that are equal within rounding exactly equal, as `precision.equalize` does.

    Args:
        scores: [total].
        layout: their instances.
        within: the relative tolerance.

    Returns:
        The scores, [total].
    """
    return unpad(precision.equalize(pad(scores, layout, float("-inf")), within), layout)


def weighted_sum(weight: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Sums the token contents of each instance with k sets of weights.

    Args:
        weight: [total, k].
        values: the contents, [total, dim].
        layout: their instances.

    Returns:
        The sums, [batch, k, dim].
    """
    if layout.is_uniform or values.device.type != "cpu":  # elsewhere a call for each instance costs more than padding
        return pad(weight, layout).transpose(1, 2) @ pad(values, layout)
    parts = zip(weight.split(layout.lengths), values.split(layout.lengths), strict=True)
    return torch.stack([w.t() @ v for w, v in parts])


_LOWEST = -1e30  # marks tokens that take no part; finite, so that an instance without candidates gives no NaN


def _hidden(values: Tensor, layout: Layout, hides: Tensor) -> Tensor:
    """The padded values, in single precision at least, and the lowest number where no candidate is, where `hides` holds."""
    return pad(precision.single(values).masked_fill(hides, _LOWEST), layout, _LOWEST)


def _like(mask: Tensor, values: Tensor) -> Tensor:
    """mask [total] made broadcastable to values [total, ...]."""
    return mask.view(-1, *[1] * (values.dim() - 1))
