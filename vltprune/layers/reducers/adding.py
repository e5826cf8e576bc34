"""Reducers that add: what goes is added to what stays, which keeps its own content whole."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...core.statistics import AttentionStats, Stat
from ...core.tokens import PackedTokens
from ...registry import reducers
from ..block_spec import BlockSpec
from ..features import feature_width
from ..selectors.base import Selection
from .base import TokenReducer
from .merging import leaders
from .reduction import Reduction, plan_reduction


@reducers.register("add")
class Add(TokenReducer):
    """Adds to each token that stays the mean, or a sum weighted by scores, of those that the selector matched with it.

    x_k + mean_i x_i over the tokens i that go into k is VisionZip (arXiv 2412.04467); x_k + sum_i score_i x_i is LLaVA-PruMerge
    (arXiv 2403.15388). Where the selector matches none, a token goes into the most similar unprotected one that stays, by the
    cosine of keys. Tokens of an instance that keeps no unprotected token are dropped.

    Args:
        spec: the block.
        weights: "mean" or "score".

    Raises:
        ValueError: for other weights.
    """

    needs = Stat.KEY

    def __init__(self, spec: BlockSpec, weights: Literal["mean", "score"] = "mean"):
        super().__init__(spec)
        if weights not in ("mean", "score"):
            raise ValueError(f"add(weights={weights!r}): write weights='mean' or weights='score'")
        self.weights = weights

    def forward(
        self, tokens: PackedTokens, scores: Tensor, selection: Selection, stats: AttentionStats
    ) -> Reduction | None:
        layout, keep = tokens.layout, selection.keep
        leader = leaders(tokens, selection, stats, "key")
        if self.weights == "score":
            added = scores
        else:
            goes = (~keep).to(scores.dtype)
            group = leader.clamp(min=0)
            number = torch.zeros_like(scores).index_add(0, group, goes.masked_fill(leader < 0, 0.0))
            added = 1 / number.clamp(min=1)[group]
        weight = torch.where(keep, 1.0, added)
        return plan_reduction(layout, keep, leader, weight, is_affine=False, at_last=self.spec.causal)

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return before**2 * feature_width(self.spec, "key")
