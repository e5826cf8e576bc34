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
from ..algorithms.similarity import order_by_score, positions, ranks
from ..block_spec import BlockSpec
from ..features import By, FeatureSelector
from .base import Selection, padded_selection


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
        layout = tokens.layout
        features, candidates = self.padded_features(tokens, stats)
        counts = torch.minimum(counts, candidates.sum(1))
        by_score = part_of(counts, self.part)
        rank = ranks(order_by_score(segments.pad(scores.detach(), layout), candidates))
        dominant = candidates & (rank < by_score[:, None])
        others = candidates & ~dominant
        targets = sampling.spread_uniform(others, counts - by_score)
        _, match = matching.nearest(features, others, targets)
        return padded_selection(tokens, dominant | targets, match)

    def macs(self, before: Tensor, after: Tensor) -> Tensor:
        return self.width * before**2


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
