"""Scorers by the distance of a token to the one that it would merge with, for thresholds of an instance's own."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import segments
from ...core.statistics import AttentionStats
from ...core.tokens import PackedTokens
from ...registry import scorers
from ..algorithms import matching
from ..block_spec import BlockSpec
from ..features import By, check_by, feature_width, features_of
from ..grid import first_of_window
from ..guides.base import Guidance
from ..selectors.matching import in_sequence
from .base import TokenScorer

# above every distance, so that a token that merges into none is kept
STAYS = 4.0


@scorers.register("pair_distance")
class PairDistance(TokenScorer):
    """Distance of a token of A to its most similar token of B, 1 - cosine, with the halves A and B of `bipartite`.

    Tokens of B score 4, above every distance. With keeper `fitted_threshold` and selector `bipartite`, each instance merges the
    edges below a distance: DyMU (arXiv 2504.17040), section 3.1.

    Args:
        spec: the block.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.
        standardize: whether distances are in standard deviations from their mean over the instance's edges, as ALGM (arXiv
            2406.09936) sets its threshold.
    """

    def __init__(self, spec: BlockSpec, by: By = "key", standardize: bool = False):
        super().__init__(spec)
        self.needs, self.by, self.standardize = check_by(by, "pair_distance"), by, standardize

    @torch.no_grad()
    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        similarity, has_edge = matching.best_edges(features_of(tokens, stats, self.by), *in_sequence(tokens))
        distance = 1 - similarity.masked_fill(~has_edge, 0.0)
        if self.standardize:
            edges = has_edge.sum(1, keepdim=True).clamp(min=1)
            apart = distance - distance.masked_fill(~has_edge, 0.0).sum(1, keepdim=True) / edges
            deviation = (apart.square().masked_fill(~has_edge, 0.0).sum(1, keepdim=True) / edges).sqrt()
            distance = apart / deviation.clamp(min=1e-6)
        return segments.unpad(torch.where(has_edge, distance, STAYS + self.standardize * 1e3), tokens.layout)

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return (before // 2 + 1) ** 2 * feature_width(self.spec, self.by)


@scorers.register("window_distance")
class WindowDistance(TokenScorer):
    """Mean distance of the tokens of a window, 1 - the mean cosine of its pairs: ALGM (arXiv 2406.09936), section 3.2.

    The first token of a window scores 4, above every distance: the others merge into it, with selector `window`. Windows are
    squares of the patch grid, and consecutive tokens where there is no grid.

    Args:
        spec: the block.
        size: rows and columns of a window, in patches.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.

    Raises:
        ValueError: for a size below 1.
    """

    reads_grid = True

    def __init__(self, spec: BlockSpec, size: int = 2, by: By = "content"):
        super().__init__(spec)
        if size < 1:
            raise ValueError(
                f"window_distance(size={size}) must be 1 or more: rows and columns of a window, in patches"
            )
        self.needs, self.by, self.size = check_by(by, "window_distance"), by, size

    @torch.no_grad()
    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        candidates, first = first_of_window(tokens, self.size)
        cosine = matching.window_cosine(features_of(tokens, stats, self.by), candidates, first)
        goes = candidates & (first != matching.own_slots(candidates))
        return segments.unpad(torch.where(goes, 1 - cosine, STAYS), tokens.layout)
