"""Clustering of the tokens of an instance by density peaks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import precision
from .similarity import decides, first_best, order_by_score, positions, ranks

_INFINITY = float("inf")


@decides
def density_peaks(features: Tensor, candidates: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Clusters tokens by DPC-kNN (Du et al., 2016), as SparseVLM does (arXiv 2410.04417, section 3.3).

    With Euclidean distances divided by sqrt(dim), the density of a token is exp(-mean of the squares of the k smallest ones,
    its own included), k the number of clusters. Centers are the tokens of largest density times distance to the nearest
    denser token; of the densest, times the largest distance. Each token belongs to the nearest center.

    **Departs**: of equally dense tokens the first counts as denser; the reference adds random noise.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool, false for padding and for tokens that are not clustered.
        counts: [batch] int64, the number of clusters, at most that of candidates.

    Returns:
        The centers [batch, n] bool, and of each candidate the slot of its center, [batch, n] int64; else the own slot.
    """
    own = positions(candidates).expand_as(candidates)
    if not candidates.shape[1]:
        return candidates.clone(), own
    x = precision.single(features).masked_fill(~candidates[..., None], 0.0)
    # pair by pair, so that it does not depend on batch mates
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / max(x.shape[2], 1) ** 0.5
    both = candidates[:, :, None] & candidates[:, None]
    smallest = distance.masked_fill(~both, _INFINITY).sort(2).values
    nearest = own[:, None] < counts[:, None, None]
    mean = smallest.square().masked_fill(~nearest | smallest.isinf(), 0.0).sum(2) / counts.clamp(min=1)[:, None]

    density = precision.equalize((-mean).exp().masked_fill(~candidates, -_INFINITY))
    first = own[:, None] < own[:, :, None]
    denser = (density[:, None] > density[:, :, None]) | ((density[:, None] == density[:, :, None]) & first)
    apart = distance.masked_fill(~(denser & both), _INFINITY).amin(2)
    largest = distance.masked_fill(~both, 0.0).amax((1, 2))[:, None]
    score = torch.where(apart.isinf(), largest, apart) * density.clamp(min=0)
    centers = candidates & (ranks(order_by_score(score, candidates)) < counts[:, None])

    to_center = (-distance).masked_fill(~centers[:, None], -_INFINITY)
    _, home = first_best(to_center, precision.ROUNDING * largest[..., None])
    return centers, torch.where(candidates & ~centers & centers.any(1, keepdim=True), home, own)
