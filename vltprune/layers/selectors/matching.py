"""Selectors that match: each token that goes has a similar token that stays, into which a reducer may merge it."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ...core import precision, segments
from ...core.layout import Layout
from ...core.modality import COLUMN
from ...core.statistics import AttentionStats
from ...core.tokens import PackedTokens
from ...registry import selectors
from ..algorithms import matching
from ..algorithms.similarity import NEAR, order_by_score, put_last, ranks, scaled
from ..block_spec import BlockSpec
from ..features import By, FeatureSelector
from ..grid import first_of_window
from .base import Selection, padded_selection


def in_sequence(tokens: PackedTokens) -> tuple[Tensor, Tensor, Tensor]:
    """The order in which ToMe's block would get the tokens: that of the column "bipartite_order", or of the positions.

    Args:
        tokens: the tokens of a block.

    Returns:
        The unprotected tokens [batch, n] bool; the number of protected ones of the same modality before the first of them,
        [batch] int64; and the place of each among those of its instance, [batch, n] int64.
    """
    layout = tokens.layout
    candidates, protected = segments.pad(tokens.free, layout), segments.pad(tokens.protected, layout)
    position = segments.pad(tokens.position, layout)
    first, slot = put_last(position, candidates).min(1, keepdim=True)
    is_before = protected & (position < first)
    if COLUMN in tokens.columns:
        modality = segments.pad(tokens.columns[COLUMN], layout)
        is_before &= modality == modality.gather(1, slot)
    order = segments.pad(tokens.columns.get("bipartite_order", tokens.position), layout)
    place = ranks(put_last(order, candidates).argsort(dim=1, stable=True))
    return candidates, is_before.sum(1), place


def order_column(tokens: PackedTokens, order: Tensor) -> dict[str, Tensor]:
    """The column "bipartite_order" of padded tokens. Beside another modality protected ones keep theirs for its own stage.

    Args:
        tokens: the tokens of a block.
        order: [batch, n] int64, numbers that ascend in the order of ToMe's output.

    Returns:
        The column by name, [batch, n] int64.
    """
    if COLUMN not in tokens.columns:
        return {"bipartite_order": order}
    former = tokens.columns.get("bipartite_order", tokens.position)
    candidates, former = segments.pad(tokens.free, tokens.layout), segments.pad(former, tokens.layout)
    return {"bipartite_order": torch.where(candidates, order, former)}


class MatchingSelector(FeatureSelector):
    """Base class of selectors that match tokens by the cosine of features.

    A matching removes half of the unprotected tokens at most. Where `counts` ask for fewer tokens, further ones go by
    complete-graph matching (`matching.graph`), each into the most similar of those that stay.

    Args:
        spec: the block.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.
    """

    matches = True
    takes_kept = True

    def __init__(self, spec: BlockSpec, by: By = "key"):
        super().__init__(spec, by)

    def forward(
        self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats, kept: Layout | None = None
    ) -> Selection:
        features, candidates = self.padded_features(tokens, stats)
        removed = (candidates.sum(1) - counts).clamp(min=0)
        keep, match, columns = self._match(tokens, features, scores, removed, stats)
        left = removed - candidates.sum(1) + keep.sum(1)
        if not self._suffices(tokens, kept) and not precision.surely_none(left > 0):
            keep, onto = matching.graph(features, keep, left.clamp(min=0))
            match = onto.gather(1, match)
        columns = {name: column.gather(1, match) for name, column in columns.items()}
        return padded_selection(tokens, keep, match, columns)

    def _suffices(self, tokens: PackedTokens, kept: Layout | None) -> bool:
        """Whether the matching is known to remove all tokens that go, `kept` of each instance being left."""
        if kept is None:
            return False
        more = tokens.available.combine(kept, lambda there, stay: max(there - stay - self._reach(there), 0)).longest
        return isinstance(more, int) and not more

    def _reach(self, available: int) -> int:
        """How many of so many unprotected tokens the matching removes for certain, where it is asked to; by default none."""
        return 0

    @abstractmethod
    def _match(
        self, tokens: PackedTokens, features: Tensor, scores: Tensor, removed: Tensor, stats: AttentionStats
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The matching of the padded batch.

        Args:
            tokens: the block's input.
            features: [batch, n, dim].
            scores: [total].
            removed: [batch] int64, how many tokens go.
            stats: the attention statistics.

        Returns:
            `keep` [batch, n] bool, `match` [batch, n] int64, and columns [batch, n].
        """

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        more = before - after > before // 2
        return self._pairs(before) * self.width + more * before**2 * self.width

    def _pairs(self, tokens: Tensor) -> Tensor:
        """How many pairs of so many tokens [batch] the matching compares, [batch]."""
        return torch.zeros_like(tokens)


