"""Selectors by difference: each keeps tokens of an instance that resemble each other little."""

from __future__ import annotations

from torch import Tensor

from ...core import segments
from ...core.layout import Layout
from ...core.statistics import AttentionStats
from ...core.tokens import PackedTokens
from ...registry import selectors
from ..algorithms import choosing
from ..algorithms.similarity import cosine, order_by_score, order_by_similarity, ranks
from ..block_spec import BlockSpec
from ..features import By, FeatureSelector
from .base import Selection, largest, padded_selection


@selectors.register("max_min")
class MaxMin(FeatureSelector):
    """The tokens that lie farthest apart, by greedy choice: DivPrune (arXiv 2503.02175). Scores are not read.

    The distance is 1 - cosine. The first token is the one whose nearest other one is farthest. Each further one is the farthest
    from its nearest chosen one. It costs n^2 * width MACs for n tokens.

    Args:
        spec: the block.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.
    """

    takes_kept = True

    def forward(
        self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats, kept: Layout | None = None
    ) -> Selection:
        keep = choosing.max_min(*self.padded_features(tokens, stats), counts, most=largest(kept))
        return padded_selection(tokens, keep)


@selectors.register("dpp")
class Dpp(FeatureSelector):
    """Tokens of large score that differ, by greedy MAP of a determinantal point process: CDPruner (arXiv 2506.10967).

    The kernel is L_ij = r_i r_j cos_ij, where r are the instance's scores scaled to 0 .. 1, plus 1e-6. With equal scores the
    choice is by difference alone. It costs about n * k * width + n * k^2 / 2 MACs for k of n tokens.

    Args:
        spec: the block.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.
    """

    takes_kept = True

    def forward(
        self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats, kept: Layout | None = None
    ) -> Selection:
        padded = segments.pad(scores.detach(), tokens.layout)
        keep = choosing.dpp(*self.padded_features(tokens, stats), counts, padded, largest(kept))
        return padded_selection(tokens, keep)

    def macs(self, before: Tensor, after: Tensor) -> Tensor:
        return self.width * before * after + before * after * (after - 1).clamp(min=0) / 2


@selectors.register("deduplicate")
class Deduplicate(FeatureSelector):
    """The tokens of largest score and, of the others, those that resemble each other least: VisPruner (arXiv 2412.01818).

    Args:
        spec: the block.
        important: the part of `counts` that stays by score, in 0 .. 1.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.

    Raises:
        ValueError: for a part outside 0 .. 1, and for other features.
    """

    takes_kept = True

    def __init__(self, spec: BlockSpec, important: float = 0.5, by: By = "content"):
        super().__init__(spec, by)
        if not 0 <= important <= 1:
            raise ValueError(f"deduplicate(important={important}) must lie in 0 .. 1: the part that stays by score")
        self.important = important

    def forward(
        self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats, kept: Layout | None = None
    ) -> Selection:
        padded = segments.pad(scores.detach(), tokens.layout)
        keep = choosing.deduplicate(*self.padded_features(tokens, stats), counts, padded, self.important, largest(kept))
        return padded_selection(tokens, keep)


@selectors.register("pivots")
class Pivots(FeatureSelector):
    """Pivots of largest score, and the tokens that resemble them least: DART (arXiv 2502.11494).

    It costs n * number * width MACs for n tokens.

    Args:
        spec: the block.
        number: how many pivots, at least 1.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.

    Raises:
        ValueError: for no pivot, and for other features.
    """

    def __init__(self, spec: BlockSpec, number: int = 8, by: By = "content"):
        super().__init__(spec, by)
        if number < 1:
            raise ValueError(f"pivots(number={number}) must be 1 or more: the tokens that the others are compared to")
        self.number = number

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        padded = segments.pad(scores.detach(), tokens.layout)
        keep = choosing.pivots(*self.padded_features(tokens, stats), counts, padded, self.number)
        return padded_selection(tokens, keep)

    def macs(self, before: Tensor, after: Tensor) -> Tensor:
        return self.width * before * before.clamp(max=self.number)


@selectors.register("unlike_important")
class UnlikeImportant(FeatureSelector):
    """Removes the less important tokens that resemble an important one most: the S-stage of Zero-TPrune (arXiv 2305.17328).

    The half of smaller scores is compared with the other half by cosine, each token with its most similar. Those of largest
    similarity go, at most the half; where more are to go, the tokens of smallest score that are left go too.

    Args:
        spec: the block.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.
    """

    def __init__(self, spec: BlockSpec, by: By = "key"):
        super().__init__(spec, by)

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        features, candidates = self.padded_features(tokens, stats)
        padded, total = segments.pad(scores.detach(), tokens.layout), candidates.sum(1)
        removed = (total - counts).clamp(min=0)
        rank = ranks(order_by_score(padded, candidates))
        important = candidates & (rank < ((total + 1) // 2)[:, None])
        others = candidates & ~important
        similarity = cosine(features, candidates).masked_fill(~important[:, None], float("-inf")).amax(2)
        goes = others & (ranks(order_by_similarity(similarity, others)) < removed[:, None])
        left = removed - goes.sum(1)
        goes = goes | (candidates & ~others & (rank >= (total - goes.sum(1) - left)[:, None]))
        return padded_selection(tokens, candidates & ~goes)
