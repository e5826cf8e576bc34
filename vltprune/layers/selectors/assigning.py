"""Selectors that choose tokens and match each of the others with one of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import segments
from ...core.statistics import AttentionStats
from ...core.tokens import PackedTokens
from ...registry import selectors
from ..algorithms import matching, sampling
from ..algorithms.choosing import part_of
from ..algorithms.clustering import density_peaks
from ..algorithms.similarity import order_by_score, positions, ranks
from ..block_spec import BlockSpec
from ..features import By, FeatureSelector
from ..keepers.base import keep_count
from .base import Selection, TokenSelector, padded_selection


@selectors.register("dominant")
class Dominant(FeatureSelector):
    """Dominant tokens by score, and of the others every so many-th, with which the rest is matched: VisionZip (2412.04467).

    A token that goes is matched with the most similar of the evenly chosen ones, by cosine; dominant tokens gather none.

    Args:
        spec: the block.
        part: the part of `counts` that is dominant, in [0, 1), rounded down. VisionZip has 54 of 64.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.

    Raises:
        ValueError: for a part outside its range, and for other features.
    """

    matches = True

    def __init__(self, spec: BlockSpec, part: float = 0.84375, by: By = "key"):
        super().__init__(spec, by)
        if not 0 <= part < 1:
            raise ValueError(f"dominant(part={part}) must lie in [0, 1): the part of the counts that stays by score")
        self.part = part

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        features, candidates = self.padded_features(tokens, stats)
        dominant, targets = best_and_even(tokens, scores, candidates, counts, self.part)
        _, match = matching.nearest(features, candidates & ~dominant, targets)
        return padded_selection(tokens, dominant | targets, match)


@selectors.register("clusters")
class Clusters(FeatureSelector):
    """The tokens of largest score, and of the others a center for each cluster, with which its tokens are matched.

    SparseVLM's recycling (arXiv 2410.04417), section 3.3: the others are clustered by density peaks (`density_peaks`). Where
    `counts` are no fewer than the tokens, all stay.

    Args:
        spec: the block.
        number: how many of `counts` are centers, at least 0; all of them where `counts` are fewer.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.
        part: the part of `counts` that are centers besides, in [0, 1], rounded up.

    Raises:
        ValueError: for a negative number, a part outside its range, and other features.
    """

    matches = True

    def __init__(self, spec: BlockSpec, number: int = 8, by: By = "content", part: float = 0.0):
        super().__init__(spec, by)
        if number < 0:
            raise ValueError(f"clusters(number={number}) must be 0 or more: the clusters that tokens form that go")
        if not 0 <= part <= 1:
            raise ValueError(
                f"clusters(part={part}) must lie in [0, 1]: the part of the counts that are centers besides"
            )
        self.number, self.part = number, part

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        features, candidates = self.padded_features(tokens, stats)
        counts = torch.minimum(counts, candidates.sum(1))
        centers = torch.minimum(counts, self.number + keep_count(counts, self.part))
        rank = ranks(order_by_score(segments.pad(scores.detach(), tokens.layout), candidates))
        best = candidates & (rank < (counts - centers)[:, None])
        if not self.number and not self.part:
            return padded_selection(tokens, best)
        is_center, match = density_peaks(features, candidates & ~best, centers)
        return padded_selection(tokens, best | is_center, match)


@selectors.register("evenly")
class Evenly(TokenSelector):
    """The tokens of largest score, and of the others every so many-th: LLaVA-PruMerge+ (arXiv 2403.15388).

    With the keeper `outliers(samples=3.0)`, a quarter of the tokens that stay are outliers, and the others samples.

    **Departs**: samples are of the tokens that are no outliers. The reference takes them of all tokens, and counts those that
    are outliers once.

    Args:
        spec: the block.
        part: the part of `counts` that stays by score, in [0, 1], rounded down.

    Raises:
        ValueError: for a part outside its range.
    """

    def __init__(self, spec: BlockSpec, part: float = 0.25):
        super().__init__(spec)
        if not 0 <= part <= 1:
            raise ValueError(f"evenly(part={part}) must lie in [0, 1]: the part of the counts that stays by score")
        self.part = part

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        candidates = segments.pad(tokens.free, tokens.layout)
        best, even = best_and_even(tokens, scores, candidates, counts, self.part)
        return padded_selection(tokens, best | even)


def best_and_even(
    tokens: PackedTokens, scores: Tensor, candidates: Tensor, counts: Tensor, part: float
) -> tuple[Tensor, Tensor]:
    """The candidates of largest score, and of the others every so many-th.

    Args:
        tokens: the tokens of a block.
        scores: [total].
        candidates: [batch, longest] bool.
        counts: [batch] int64, how many there are in all.
        part: the part of them that is of largest score, rounded down.

    Returns:
        Both, [batch, longest] bool each.
    """
    counts = torch.minimum(counts, candidates.sum(1))
    by_score = part_of(counts, part)
    rank = ranks(order_by_score(segments.pad(scores.detach(), tokens.layout), candidates))
    best = candidates & (rank < by_score[:, None])
    return best, sampling.spread_uniform(candidates & ~best, counts - by_score)


@selectors.register("components")
class Components(FeatureSelector):
    """One token for each connected component of the graph of similar tokens: LLaVA-Scissor (arXiv 2506.21862).

    Two tokens are connected where their cosine is above a threshold. Where there are more components than `counts`, the largest
    stay, and each other one is matched as a whole, by its first token, with the most similar. Where `counts` are no fewer than
    the tokens, all stay. Scores are not read.

    Args:
        spec: the block.
        least_similarity: the cosine above which two tokens are connected.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.
    """

    fixed = False
    matches = True

    def __init__(self, spec: BlockSpec, least_similarity: float = 0.9, by: By = "content"):
        super().__init__(spec, by)
        self.least_similarity = least_similarity

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        features, candidates = self.padded_features(tokens, stats)
        first, match = matching.components(features, candidates, self.least_similarity)
        size = torch.zeros_like(match).scatter_add(1, match, candidates.long())
        order = (-size).masked_fill(~first, 1).argsort(dim=1, stable=True)
        keep = first & (ranks(order) < counts[:, None])
        _, onto = matching.nearest(features, first, keep)

        everything = (counts >= candidates.sum(1))[:, None]
        keep = torch.where(everything, candidates, keep)
        match = torch.where(everything, positions(match), onto.gather(1, match))
        return padded_selection(tokens, keep, match)

    def macs(self, before: Tensor, after: Tensor) -> Tensor:
        return 2 * self.width * before**2
