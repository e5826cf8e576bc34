"""Multi-criteria token fusion (MCTF): a matching in both directions by similarity, information and size."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import segments
from ...core.statistics import AttentionStats, Stat
from ...core.tokens import PackedTokens
from ...registry import selectors
from ..algorithms.matching import halves, own_slots
from ..algorithms.similarity import NEAR, decides, first_best, order_by_similarity, ranks, unit
from ..block_spec import BlockSpec
from ..features import By
from .matching import MatchingSelector, in_sequence, order_column

_INFINITY = float("inf")


@selectors.register("mctf")
class Mctf(MatchingSelector):
    """Bidirectional bipartite matching of MCTF (arXiv 2403.10030), equations 4 to 7.

    W_ij = ((cos_ij + 1) / 2)^(1 / t_similarity) (u_i u_j)^(1 / t_information) (v_i v_j)^(1 / t_size). Here u is 1 / the mean
    attention that a token receives, and v is 1 / its size. Both are divided by their maximum. Tokens are in turn in A and B, as
    in `bipartite`. Half of those that go are the tokens of A of largest W, into their best of B. The others are the tokens of
    B of largest W, into their best one of A that is left.

    The reference reads the attention of the next block. Here it is the block's own.

    Args:
        spec: the block.
        t_similarity: above 0, the temperature of similarity.
        t_information: above 0, that of attention received.
        t_size: above 0, that of sizes.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.

    Raises:
        ValueError: for a temperature that is not above 0.
    """

    def __init__(
        self,
        spec: BlockSpec,
        t_similarity: float = 1.0,
        t_information: float = 20.0,
        t_size: float = 40.0,
        by: By = "content",
    ):
        super().__init__(spec, by)
        for name, value in (("t_similarity", t_similarity), ("t_information", t_information), ("t_size", t_size)):
            if not value > 0:
                raise ValueError(f"mctf({name}={value}) must be above 0: large values make the criterion count little")
        self.needs |= Stat.COLUMN
        self.t_similarity, self.t_information, self.t_size = t_similarity, t_information, t_size

    def _match(
        self, tokens: PackedTokens, features: Tensor, scores: Tensor, removed: Tensor, stats: AttentionStats
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        layout, (candidates, before, place) = tokens.layout, in_sequence(tokens)
        received = segments.pad(stats[Stat.COLUMN], layout)
        size = torch.ones_like(received) if tokens.size is None else segments.pad(tokens.size, layout).to(received)
        factor = _inverse(received, candidates) ** (1 / self.t_information) * _inverse(size, candidates) ** (
            1 / self.t_size
        )
        keep, match, order = match_both_ways(features, candidates, before, place, removed, factor, self.t_similarity)
        return keep, match, order_column(tokens, order)

    def _pairs(self, tokens: Tensor) -> Tensor:
        return (tokens // 2 + 1) ** 2


@decides
def match_both_ways(
    features: Tensor,
    candidates: Tensor,
    before: Tensor,
    place: Tensor,
    r: Tensor,
    factor: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The matching of `Mctf`, for padded batches.

    Args:
        features: [batch, n, dim].
        candidates: [batch, n] bool.
        before: [batch] int64, the number of protected tokens before the first candidate.
        place: [batch, n] int64, the place of each candidate among those of its instance, from 0 on.
        r: [batch] int64, how many tokens go; half of the candidates at most.
        factor: [batch, n], what multiplies a token's weights.
        temperature: that of similarity.

    Returns:
        `keep` [batch, n] bool; `match` [batch, n] int64; and numbers [batch, n] int64 that ascend in the order of the
        reference's output, [unmerged A, unmerged B].
    """
    n = candidates.shape[1]
    if not n:
        return candidates.clone(), own_slots(candidates), own_slots(candidates)
    r = torch.minimum(r, candidates.sum(1) // 2)[:, None]
    parity = place + before[:, None] % 2
    a, b = halves(parity, candidates)
    x = unit(features, candidates)
    (x_a, factor_a), (x_b, factor_b) = (
        (x.gather(1, slots[..., None].expand(-1, -1, x.shape[2])), factor.gather(1, slots))
        for slots in (a.clamp(max=n - 1), b.clamp(max=n - 1))
    )
    weight = ((x_a @ x_b.mT + 1) / 2).clamp(min=0) ** (1 / temperature) * factor_a[:, :, None] * factor_b[:, None]
    weight = weight.masked_fill((a == n)[:, :, None] | (b == n)[:, None], -_INFINITY)

    largest, best = first_best(weight, NEAR)
    edge = largest > -_INFINITY
    rank_a = ranks(order_by_similarity(largest, edge, NEAR))
    goes_a = edge & (rank_a < r // 2)
    back, best_a = first_best(weight.masked_fill(goes_a[:, :, None], -_INFINITY).mT, NEAR)
    edge = back > -_INFINITY
    rank_b = ranks(order_by_similarity(back, edge, NEAR))
    goes_b = edge & (rank_b < r - r // 2)

    # one more column, for the empty places of A and B
    match = own_slots(torch.cat([candidates, candidates[:, :1]], 1))
    match = match.scatter(1, torch.where(goes_a, a, n), torch.where(goes_a, b.gather(1, best), n))
    match = match.scatter(1, torch.where(goes_b, b, n), torch.where(goes_b, a.gather(1, best_a), n))[:, :n]
    # what merged into a token of B that goes, goes with it
    match = match.gather(1, match)
    rank = torch.zeros_like(match).new_zeros(match.shape[0], n + 1).scatter(1, a, rank_a).scatter(1, b, rank_b)[:, :n]
    in_a = torch.where(before[:, None] > 0, place, rank)
    order = torch.where(parity % 2 == 0, in_a, candidates.sum(1, keepdim=True) + rank)
    return candidates & (match == own_slots(candidates)), match, order.gather(1, match)


def _inverse(values: Tensor, candidates: Tensor) -> Tensor:
    """1 / values [batch, n], divided by the maximum of each instance; 1 for others than candidates."""
    values = values.clamp(min=1e-12).masked_fill(~candidates, _INFINITY)
    least = values.amin(1, keepdim=True)
    return torch.where(candidates, least / values, 1.0)
