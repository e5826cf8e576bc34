"""Token matching: which tokens of an instance merge, and into which of those that stay.

All functions take padded batches, padding behind the tokens. They return `keep` [batch, n] bool, true for candidates alone,
and `match` [batch, n] int64: for a candidate that goes, the slot of the kept one that it merges into; else the own slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .similarity import (
    ROUNDING,
    cosine,
    decides,
    first_best,
    order_by_similarity,
    positions,
    ranks,
    unit,
)

_INFINITY = float("inf")


@decides
def bipartite(
    features: Tensor,
    candidates: Tensor,
    r: Tensor | None = None,
    least_similarity: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching of ToMe (arXiv 2210.09461, section 3), or above a threshold, as in DyMU (arXiv 2504.17040).

    Candidates are in turn in A and in B. Each token of A has an edge to its most similar token of B; the `r` most similar
    edges merge. As in ToMe, a token behind one protected token (a class token) is in B, and behind two in A.

    DyMU's thresholds are of one instance each: an instance merges all its edges of `least_similarity` at least.

    Args:
        features: [batch, n, dim]; ToMe has the mean of the keys over heads.
        candidates: [batch, n] bool, false for padding and for protected tokens, which are neither sources nor destinations.
        r: [batch] int64, how many tokens go; half of the candidates at most. None for all above the threshold.
        least_similarity: the cosine of an edge that merges, a number or [batch]. None for any.

    Returns:
        `keep` [batch, n] bool and `match` [batch, n] int64.

    Raises:
        ValueError: without `r` and without `least_similarity`.
    """
    if r is None and least_similarity is None:
        raise ValueError(
            "bipartite needs r, how many tokens merge, or least_similarity, the cosine from which they merge"
        )
    if not candidates.shape[1]:
        return candidates.clone(), _own(candidates)
    before = candidates.int().argmax(1, keepdim=True)
    a, b = _halves(candidates.cumsum(1) - 1 + before % 2, candidates)
    similarity, partner = _edges(unit(features, candidates), a, b)

    merges = similarity > -_INFINITY
    if least_similarity is not None:
        least = torch.as_tensor(least_similarity, dtype=similarity.dtype, device=similarity.device)
        merges = merges & (similarity >= least.reshape(-1, 1) - ROUNDING)
    if r is not None:
        most = torch.minimum(r, candidates.sum(1) // 2)
        merges = merges & (ranks(order_by_similarity(similarity, merges)) < most[:, None])
    return _merged(candidates, a, partner, merges)


@decides
def nearest(features: Tensor, candidates: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Matches each removed candidate to its most similar kept candidate, by cosine.

    This is how VisionZip (arXiv 2412.04467), VScan (arXiv 2505.22654) and DiffRate (arXiv 2305.17997) merge.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool. Kept tokens that are no candidates get none.
        keep: [batch, n] bool, the tokens that stay.

    Returns:
        `keep` among the candidates, and `match` [batch, n] int64; the own slot where an instance keeps no candidate.
    """
    keep = keep & candidates
    if not candidates.shape[1]:
        return keep, _own(candidates)
    similarity = cosine(features, candidates).masked_fill(~keep[:, None, :], -_INFINITY)
    largest, best = first_best(similarity)
    return keep, torch.where(candidates & ~keep & (largest > -_INFINITY), best, _own(candidates))


def _own(candidates: Tensor) -> Tensor:
    """Each token matched to itself: [batch, n] int64."""
    return positions(candidates).expand_as(candidates).clone()


def _halves(order: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """The slots at even and at odd places of a sequence, [batch, m] int64 each, n where a place is empty.

    Each instance has as many places as are needed: `order` [batch, n] int64 is the place of each `taken` token.
    """
    batch, n = order.shape
    m = n // 2 + 1
    # the last place is for tokens that are not taken
    place = torch.where(taken, order, 2 * m)
    sequence = order.new_full((batch, 2 * m + 1), n).scatter_(1, place, positions(order).expand_as(order))
    sequence[:, -1] = n
    return sequence[:, 0 : 2 * m : 2], sequence[:, 1 : 2 * m : 2]


def _edges(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The best edge of each token of A: its cosine [batch, m], minus infinity where none is, and the slot of its partner."""
    n = x.shape[1]
    rows = [x.gather(1, slots.clamp(max=n - 1)[..., None].expand(-1, -1, x.shape[2])) for slots in (a, b)]
    similarity = (rows[0] @ rows[1].mT).masked_fill(((a == n)[:, :, None]) | (b == n)[:, None, :], -_INFINITY)
    largest, best = first_best(similarity)
    return largest, b.gather(1, best)


def _merged(candidates: Tensor, a: Tensor, partner: Tensor, merges: Tensor) -> tuple[Tensor, Tensor]:
    """`keep` and `match` when the tokens of slots `a` where `merges` merge into their partners."""
    n = candidates.shape[1]
    slot = torch.where(merges, a, n)
    # one more column, for the places that do not merge
    goes = torch.zeros_like(candidates[:, :1]).expand(-1, n + 1).scatter(1, slot, merges)[:, :n]
    own = positions(candidates.new_empty(len(candidates), n + 1)).expand(len(candidates), -1)
    match = own.scatter(1, slot, torch.where(merges, partner, n))[:, :n]
    return candidates & ~goes, match
