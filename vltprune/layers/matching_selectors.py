"""Selectors that match: each token that goes has a similar token that stays, into which a reducer may merge it."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ..core import precision, segments
from ..core.statistics import AttentionStats, Stat
from ..core.tokens import PackedTokens
from ..registry import selectors
from . import matching
from .selectors import Selection, TokenSelector
from .similarity import ranks


class MatchingSelector(TokenSelector):
    """Base class of selectors that match tokens by the cosine of their keys, the mean over heads.

    A matching removes half of the unprotected tokens at most. Where `counts` ask for fewer tokens, further ones go by
    complete-graph matching (`matching.graph`), one after the other into the most similar of those that stay.
    """

    needs = Stat.KEY
    matches = True

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        layout = tokens.layout
        keys, candidates = segments.pad(stats[Stat.KEY], layout), segments.pad(tokens.free, layout)
        removed = (candidates.sum(1) - counts).clamp(min=0)
        keep, match, columns = self._match(tokens, keys, candidates, scores, removed)
        left = removed - candidates.sum(1) + keep.sum(1)
        if not precision.surely_none(left > 0):
            keep, onto = matching.graph(keys, keep, left.clamp(min=0))
            match = onto.gather(1, match)
        row = segments.unpad(match + layout.offsets[:-1, None], layout)
        columns = {name: segments.unpad(column.gather(1, match), layout) for name, column in columns.items()}
        return Selection(tokens.protected | segments.unpad(keep, layout), row, columns)

    @abstractmethod
    def _match(
        self, tokens: PackedTokens, keys: Tensor, candidates: Tensor, scores: Tensor, removed: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The matching of the padded batch.

        Args:
            tokens: the block's input.
            keys: [batch, n, head_dim].
            candidates: [batch, n] bool.
            scores: [total].
            removed: [batch] int64, how many tokens go.

        Returns:
            `keep` [batch, n] bool, `match` [batch, n] int64, and columns [batch, n].
        """

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        dim = self.spec.dim // self.spec.heads
        more = before - after > before // 2
        return self._pairs(before) * dim + more * before**2 * dim

    @abstractmethod
    def _pairs(self, tokens: Tensor) -> Tensor:
        """How many pairs of so many tokens [batch] the matching compares, [batch]."""


@selectors.register("bipartite")
class Bipartite(MatchingSelector):
    """Bipartite soft matching of ToMe (arXiv 2210.09461), section 3.

    Unprotected tokens are in turn in A and in B. Each token of A has an edge to its most similar token of B, by the cosine of
    keys. The most similar edges are taken, as many as tokens go. Scores are not read.

    ToMe's output has another order than the sequence: [unmerged A, B]. It decides who is in A at the next block, and the
    column "bipartite_order" carries it there. The tokens stay in the order of the sequence.
    """

    def _match(
        self, tokens: PackedTokens, keys: Tensor, candidates: Tensor, scores: Tensor, removed: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        order = tokens.columns.get("bipartite_order", tokens.layout.slot)
        place = segments.pad(order, tokens.layout).masked_fill(~candidates, torch.iinfo(torch.int64).max)
        place = ranks(place.argsort(dim=1, stable=True))
        keep, match, order = matching.bipartite_in_order(keys, candidates, place, removed)
        return keep, match, {"bipartite_order": order}

    def _pairs(self, tokens: Tensor) -> Tensor:
        return (tokens // 2 + 1) ** 2
