"""Token choice by score and by position: sampling of a distribution, quotas of windows, even steps, and outliers.

All functions take padded batches, padding behind the tokens. Those that return `keep` [batch, n] bool keep at most `counts` of
an instance's candidates, and no other token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import precision
from .choosing import most_of, part_of
from .similarity import ROUNDING, decides, order_by_score, positions, put_last, ranks

_INFINITY = float("inf")


@decides
def sample_cdf(scores: Tensor, candidates: Tensor, counts: Tensor, most: int | None = None) -> Tensor:
    """Samples tokens by inverse transform, as in ATS (arXiv 2111.15667).

    Scores in ascending order, divided by their sum, have a cumulative distribution. `counts` points in equal steps from its
    first value to 1 each choose the token of the nearest value, the lower one of two. Several points may choose one token, so
    that fewer stay. A single point is halfway; where `counts` are no fewer than the candidates, all stay.

    Args:
        scores: [batch, n]; negative ones count as zero. ATS has attention of the class token times the length of the value.
        candidates: [batch, n] bool.
        counts: [batch] int64, the number of points.
        most: the largest of `counts`, where the caller knows it; without it an accelerator computes n points.

    Returns:
        `keep`, [batch, n] bool.
    """
    batch, n = candidates.shape
    points, total = most_of(candidates, counts, most), candidates.sum(1, keepdim=True)
    if not points:
        return torch.zeros_like(candidates)
    dtype = precision.widest_float(scores.device)
    order = order_by_score(scores, candidates, descending=False)
    weight = precision.single(scores).masked_fill(~candidates, 0.0).clamp(min=0.0)
    weight = precision.equalize(weight).masked_fill(~candidates, 0.0)
    # where all are zero, all count alike
    weight = torch.where((weight > 0).any(1, keepdim=True), weight, candidates.to(weight.dtype))
    weight = weight.gather(1, order).to(dtype)
    cumulative = weight.cumsum(1) / weight.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    cumulative = cumulative.masked_fill(positions(order) >= total, 2.0)

    step = torch.arange(points, device=scores.device)[None]
    # a single point is halfway
    share = torch.where(counts[:, None] > 1, step / (counts[:, None] - 1).clamp(min=1), 0.5).to(dtype)
    first = cumulative[:, :1]
    point = first + (1 - first) * share
    above = torch.searchsorted(cumulative, point.clamp(max=1.0)).minimum((total - 1).clamp(min=0))
    below = (above - 1).clamp(min=0)
    is_below = point - cumulative.gather(1, below) <= cumulative.gather(1, above) - point + ROUNDING
    chosen = order.gather(1, torch.where(is_below, below, above))

    # one more column, for points that an instance does not have
    chosen = torch.where((step < counts[:, None]) & (total > 0), chosen, n)
    keep = candidates.new_zeros(batch, n + 1).scatter(1, chosen, True)[:, :n]
    return torch.where(counts[:, None] >= total, candidates, keep)


@decides
def windows(
    scores: Tensor,
    candidates: Tensor,
    counts: Tensor,
    ids: Tensor,
    local_scores: Tensor | None = None,
    local: float = 0.5,
) -> Tensor:
    """Chooses a part of the tokens by a quota for each window of a grid, the others by score, as in VScan (arXiv 2505.22654).

    Of `counts` tokens, the part `local` is divided equally among the windows that have candidates; each keeps those of largest
    local score. What cannot be divided, and what a window lacks, joins the others: the tokens of largest score anywhere.
    So exactly `counts` stay; the reference loses what cannot be divided.

    Args:
        scores: [batch, n], larger is kept longer; VScan has the class token's attention in the last layer but one.
        candidates: [batch, n] bool.
        counts: [batch] int64, how many stay. Larger numbers than there are candidates mean all.
        ids: [batch, n] int64, the window of each token, such as `grid_windows` gives.
        local_scores: [batch, n], the scores inside a window; VScan has those of an early layer. None for `scores`.
        local: the part that is chosen by window, in 0 .. 1.

    Returns:
        `keep`, [batch, n] bool.
    """
    if not candidates.shape[1]:
        return candidates.clone()
    counts = torch.minimum(counts, candidates.sum(1))
    order = order_by_score(scores if local_scores is None else local_scores, candidates)
    # by window, and within it by score; others last
    order = order.gather(1, put_last(ids, candidates).gather(1, order).argsort(dim=1, stable=True))
    window, is_candidate = ids.gather(1, order), candidates.gather(1, order)
    begins = torch.ones_like(is_candidate)
    begins[:, 1:] = (window[:, 1:] != window[:, :-1]) | (is_candidate[:, 1:] != is_candidate[:, :-1])
    rank = positions(order) - torch.where(begins, positions(order), 0).cummax(1).values

    quota = part_of(counts, local) // (begins & is_candidate).sum(1).clamp(min=1)
    keep = torch.zeros_like(candidates).scatter(1, order, is_candidate & (rank < quota[:, None]))
    others = candidates & ~keep
    rank = ranks(order_by_score(scores, others))
    return keep | (others & (rank < (counts - keep.sum(1))[:, None]))


@decides
def spread_uniform(candidates: Tensor, counts: Tensor) -> Tensor:
    """Chooses every so many-th candidate, as the contextual targets of VisionZip (arXiv 2412.04467).

    The step is candidates // counts, one at least; the first `counts` of these stay.

    Args:
        candidates: [batch, n] bool.
        counts: [batch] int64, how many stay. Larger numbers than there are candidates mean all.

    Returns:
        `keep`, [batch, n] bool.
    """
    counts = counts[:, None]
    step = (candidates.sum(1, keepdim=True) // counts.clamp(min=1)).clamp(min=1)
    rank = candidates.cumsum(1) - 1
    return candidates & (rank % step == 0) & (rank // step < counts)


@decides
def outliers(scores: Tensor, candidates: Tensor, multiplier: float = 1.5) -> Tensor:
    """The number of tokens of outlying score, by which LLaVA-PruMerge (arXiv 2403.15388) chooses how many stay.

    Outliers are above Q3 + multiplier (Q3 - Q1), where Q1 and Q3 are the quartiles of an instance's scores, interpolated
    linearly. The reference takes quartiles over the whole batch.

    Args:
        scores: [batch, n].
        candidates: [batch, n] bool.
        multiplier: how many quartile ranges above the third quartile outliers begin.

    Returns:
        The counts, [batch] int64.
    """
    if not candidates.shape[1]:
        return candidates.sum(1)
    equal = precision.equalize(precision.single(scores).masked_fill(~candidates, -_INFINITY))
    ordered = equal.masked_fill(~candidates, _INFINITY).sort(1).values
    last = (candidates.sum(1, keepdim=True) - 1).clamp(min=0)
    q1, q3 = (_quantile(ordered, last, part) for part in (0.25, 0.75))
    limit = q3 + multiplier * (q3 - q1)
    within = ROUNDING * torch.maximum(q3.abs(), limit.abs())
    return (candidates & (equal - limit > within)).sum(1)


def grid_windows(height: int, width: int, size: int, device: torch.device | None = None) -> Tensor:
    """The windows of a grid of tokens in rows.

    Args:
        height: the rows of the grid.
        width: the columns of the grid.
        size: rows and columns of a window. Windows at the right and lower end may be smaller.
        device: where to make them.

    Returns:
        The window of each token, [height * width] int64, from 0.
    """
    row = torch.arange(height, device=device) // size
    column = torch.arange(width, device=device) // size
    return (row[:, None] * -(-width // size) + column).flatten()


def _quantile(ordered: Tensor, last: Tensor, part: float) -> Tensor:
    """The quantile of the first `last` + 1 [batch, 1] values of ascending rows, [batch, 1], interpolated linearly."""
    place = last * part
    low, high = place.floor().long(), place.ceil().long()
    return torch.lerp(ordered.gather(1, low), ordered.gather(1, high), (place - low).to(ordered.dtype))