@selectors.register("bipartite")
class Bipartite(MatchingSelector):
    """Bipartite soft matching of ToMe (arXiv 2210.09461), section 3.

    Unprotected tokens are in turn in A and in B. Each token of A has an edge to its most similar token of B, by the cosine of
    keys. The most similar edges are taken, as many as tokens go. Scores are not read.

    ToMe's output has another order than the sequence: [unmerged A, B]. It decides who is in A at the next block, and the
    column "bipartite_order" carries it there. The tokens stay in the order of the sequence.

    Args:
        spec: the block.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.
    """

    def _match(
        self, tokens: PackedTokens, features: Tensor, scores: Tensor, removed: Tensor, stats: AttentionStats
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        keep, match, order = matching.bipartite_in_order(features, *in_sequence(tokens), removed)
        return keep, match, order_column(tokens, order)

    def _reach(self, available: int) -> int:
        return available // 2

    def _pairs(self, tokens: Tensor) -> Tensor:
        return (tokens // 2 + 1) ** 2


@selectors.register("energy")
class Energy(MatchingSelector):
    """Matching of the tokens of highest energy: PiToMe (arXiv 2405.16148), equations 3 and 4.

    The energy of a token is the mean of f(cos) to the instance's other tokens, with f(c) = ELU(c - margin): high in a large
    group of similar tokens. Where r tokens go, the 2 r of highest energy take part. By rank they are in turn in A and in B, and
    each of A goes into its most similar one of B. Scores are not read.

    Args:
        spec: the block.
        margin: the cosine from which tokens are of a group, at the first block. It falls linearly over the blocks, to 0 behind
            the last.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.
    """

    def __init__(self, spec: BlockSpec, margin: float = 0.9, by: By = "key"):
        super().__init__(spec, by)
        self.margin = margin

    def _match(
        self, tokens: PackedTokens, features: Tensor, scores: Tensor, removed: Tensor, stats: AttentionStats
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        margin = self.margin * (1 - self.spec.depth / self.spec.depths)
        candidates = segments.pad(tokens.free, tokens.layout)
        return *matching.energy(features, candidates, removed, margin, within=NEAR), {}

    def _reach(self, available: int) -> int:
        return available // 2

    def _pairs(self, tokens: Tensor) -> Tensor:
        return tokens**2 + (tokens // 2 + 1) ** 2


@selectors.register("graph")
class Graph(MatchingSelector):
    """Complete-graph soft matching of CrossGET (arXiv 2305.17455), section 3.3.

    Tokens are ranked by their highest cosine to another one. Those go for which importance - (the highest cosine to a token
    ranked later) is smallest, each into the most similar of those that stay. Importance is `weight` times the scores, scaled to
    0 .. 1 over the instance.

    Args:
        spec: the block.
        weight: the weight of importance beside cosines. 0 looks at similarity alone.
        by: what is compared: "content", the block's input, or "key", the mean of its keys over heads.
    """

    def __init__(self, spec: BlockSpec, weight: float = 1.0, by: By = "key"):
        super().__init__(spec, by)
        self.weight = weight

    def _match(
        self, tokens: PackedTokens, features: Tensor, scores: Tensor, removed: Tensor, stats: AttentionStats
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        candidates = segments.pad(tokens.free, tokens.layout)
        importance = self.weight * scaled(segments.pad(scores.detach(), tokens.layout), candidates)
        return *matching.graph(features, candidates, removed, importance), {}

    def _reach(self, available: int) -> int:
        return available

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return self._pairs(before) * self.width

    def _pairs(self, tokens: Tensor) -> Tensor:
        return tokens**2


@selectors.register("window")
class Window(MatchingSelector):
    """Merges tokens into the first one of their window: the local merging of ALGM (arXiv 2406.09936), section 3.2.

    The tokens of smallest score go, except the first one of each window. Windows are squares of the patch grid, and
    consecutive tokens where there is no grid.

    Args:
        spec: the block.
        size: rows and columns of a window, in patches.

    Raises:
        ValueError: for a size below 1.
    """

    reads_grid = True

    def __init__(self, spec: BlockSpec, size: int = 2):
        super().__init__(spec, "content")
        if size < 1:
            raise ValueError(f"window(size={size}) must be 1 or more: rows and columns of a window, in patches")
        self.size = size

    def _match(
        self, tokens: PackedTokens, features: Tensor, scores: Tensor, removed: Tensor, stats: AttentionStats
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        candidates, first = first_of_window(tokens, self.size)
        own = torch.arange(first.shape[1], device=first.device).expand_as(first)
        others = candidates & (first != own)
        order = order_by_score(segments.pad(scores.detach(), tokens.layout), others, descending=False)
        goes = others & (ranks(order) < removed[:, None])
        return candidates & ~goes, torch.where(goes, first, own), {}

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        return (before - after > before * (1 - self.size**-2)) * before**2 * self.spec.dim
