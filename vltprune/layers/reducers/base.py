"""Token reducers: each makes a plan of which tokens stay and what becomes of the others."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...core import segments
from ...core.statistics import AttentionStats, Stat
from ...core.tokens import Layout, PackedTokens
from ...registry import reducers
from ..block_spec import BlockSpec
from ..printing import PrintedPart
from ..selectors.base import Selection
from .reduction import Reduction, plan_reduction

_EPS = 1e-8


class TokenReducer(PrintedPart, ABC):
    """Base class of reducers: they plan what becomes of the tokens that go.

    Implementations take `spec` and arguments of their own.

    Attributes:
        needs: the attention statistics that it reads.
        spec: the block that it is built for.
    """

    needs: Stat = Stat.NONE
    spec: BlockSpec

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(
        self, tokens: PackedTokens, scores: Tensor, selection: Selection, stats: AttentionStats
    ) -> Reduction | None:
        """Plans the reduction of a block's tokens.

        Args:
            tokens: the block's input, x [total, dim].
            scores: [total], as the scorer gave them.
            selection: which tokens stay, and what those that go resemble.
            stats: the attention statistics that `needs` declares.

        Returns:
            The plan, or None where all tokens stay.
        """

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        """Multiply-accumulates of matching tokens, [batch]; by default none. A plan's sums are counted apart.

        They are not counted behind a selector that matches.

        Args:
            before: [batch], the tokens that enter the block.
            after: [batch], the tokens that leave it.
        """
        return 0.0

    def further_macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        """Multiply-accumulates of comparisons that it makes behind any selector, [batch]; by default none.

        Args:
            before: [batch], the tokens that enter the block.
            after: [batch], the tokens that leave it.
        """
        return 0.0


@reducers.register("drop")
class Drop(TokenReducer):
    """Removes the tokens that are not selected; the others stay in their order."""

    def forward(
        self, tokens: PackedTokens, scores: Tensor, selection: Selection, stats: AttentionStats
    ) -> Reduction | None:
        row = torch.arange(tokens.layout.total, device=scores.device)
        return plan_reduction(tokens.layout, selection.keep, torch.where(selection.keep, row, -1))


@reducers.register("fuse")
class Fuse(TokenReducer):
    """Fuses the tokens that are not selected into one; the others stay in their order.

    The fused token is sum_j score_j x_j / (sum_j score_j + 1e-8) over the removed tokens j (MADTP, arXiv 2403.02991, section
    3.3). It has the position of its last source, so that a causal tower sees no future. Where the scores do not sum to a
    positive number, it is the mean of the removed tokens.

    Args:
        spec: the block.
        normalize: whether to divide by the sum of scores. False is EViT (arXiv 2202.07800), equation 3.
    """

    def __init__(self, spec: BlockSpec, normalize: bool = True):
        super().__init__(spec)
        self.normalize = normalize

    def forward(
        self, tokens: PackedTokens, scores: Tensor, selection: Selection, stats: AttentionStats
    ) -> Reduction | None:
        layout, rest = tokens.layout, ~selection.keep
        row = torch.arange(layout.total, device=scores.device)
        last = segments.pad(torch.where(rest, row, -1), layout, -1).amax(1)
        leader = torch.where(rest, last[layout.instance], row)
        weight = torch.where(rest, self._weight(scores, rest, layout), 1.0)
        return plan_reduction(layout, selection.keep, leader, weight, is_affine=self.normalize)

    def _weight(self, scores: Tensor, rest: Tensor, layout: Layout) -> Tensor:
        """[total]: the weight of each token in its instance's fused token."""
        scores = scores.masked_fill(~rest, 0.0)
        if not self.normalize:
            return scores
        total, size = segments.sum(scores, layout), segments.sum(scores.abs(), layout)
        weight = scores / (total + _EPS)[layout.instance]
        even = rest.to(scores.dtype) / segments.count(rest, layout).clamp(min=1)[layout.instance]
        usable = (total > 1e-3 * size) & (total > 1e3 * _EPS)
        return torch.where(usable[layout.instance], weight, even)
