"""Selectors that read the grid of patches: pooled cells, and anchors with their neighbors."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import precision, segments
from ...core.statistics import AttentionStats
from ...core.tokens import PackedTokens
from ...registry import selectors
from ..algorithms.similarity import order_by_score, positions, ranks
from ..block_spec import BlockSpec
from ..grid import grid
from .base import Selection, TokenSelector, padded_selection


@selectors.register("pool")
class Pool(TokenSelector):
    """One token for each cell of a coarser grid, with which the others of the cell are matched. Scores are not read.

    A grid of rows x columns becomes one of floor(rows * sqrt(counts / (rows * columns))) rows and as many columns as `counts`
    allow. Patch (i, j) is in the cell at floor(i * new rows / rows) and floor(j * new columns / columns). A quarter of a grid
    of even sides is 2 x 2 pooling; at odd sides some cells are a row or column larger. The first patch of a cell stays.

    Where tokens are no grid of patches, as in texts, cells are runs of consecutive tokens. Where `counts` are no fewer than the
    tokens, all stay.
    """

    fixed = False
    reads_grid = True
    matches = True

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        layout = tokens.layout
        candidates = segments.pad(tokens.free, layout, False)
        row, column = (segments.pad(one, layout, 0) for one in grid(tokens))
        is_grid = row >= 0
        row, column = row.clamp(min=0), torch.where(is_grid, column, candidates.cumsum(1) - 1).clamp(min=0)
        rows, columns = (((one + 1) * candidates).amax(1, keepdim=True).clamp(min=1) for one in (row, column))
        total, wanted = candidates.sum(1, keepdim=True), counts[:, None]

        scale = (wanted.to(precision.widest_float(counts.device)) / (rows * columns)).clamp(max=1).sqrt()
        # 1e-6: a product that is whole but for rounding counts as whole
        new_rows = (rows * scale + 1e-6).floor().long().clamp(min=1)
        new_columns = (wanted // new_rows).clamp(min=1).minimum(columns)
        # of each cell the first slot; there are no more cells than tokens
        cell = (row * new_rows // rows * new_columns + column * new_columns // columns).masked_fill(~candidates, -1)
        same = cell[:, :, None] == cell[:, None, :]
        first = same.int().argmax(2)
        first = torch.where(wanted >= total, positions(candidates), first)
        first = torch.where(candidates, first, positions(candidates))
        keep = candidates & (first == positions(candidates)) & (wanted > 0)
        return padded_selection(tokens, keep, first)


@selectors.register("anchors")
class Anchors(TokenSelector):
    """Anchors by the scores of an earlier block, their neighbors in the grid, and others by score: HiPrune (arXiv 2508.00553).

    Of `counts` tokens, round(counts * part / 5) are anchors. Their neighbors above, below, left and right stay too, and then
    the tokens of largest score. Where tokens are no grid of patches, neighbors are the tokens before and behind.

    Args:
        spec: the block.
        part: the part of `counts` that anchors and their neighbors have at most, in 0 .. 1.
        column: the column of the tokens in which an earlier stage left its scores, as scorer `remember` does. Without it
            anchors are chosen by the scores themselves.

    Raises:
        ValueError: for a part outside 0 .. 1.
    """

    reads_grid = True

    def __init__(self, spec: BlockSpec, part: float = 0.1, column: str = "remembered"):
        super().__init__(spec)
        if not 0 <= part <= 1:
            raise ValueError(f"anchors(part={part}) must lie in 0 .. 1: the part that anchors and their neighbors have")
        self.part, self.column = part, column

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        layout = tokens.layout
        candidates = segments.pad(tokens.free, layout, False)
        remembered = segments.pad(tokens.columns.get(self.column, scores).detach(), layout)
        wanted = torch.minimum(counts, candidates.sum(1))
        number = (wanted * self.part / 5).round()
        is_anchor = candidates & (ranks(order_by_score(remembered, candidates)) < number[:, None])
        row, column = (segments.pad(one, layout, 0) for one in grid(tokens))
        distance = (row[:, :, None] - row[:, None]).abs() + (column[:, :, None] - column[:, None]).abs()
        is_near = ((distance == 1) & is_anchor[:, None]).any(2)

        # anchors, then their neighbors, then the others; protected tokens and padding at the end
        group = torch.where(is_anchor, 0, torch.where(is_near, 1, 2)).masked_fill(~candidates, 3)
        order = order_by_score(segments.pad(scores.detach(), layout), candidates)
        order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
        keep = candidates & (ranks(order) < wanted[:, None])
        return padded_selection(tokens, keep)
