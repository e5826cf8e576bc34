"""Token reducers: each makes a plan of which tokens stay and what becomes of the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from ..core import segments
from ..core.statistics import AttentionStats, Stat
from ..core.tokens import Layout, PackedTokens
from ..registry import reducers
from .block_spec import BlockSpec
from .printing import PrintedPart

_EPS = 1e-8


@dataclass(frozen=True)
class Merge:
    """The weighted sums of removed tokens, one for each instance that loses some.

    Attributes:
        layout: the layout before the reduction.
        instances: the instances that lose tokens, as Python integers.
        rows: [merges] int64, the rows of the result that hold the sums.
        sources: [total] bool, the tokens that are summed.
        weight: [total], the weight of each source, zero elsewhere.
        averages: whether the weights of an instance sum to one.
    """

    layout: Layout
    instances: tuple[int, ...]
    rows: Tensor
    sources: Tensor
    weight: Tensor
    averages: bool

    def sums(self, values: Tensor, weight: Tensor) -> Tensor:
        """Sums the values of each merging instance with weights.

        Args:
            values: [total, ...], one entry per token before the reduction.
            weight: [total], zero on tokens that are not summed.

        Returns:
            The sums, [merges, ...], in the order of `instances`.
        """
        if values.device.type == "cpu":
            return torch.stack([torch.tensordot(weight[span], values[span], 1) for span in self.spans])
        weighted = values * weight.view(-1, *[1] * (values.dim() - 1))
        # not a call for each instance, which costs more than padding
        sums = segments.sum(weighted, self.layout)
        # autocast sums in single precision
        return sums.to(values.dtype).index_select(0, self._which)

    @cached_property
    def _which(self) -> Tensor:
        """[merges] int64: `instances` as a tensor on the device."""
        return torch.tensor(self.instances, device=self.rows.device)

    @property
    def spans(self) -> tuple[slice, ...]:
        """The packed rows of each merging instance."""
        starts = (0, *accumulate(self.layout.lengths))
        return tuple(slice(starts[i], starts[i + 1]) for i in self.instances)


@dataclass(frozen=True)
class Reduction:
    """A plan for all values per token: which rows stay, and which of them are replaced by sums.

    It may be subclassed: `values`, `tokens` and `target` are what a pruned tower calls.

    Attributes:
        before: the layout before the reduction.
        layout: the layout after it.
        index: [new total] int64, the row that each result row comes from. A merged token has its last source's row.
        merge: the sums that replace some rows. None where tokens are only dropped.
    """

    before: Layout
    layout: Layout
    index: Tensor
    merge: Merge | None = None

    @property
    def is_affine(self) -> bool:
        """Whether the plan commutes with every affine map, so that it may be applied before one."""
        return self.merge is None or self.merge.averages

    def values(self, values: Tensor) -> Tensor:
        """Applies the plan to values per token: [total, ...] -> [new total, ...]."""
        kept = values.index_select(0, self.index)
        if self.merge is None:
            return kept
        return kept.index_copy(0, self.merge.rows, self.merge.sums(values, self.merge.weight.to(values.dtype)))

    def tokens(self, tokens: PackedTokens) -> PackedTokens:
        """Applies the plan to tokens and to all their columns.

        A merged token has the position of its last source, and the summed size of all its sources.
        """
        out = replace(tokens.take(self.index, self.layout), x=self.values(tokens.x))
        if self.merge is None:
            return out
        size = tokens.size if tokens.size is not None else torch.ones_like(tokens.position)
        gathered = self.merge.sums(size, self.merge.sources.to(size.dtype))
        out = replace(out, size=size.index_select(0, self.index).index_copy(0, self.merge.rows, gathered))
        if out.keep_prob is None or out.counted_prob is None:
            return out
        # a merged token stays with certainty
        keep_prob = out.keep_prob.index_fill(0, self.merge.rows, 1.0)
        counted_prob = out.counted_prob.index_fill(0, self.merge.rows, 1.0)
        return replace(out, keep_prob=keep_prob, counted_prob=counted_prob)

    def target(self) -> Tensor:
        """Provenance, [total] int64: the result row that holds each token, -1 for dropped ones."""
        target = self.index.new_full((self.before.total,), -1)
        target[self.index] = torch.arange(len(self.index), device=self.index.device)
        if self.merge is not None:
            for span, row in zip(self.merge.spans, self.merge.rows.tolist(), strict=True):
                target[span] = target[span].masked_fill(self.merge.sources[span], row)
        return target


class TokenReducer(PrintedPart, ABC):
    """Base class of reducers: they plan which tokens stay and what becomes of the others.

    Implementations take `spec` and arguments of their own.

    Attributes:
        needs: the attention statistics that it reads.
        spec: the block that it is built for.
    """

    needs: ClassVar[Stat] = Stat.NONE

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Reduction | None:
        """Plans the reduction of a block's tokens.

        Args:
            tokens: the block's input, x [total, dim].
            scores: [total], larger is kept.
            counts: [batch] int64, how many unprotected tokens of each instance stay.
            stats: the attention statistics that `needs` declares.

        Returns:
            The plan, or None where all tokens stay.
        """


@reducers.register("drop")
class Drop(TokenReducer):
    """Keeps the `counts` tokens of largest score in their order, and removes the others."""

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Reduction | None:
        keep = top_tokens(tokens, scores, counts)
        lengths = tuple(segments.count(keep, tokens.layout).tolist())
        if lengths == tokens.layout.lengths:
            return None
        layout = Layout(lengths, tokens.layout.device)
        return Reduction(tokens.layout, layout, true_rows(keep, layout.total))


@reducers.register("fuse")
class Fuse(TokenReducer):
    """Keeps the `counts` tokens of largest score in their order, and fuses the others into one token.

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

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Reduction | None:
        layout = tokens.layout
        rest = ~top_tokens(tokens, scores, counts)
        last = segments.pad(torch.where(rest, layout.slot, -1), layout, -1).amax(1)
        carrier = rest & (layout.slot == last[layout.instance])

        lost, lengths = torch.stack([segments.count(m, layout) for m in (rest, ~rest | carrier)]).tolist()
        if not any(lost):
            return None
        merging = tuple(i for i, n in enumerate(lost) if n)

        reduced = Layout(tuple(lengths), layout.device)
        index = true_rows(~rest | carrier, reduced.total)
        rows = true_rows(carrier.index_select(0, index), len(merging))
        merge = Merge(layout, merging, rows, rest, self._weight(scores, rest, layout), self.normalize)
        return Reduction(layout, reduced, index, merge)

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


def top_tokens(tokens: PackedTokens, scores: Tensor, counts: Tensor) -> Tensor:
    """Marks the protected tokens and the unprotected ones of largest score, ties by position.

    Args:
        tokens: the tokens.
        scores: [total]. Those of protected tokens are ignored.
        counts: [batch], how many unprotected tokens of each instance are marked.

    Returns:
        [total] bool, true for the marked tokens.
    """
    rank = segments.rank(scores.detach().masked_fill(tokens.protected, float("-inf")), tokens.layout)
    return tokens.protected | (rank < counts[tokens.layout.instance])


def true_rows(mask: Tensor, total: int) -> Tensor:
    """The indices where a mask is true: `nonzero` for a known number of them, without synchronization.

    Args:
        mask: [n] bool.
        total: the number of true entries.

    Returns:
        The indices, [total] int64, ascending.
    """
    row = torch.where(mask, mask.cumsum(0) - 1, total)
    rows = torch.arange(len(mask), device=mask.device)
    return rows.new_empty(total + 1).scatter_(0, row, rows)[:total]
