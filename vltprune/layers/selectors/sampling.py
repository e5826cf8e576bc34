"""Selectors by score and by position: sampling of a distribution, quotas of windows, and even steps."""

from __future__ import annotations

from torch import Tensor

from ...core import segments
from ...core.layout import Layout
from ...core.statistics import AttentionStats
from ...core.tokens import PackedTokens
from ...registry import selectors
from ..algorithms import sampling
from ..block_spec import BlockSpec
from ..grid import window_ids
from .base import Selection, TokenSelector, largest, padded_selection


@selectors.register("sample_cdf")
class SampleCdf(TokenSelector):
    """Inverse-transform samples of the distribution of scores, each once: ATS (arXiv 2111.15667).

    `counts` even points of the cumulative distribution choose a token each. Several may choose the same, so that fewer stay.
    Where `counts` are no fewer than the tokens, all stay.
    """

    fixed = False
    takes_kept = True

    def forward(
        self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats, kept: Layout | None = None
    ) -> Selection:
        layout = tokens.layout
        candidates = segments.pad(tokens.free, layout, False)
        keep = sampling.sample_cdf(segments.pad(scores.detach(), layout), candidates, counts, largest(kept))
        return padded_selection(tokens, keep)


@selectors.register("windows")
class Windows(TokenSelector):
    """A quota for each window of the patch grid, the others by score: VScan (arXiv 2505.22654).

    Where the tokens are no grid of patches, as in texts, windows are as many consecutive tokens.

    Args:
        spec: the block.
        size: rows and columns of a window, in patches. Windows at the right and lower end may be smaller.
        local: the part of `counts` that is divided equally among the windows, in 0 .. 1.
        column: the column of the tokens in which an earlier stage left the scores inside windows, as scorer `remember` does.
            Without it they are the scores themselves.

    Raises:
        ValueError: for arguments outside their range.
    """

    reads_grid = True

    def __init__(self, spec: BlockSpec, size: int = 6, local: float = 0.5, column: str = "remembered"):
        super().__init__(spec)
        if size < 1:
            raise ValueError(f"windows(size={size}) must be 1 or more: rows and columns of a window, in patches")
        if not 0 <= local <= 1:
            raise ValueError(f"windows(local={local}) must lie in 0 .. 1: the part that stays by window")
        self.size, self.local, self.column = size, local, column

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        layout = tokens.layout
        padded, candidates = segments.pad(scores.detach(), layout), segments.pad(tokens.free, layout, False)
        ids = segments.pad(window_ids(tokens, self.size), layout, 0)
        inside = segments.pad(tokens.columns.get(self.column, scores).detach(), layout)
        keep = sampling.windows(padded, candidates, counts, ids, inside, self.local)
        return padded_selection(tokens, keep)


@selectors.register("uniform")
class Uniform(TokenSelector):
    """Every so many-th token, whatever the scores: the step is n // counts, and the first `counts` of these tokens stay.

    VisionZip (arXiv 2412.04467) chooses the tokens that others merge into in this way.
    """

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        keep = sampling.spread_uniform(segments.pad(tokens.free, tokens.layout, False), counts)
        return padded_selection(tokens, keep)
