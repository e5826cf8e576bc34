"""Token reducers: each makes a plan of which tokens stay and what becomes of the others."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...core import precision, segments
from ...core.kernels.native import kernels
from ...core.layout import Layout
from ...core.statistics import AttentionStats, Stat
from ...core.tokens import PackedTokens
from ...registry import reducers
from ..block_spec import BlockSpec
from ..printing import PrintedPart
from ..selectors.base import Selection
from .fusion import plan_fusion, plan_fusion_natively
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
        return plan_reduction(tokens.layout, selection.keep, kept=selection.kept)


@reducers.register("fuse")
class Fuse(TokenReducer):
    """Fuses the tokens that are not selected into one; the others stay in their order.

    The fused token is sum_j score_j x_j / sum_j score_j over the removed tokens j (MADTP, arXiv 2403.02991, section
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
        native = kernels(scores)
        if native is not None:
            return plan_fusion_natively(native, tokens.layout, selection.keep, scores, self.normalize)
        weight = self._weight(scores, selection.keep, tokens.layout)
        return plan_fusion(tokens.layout, selection.keep, weight, selection.kept, is_affine=self.normalize)

    def _weight(self, scores: Tensor, keep: Tensor, layout: Layout) -> Tensor:
        """[total]: the weight of each token in its instance's fused token, 0 for those that stay."""
        scores = scores.masked_fill(keep, 0.0)
        if not self.normalize:
            return scores
        padded = segments.pad(scores, layout)
        total = padded.sum(1, keepdim=True)
        weight = padded / total.clamp(min=_EPS)
        if not (precision.surely_none(padded < 0) and precision.surely_none(total <= 1e3 * _EPS)):
            unusable = total <= (padded.abs().sum(1, keepdim=True) * 1e-3).clamp(min=1e3 * _EPS)
            rest = segments.pad(~keep, layout, False).to(weight.dtype)
            weight = torch.where(unusable, rest / rest.sum(1, keepdim=True).clamp(min=1), weight)
        return segments.unpad(weight, layout)
