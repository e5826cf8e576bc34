"""Token choice: which tokens of an instance stay, by how they differ.

All functions take padded batches, padding behind the tokens. They return `keep` [batch, n] bool, which is true for at most
`counts` of an instance's candidates, and for no other token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import precision
from ..core.checks import is_traced
from .similarity import cosine, decides, first_best, order_by_score, ranks, unit

_INFINITY = float("inf")


@decides
def max_min(features: Tensor, candidates: Tensor, counts: Tensor, most: int | None = None) -> Tensor:
    """Max-min diversity by greedy choice, as in DivPrune (arXiv 2503.02175).

    The distance of two tokens is 1 - cosine. The first choice is the token whose nearest other one is farthest; each further
    one is the token whose nearest chosen one is farthest. It costs n^2 * dim MACs for n tokens.

    Args:
        features: [batch, n, dim]; DivPrune has the projected image tokens.
        candidates: [batch, n] bool.
        counts: [batch] int64, how many stay. Larger numbers than there are candidates mean all.
        most: the largest of `counts`, where the caller knows it; without it an accelerator tries n choices.

    Returns:
        `keep`, [batch, n] bool.
    """
    keep = torch.zeros_like(candidates)
    distance = 1 - cosine(features, candidates)
    itself = torch.eye(candidates.shape[1], dtype=torch.bool, device=candidates.device)
    margin = distance.masked_fill(itself | ~candidates[:, None, :], _INFINITY)
    margin = margin.amin(2) if candidates.shape[1] else margin.sum(2)
    for step in range(_choices(candidates, counts, most)):
        chosen = _choose(margin, candidates & ~keep)
        keep = _add(keep, chosen, candidates, counts, step)
        reached = distance.gather(1, chosen[..., None].expand(-1, -1, distance.shape[2])).squeeze(1)
        margin = reached if step == 0 else torch.minimum(margin, reached)
    return keep


@decides
def dpp(features: Tensor, candidates: Tensor, counts: Tensor, scores: Tensor, most: int | None = None) -> Tensor:
    """Greedy MAP of a determinantal point process, as in CDPruner (arXiv 2506.10967).

    The kernel is L_ij = r_i r_j cos_ij, where r are the scores of the instance's candidates scaled to 0 .. 1, plus 1e-6.
    Each choice is the token that makes the determinant of the chosen ones' kernel largest, by its Cholesky factor (Chen et
    al., arXiv 1709.05135, algorithm 1). It computes in the widest float of the device, and costs n^2 * dim + n * counts^2 MACs.

    A token in the span of the chosen ones adds nothing to the determinant but rounding. When all others are, as in an image of
    few different patches, the rest of `counts` are the tokens of largest score, ties by position. The reference scales scores
    over the whole batch and chooses by rounding there.

    Args:
        features: [batch, n, dim]; CDPruner has the projected image tokens.
        candidates: [batch, n] bool.
        counts: [batch] int64, how many stay. Larger numbers than there are candidates mean all.
        scores: [batch, n], larger is more relevant.
        most: the largest of `counts`, where the caller knows it; without it an accelerator tries n choices.

    Returns:
        `keep`, [batch, n] bool.
    """
    keep = torch.zeros_like(candidates)
    choices = _choices(candidates, counts, most)
    if not choices:
        return keep
    dtype = precision.widest_float(candidates.device)
    relevance = _relevance(scores, candidates).to(dtype)
    x = unit(features, candidates, dtype) * relevance[..., None]
    # by what part of its own kernel entry a token may stand out and still count as spanned
    spanned_below = (1e-8 if dtype == torch.float64 else 1e-4) * x.square().sum(2)

    # below any gain, and in the order of their scores
    filled = -1.0 - ranks(order_by_score(scores, candidates)).to(dtype)
    gain = x.square().sum(2)
    factor = x.new_zeros(len(x), choices, x.shape[1])
    for step in range(choices):
        spanned = gain <= spanned_below
        chosen = _choose(torch.where(spanned, filled, gain), candidates & ~keep, relative=True)
        keep = _add(keep, chosen, candidates, counts, step)
        row = (x @ x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2])).mT).squeeze(2)
        previous = factor[:, :step]
        at = previous.gather(2, chosen[:, None].expand(-1, step, -1))
        row = row - (at * previous).sum(1)
        # a spanned token changes nothing
        pivot = gain.masked_fill(spanned, _INFINITY).gather(1, chosen).sqrt()
        factor[:, step] = row / pivot
        gain = gain - factor[:, step].square()
    return keep


def _relevance(scores: Tensor, candidates: Tensor) -> Tensor:
    """Scores of each instance's candidates scaled to 0 .. 1, plus 1e-6: [batch, n]. All are 1e-6 where they are equal."""
    scores = precision.single(scores)
    equal = precision.equalize(scores.masked_fill(~candidates, -_INFINITY))
    low = equal.masked_fill(~candidates, _INFINITY).amin(1, keepdim=True)
    high = equal.amax(1, keepdim=True)
    width = (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
    return ((equal - low) / width).masked_fill(~candidates, 0.0) + 1e-6


def _choices(candidates: Tensor, counts: Tensor, most: int | None) -> int:
    """How many choices to make: the largest count where it is known without a host synchronization, else all."""
    n = candidates.shape[1]
    if most is None and counts.device.type == "cpu" and not is_traced() and counts.numel():
        most = int(counts.max())
    return n if most is None else min(max(most, 0), n)


def _choose(values: Tensor, left: Tensor, relative: bool = False) -> Tensor:
    """The slot of the largest value of those left, [batch, 1] int64; `relative` tolerances are for values of any scale."""
    values = values.masked_fill(~left, -_INFINITY)
    if not relative:
        return first_best(values)[1][:, None]
    within = precision.ROUNDING * values.amax(1, keepdim=True).abs()
    # infinity where none is left
    return first_best(values, within.nan_to_num(posinf=0.0))[1][:, None]


def _add(keep: Tensor, chosen: Tensor, candidates: Tensor, counts: Tensor, step: int) -> Tensor:
    """`keep` with the chosen slots [batch, 1], in instances that have a candidate left and want another."""
    wanted = (step < counts) & (step < candidates.sum(1))
    return keep.scatter(1, chosen, keep.gather(1, chosen) | wanted[:, None])
