"""Reductions, softmax and ranks over the tokens of each instance. Pure functions on [total, ...], nothing else.

All of them look at the values as a padded batch, which for a uniform layout is a view. They are meant for scores and
statistics, a few numbers a token: token contents are never padded on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import precision
from .tokens import Layout


def pad(values: Tensor, layout: Layout, fill: float = 0.0) -> Tensor:
    """values [total, ...] -> [batch, longest, ...], `fill` where an instance has no token."""
    shape = (layout.batch, layout.longest, *values.shape[1:])
    if layout.is_uniform:
        return values.reshape(shape)
    padded = values.new_full((layout.batch * layout.longest, *values.shape[1:]), fill)
    return padded.index_copy(0, layout.padded_index, values).view(shape)


def unpad(padded: Tensor, layout: Layout) -> Tensor:
    """The inverse of `pad`: [batch, longest, ...] -> [total, ...]."""
    rows = padded.reshape(layout.batch * layout.longest, *padded.shape[2:])
    return rows if layout.is_uniform else rows.index_select(0, layout.padded_index)


def sum(values: Tensor, layout: Layout) -> Tensor:
    """[total, ...] -> [batch, ...]; of half precision in single, since half overflows at 65,504."""
    return pad(precision.single(values), layout).sum(1)


def count(mask: Tensor, layout: Layout) -> Tensor:
    """How many tokens of each instance: mask [total] bool -> [batch] int64."""
    return pad(mask.long(), layout, 0).sum(1)


def softmax(values: Tensor, layout: Layout, where: Tensor) -> Tensor:
    """Softmax over the tokens of each instance where `where` [total] bool holds, zero elsewhere; [total, ...]."""
    weight = torch.softmax(_hidden(values, layout, where), 1)
    return unpad(weight, layout).to(values.dtype).masked_fill(_like(~where, values), 0.0)


def sparsemax(values: Tensor, layout: Layout, where: Tensor) -> Tensor:
    """Sparsemax (Martins and Astudillo, arXiv 1602.02068, algorithm 1) over the tokens of each instance; [total, ...]."""
    hidden = _hidden(values, layout, where)
    there = hidden > _LOWEST
    hidden = torch.where(
        there, hidden - hidden.amax(1, keepdim=True), _LOWEST
    )  # as softmax does: large sums lose digits
    ordered = hidden.sort(1, descending=True).values
    place = torch.arange(1, layout.longest + 1, device=values.device).view(1, -1, *[1] * (values.dim() - 1))
    cumulative = ordered.masked_fill(ordered <= _LOWEST, 0.0).cumsum(1) - 1

    support = (ordered * place > cumulative) & (ordered > _LOWEST)
    size = support.sum(1, keepdim=True).clamp(min=1)
    threshold = cumulative.gather(1, size - 1) / size
    weight = unpad((hidden - threshold).clamp(min=0.0), layout).to(values.dtype)
    return weight.masked_fill(_like(~where, values), 0.0)


def rank(scores: Tensor, layout: Layout) -> Tensor:
    """0 for the largest score of each instance, ties by place: scores [total] -> [total] int64."""
    order = pad(scores, layout, float("-inf")).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(layout.longest, device=scores.device).expand_as(order)
    return unpad(torch.empty_like(order).scatter_(1, order, places), layout)


def equalize(scores: Tensor, layout: Layout, within: float = precision.ROUNDING) -> Tensor:
    """Scores in which those of one instance that are equal within rounding are equal: [total] -> [total]."""
    return unpad(precision.equalize(pad(scores, layout, float("-inf")), within), layout)


def weighted_sum(weight: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Weighted sums of token contents: weight [total, k], values [total, dim] -> [batch, k, dim]."""
    if layout.is_uniform or values.device.type != "cpu":  # elsewhere a call for each instance costs more than padding
        return pad(weight, layout).transpose(1, 2) @ pad(values, layout)
    parts = zip(weight.split(layout.lengths), values.split(layout.lengths), strict=True)
    return torch.stack([w.t() @ v for w, v in parts])


_LOWEST = -1e30  # stands for "not there"; finite, so that an instance without candidates gives no NaN


def _hidden(values: Tensor, layout: Layout, where: Tensor) -> Tensor:
    """The padded values, lowest where no candidate is; of half precision in single, which has room for what is lowest."""
    values = precision.single(values)
    return pad(values.masked_fill(_like(~where, values), _LOWEST), layout, _LOWEST)


def _like(mask: Tensor, values: Tensor) -> Tensor:
    """mask [total] made broadcastable to values [total, ...]."""
    return mask.view(-1, *[1] * (values.dim() - 1))
