"""Reducers that merge: each token that goes becomes part of one that stays, and no content is lost."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core import segments
from ..core.statistics import AttentionStats, Stat
from ..core.tokens import PackedTokens
from ..registry import reducers
from . import matching
from .block_spec import BlockSpec
from .reducers import TokenReducer
from .reduction import Reduction, plan_reduction
from .selectors import Selection


@reducers.register("merge")
class Merge(TokenReducer):
    """Merges each token that goes into the one that the selector matched it with, by a weighted mean.

    Where the selector matches none, it is the most similar unprotected token that stays, by the cosine of keys. Tokens of an
    instance that keeps no unprotected token are dropped.

    ToMe (arXiv 2210.09461), section 3: sum_i s_i x_i / sum_i s_i over the tokens i that become one, with sizes s; the size of
    the result is sum_i s_i. Equation 1, with `proportional`: later attention is softmax(q k^T / sqrt(d) + log s).

    Args:
        spec: the block.
        weights: "size" weighs a token by the number of original tokens that it stands for; "equal" weighs all alike.
        proportional: whether later layers add log(size) of a token to its attention logits.
    """

    needs = Stat.KEY

    def __init__(self, spec: BlockSpec, weights: Literal["size", "equal"] = "size", proportional: bool = False):
        super().__init__(spec)
        if weights not in ("size", "equal"):
            raise ValueError(f"merge(weights={weights!r}): write weights='size' or weights='equal'")
        self.weights, self.proportional = weights, proportional

    def forward(
        self, tokens: PackedTokens, scores: Tensor, selection: Selection, stats: AttentionStats
    ) -> Reduction | None:
        layout, keep = tokens.layout, selection.keep
        match = selection.match if selection.match is not None else nearest_kept(tokens, keep, stats)
        row = torch.arange(layout.total, device=match.device)
        leader = torch.where(keep, row, torch.where(match == row, -1, match))
        weight = torch.ones_like(scores) if self.weights == "equal" or tokens.size is None else tokens.size.to(scores)
        return plan_reduction(
            layout,
            keep,
            leader,
            divided_by_sums(weight, leader),
            at_last=self.spec.causal,
            proportional=self.proportional,
        )

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return before**2 * (self.spec.dim // self.spec.heads)


def nearest_kept(tokens: PackedTokens, keep: Tensor, stats: AttentionStats) -> Tensor:
    """The most similar unprotected token that stays, by the cosine of keys, for each token that goes.

    Args:
        tokens: the tokens of a block.
        keep: [total] bool, the tokens that stay.
        stats: statistics with `Stat.KEY`.

    Returns:
        Its row, [total] int64; the own row for a token that stays, and where no unprotected token does.
    """
    layout = tokens.layout
    padded = (segments.pad(column, layout) for column in (stats[Stat.KEY], tokens.free, keep))
    _, match = matching.nearest(*padded)
    return segments.unpad(match + layout.offsets[:-1, None], layout)


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
