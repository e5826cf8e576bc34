"""Reducers that merge: each token that goes becomes part of one that stays, and no content is lost."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ...core import precision, segments
from ...core.statistics import AttentionStats, Stat
from ...core.tokens import PackedTokens
from ...registry import reducers
from ..algorithms import matching
from ..block_spec import BlockSpec
from ..features import By, check_by, feature_width, features_of
from ..selectors.base import Selection
from .base import TokenReducer
from .reduction import Reduction, Terms, plan_reduction

Weights = Literal["size", "equal", "attention", "score"]


@reducers.register("merge")
class Merge(TokenReducer):
    """Merges each token that goes into the one that the selector matched it with, by a weighted mean.

    Where the selector matches none, it is the most similar unprotected token that stays, by cosine. Tokens of an instance that
    keeps no unprotected token are dropped.

    ToMe (arXiv 2210.09461), section 3: sum_i s_i x_i / sum_i s_i over the tokens i that become one, with sizes s; the size of
    the result is sum_i s_i. Equation 1, with `proportional`: later attention is softmax(q k^T / sqrt(d) + log s).

    Args:
        spec: the block.
        weights: "size" weighs a token by the number of original tokens that it stands for, and "equal" weighs all alike.
            "attention" weighs by size times the mean attention that a token receives: MCTF (arXiv 2403.10030), equation 8.
            "score" weighs by size times exp(score): CrossGET (arXiv 2305.17455), section 3.3.
        proportional: whether later layers add log(size) of a token to its attention logits.
        by: what the most similar token is found by: "content", the block's input, or "key", the mean of its keys over heads.
    """

    def __init__(self, spec: BlockSpec, weights: Weights = "size", proportional: bool = False, by: By = "key"):
        super().__init__(spec)
        if weights not in get_args(Weights):
            raise ValueError(f"merge(weights={weights!r}): write one of {', '.join(map(repr, get_args(Weights)))}")
        self.needs = check_by(by, "merge") | (Stat.COLUMN if weights == "attention" else Stat.NONE)
        self.weights, self.proportional, self.by = weights, proportional, by

    def forward(
        self, tokens: PackedTokens, scores: Tensor, selection: Selection, stats: AttentionStats
    ) -> Reduction | None:
        leader = leaders(tokens, selection, stats, self.by)
        weight = divided_by_sums(self._weight(tokens, scores, stats), leader)
        return plan_reduction(
            tokens.layout,
            selection.keep,
            leader,
            weight,
            kept=selection.kept,
            at_last=self.spec.causal,
            proportional=self.proportional,
        )

    def _weight(self, tokens: PackedTokens, scores: Tensor, stats: AttentionStats) -> Tensor:
        """[total]: the weight of each token among those that it merges with."""
        one = torch.ones_like(scores)
        if self.weights == "equal":
            return one
        size = one if tokens.size is None else tokens.size.to(scores)
        if self.weights == "attention":
            return size * stats[Stat.COLUMN].clamp(min=1e-12)
        if self.weights == "score":
            highest = segments.pad(scores.detach(), tokens.layout, float("-inf")).amax(1)
            return size * (scores - tokens.layout.spread(highest)).clamp(min=-60).exp()
        return size

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return before**2 * feature_width(self.spec, self.by)


@reducers.register("tofu")
class Tofu(TokenReducer):
    """Drops tokens in early blocks and merges them in later ones, with their norm preserved: ToFu (arXiv 2312.01026).

    In later blocks, MLERP: the mean of the tokens that become one, scaled to the largest of their norms. Each token goes into
    the one that the selector matched it with, or into the most similar unprotected one that stays, by the cosine of keys.

    Args:
        spec: the block.
        merge_from: the fraction of the depth, in 0 .. 1, from which tokens merge. Before it they are dropped.
        proportional: whether later layers add log(size) of a token to its attention logits.

    Raises:
        ValueError: for a fraction outside its range.
    """

    needs = Stat.KEY

    def __init__(self, spec: BlockSpec, merge_from: float = 0.5, proportional: bool = True):
        super().__init__(spec)
        if not 0 <= merge_from <= 1:
            raise ValueError(f"tofu(merge_from={merge_from}) must lie in 0 .. 1: the fraction of the depth")
        self.merges, self.proportional = spec.depth >= merge_from * spec.depths, proportional

    def forward(
        self, tokens: PackedTokens, scores: Tensor, selection: Selection, stats: AttentionStats
    ) -> Reduction | None:
        if not self.merges:
            return plan_reduction(tokens.layout, selection.keep, kept=selection.kept)
        leader = leaders(tokens, selection, stats, "key")
        return plan_reduction(
            tokens.layout,
            selection.keep,
            leader,
            divided_by_sums(torch.ones_like(scores), leader),
            kept=selection.kept,
            is_affine=False,
            at_last=self.spec.causal,
            proportional=self.proportional,
            keeps_norm=True,
        )

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return self.merges * before**2 * feature_width(self.spec, "key")


@reducers.register("reassign")
class Reassign(TokenReducer):
    """Averages what the selector matched, and adds each token to the most similar average: LLaVA-Scissor (arXiv 2506.21862).

    m_k is the mean of a token that stays and of those matched with it. The n_k tokens of the instance that are most similar to
    m_k among these means, by the cosine of contents, are added: (m_k + sum_i x_i) / (n_k + 1). A token may so be a part of two
    results: of its group's mean, and where it is added. For size and provenance it counts where it is added, and a token that
    stays at its own row.

    In causal towers tokens stay in their group, since a result would hold later tokens than the one that it stands at. Where an
    instance keeps all its tokens, they stay as they are.
    """

    def forward(
        self, tokens: PackedTokens, scores: Tensor, selection: Selection, stats: AttentionStats
    ) -> Reduction | None:
        layout, keep, free = tokens.layout, selection.keep, tokens.free
        group = leaders(tokens, selection, stats, "content")
        of_mean = divided_by_sums(torch.ones_like(scores), group)
        home = group if self.spec.causal else self._most_similar_mean(tokens, keep, group, of_mean)
        added = free & (home >= 0) & layout.spread(segments.count(~keep, layout) > 0)
        number = torch.zeros_like(scores).index_add(0, home.clamp(min=0), added.to(scores.dtype))
        # of each token, the part in its group's mean, and the part where it is added
        of_mean = of_mean / (number[group.clamp(min=0)] + 1)
        of_sum = torch.where(added, 1 / (number[home.clamp(min=0)] + 1), 0.0)

        same = group == home
        # a token that stays counts at its own row, whether it is added there or not
        leader = torch.where(keep, group, home)
        weight = torch.where(keep, of_mean + of_sum * same, of_sum + of_mean * same)
        plan = plan_reduction(layout, keep, leader, weight, kept=selection.kept, at_last=self.spec.causal)
        if plan is None:
            return None
        row = torch.arange(layout.total, device=keep.device)
        other, part = torch.where(keep, home, group), torch.where(keep, of_sum, of_mean)
        result = plan.provenance().index_select(0, other.clamp(min=0)).clamp(min=0)
        return plan.adding(Terms(row, result, part.masked_fill(same | (other < 0), 0.0)))

    @torch.no_grad()
    def _most_similar_mean(self, tokens: PackedTokens, keep: Tensor, group: Tensor, of_mean: Tensor) -> Tensor:
        """[total] int64: the row of the most similar mean; the own row for protected tokens and where all stay."""
        layout, x = tokens.layout, precision.single(tokens.x)
        means = torch.zeros_like(x).index_add(0, group.clamp(min=0), x * of_mean[:, None].to(x.dtype))
        candidates, kept = (segments.pad(mask, layout) for mask in (tokens.free, keep & tokens.free))
        home = matching.most_similar(segments.pad(x, layout), candidates, segments.pad(means, layout), kept)
        home = segments.unpad(home + layout.offsets[:-1, None], layout)
        moves = tokens.free & (group >= 0) & layout.spread(segments.count(~keep, layout) > 0)
        return torch.where(moves, home, group)

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return before**2 * self.spec.dim

    def further_macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return 0.0 if self.spec.causal else before**2 * self.spec.dim


def leaders(tokens: PackedTokens, selection: Selection, stats: AttentionStats, by: By) -> Tensor:
    """The token that each one goes into: the match of the selector, or the most similar unprotected one that stays.

    Args:
        tokens: the tokens of a block.
        selection: which tokens stay, and what the others resemble.
        stats: the attention statistics.
        by: what tokens are compared by where the selector matches none.

    Returns:
        Its row, [total] int64: the own row for a token that stays, -1 where an instance keeps no unprotected token.
    """
    layout, keep, match = tokens.layout, selection.keep, selection.match
    if match is None:
        candidates, kept = (segments.pad(mask, layout) for mask in (tokens.free, keep))
        _, match = matching.nearest(features_of(tokens, stats, by), candidates, kept)
        match = segments.unpad(match + layout.offsets[:-1, None], layout)
    row = torch.arange(layout.total, device=match.device)
    return torch.where(keep, row, torch.where(match == row, -1, match))


def divided_by_sums(weight: Tensor, leader: Tensor) -> Tensor:
    """Weights divided by the sum over all tokens of the same leader.

    Args:
        weight: [total], at least 0.
        leader: [total] int64, -1 for dropped tokens, which have weight 0.

    Returns:
        The weights, [total]. Those of a leader sum to one.
    """
    group, weight = leader.clamp(min=0), weight.masked_fill(leader < 0, 0.0)
    total = torch.zeros_like(weight).index_add(0, group, weight)
    return weight / total.clamp(min=torch.finfo(weight.dtype).tiny)[group]
