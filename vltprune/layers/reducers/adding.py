"""Reducers that add: what goes is added to what stays, which keeps its own content whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import segments
from ...core.statistics import AttentionStats, Stat
from ...core.tokens import PackedTokens
from ...registry import reducers
from ..algorithms import matching
from ..block_spec import BlockSpec
from ..features import feature_width, features_of
from ..selectors.base import Selection
from .base import Fuse, TokenReducer
from .merging import leaders
from .reduction import Reduction, Terms, plan_reduction


@reducers.register("add")
class Add(TokenReducer):
    """Adds to each token that stays the mean of those that the selector matched with it: VisionZip (arXiv 2412.04467).

    The result is x_k + mean_i x_i over the tokens i that go into k. Where the selector matches none, a token goes into the
    most similar unprotected one that stays, by the cosine of keys. Tokens of an instance that keeps no unprotected token are
    dropped.
    """

    needs = Stat.KEY

    def forward(
        self, tokens: PackedTokens, scores: Tensor, selection: Selection, stats: AttentionStats
    ) -> Reduction | None:
        layout, keep = tokens.layout, selection.keep
        leader = leaders(tokens, selection, stats, "key")
        goes = (~keep).to(scores.dtype)
        group = leader.clamp(min=0)
        number = torch.zeros_like(scores).index_add(0, group, goes.masked_fill(leader < 0, 0.0))
        weight = torch.where(keep, 1.0, 1 / number.clamp(min=1)[group])
        return plan_reduction(
            layout, keep, leader, weight, kept=selection.kept, is_affine=False, at_last=self.spec.causal
        )

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return before**2 * feature_width(self.spec, "key")


@reducers.register("add_neighbors")
class AddNeighbors(Fuse):
    """Adds to each token that stays its most similar tokens, weighted by their scores: LLaVA-PruMerge (arXiv 2403.15388).

    A token k that stays becomes x_k + sum_j a_j x_j over the `number` unprotected tokens j of largest cosine of keys to it,
    others that stay among them. One token may be added to several. All tokens that go also become one more token,
    sum_j a_j x_j, which stands at the last of them.

    In causal towers neighbors are among earlier tokens. Where an instance keeps all its tokens, they stay as they are.

    Args:
        spec: the block.
        number: how many neighbors are added to a token, at least 1; all others where there are fewer. PruMerge has 32.

    Raises:
        ValueError: for a number below 1.
    """

    needs = Stat.KEY

    def __init__(self, spec: BlockSpec, number: int = 32):
        super().__init__(spec, normalize=False)
        if number < 1:
            raise ValueError(f"add_neighbors(number={number}) must be 1 or more: the tokens that are added to each one")
        self.number = number

    def forward(
        self, tokens: PackedTokens, scores: Tensor, selection: Selection, stats: AttentionStats
    ) -> Reduction | None:
        plan, layout, keep = super().forward(tokens, scores, selection, stats), tokens.layout, selection.keep
        if plan is None:
            return None
        candidates = segments.pad(tokens.free, layout)
        slots, found = matching.neighbors(features_of(tokens, stats, "key"), candidates, self.number, self.spec.causal)
        # of the result rows alone: most tokens are none
        source = segments.unpad(slots + layout.offsets[:-1, None, None], layout).index_select(0, plan.index)
        pruned = segments.count(~keep, layout) > 0
        adds = segments.unpad(found, layout) & (keep & tokens.free & layout.spread(pruned))[:, None]
        weight = scores[source] * adds.index_select(0, plan.index)
        result = torch.arange(plan.layout.total, device=source.device)[:, None].expand_as(source)
        return plan.adding(Terms(source.flatten(), result.flatten(), weight.flatten()))

    def further_macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return before**2 * feature_width(self.spec, "key")
