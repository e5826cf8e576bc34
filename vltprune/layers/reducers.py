"""What becomes of the tokens that do not stay: a TokenReducer makes a plan, and the plan applies to anything per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from ..core import segments
from ..core.attention import AttentionStats, Stat
from ..core.tokens import Layout, PackedTokens
from ..registry import reducers
from .block_spec import BlockSpec
from .printing import PrintedPart

_EPS = 1e-8


@dataclass(frozen=True)
class Merge:
    """One weighted sum for each instance that loses tokens.

    layout    of the tokens that are summed
    instances which of its instances they are, on the host
    rows      [merges] int64: where their sums stand in the result
    sources   [total] bool: the tokens that are summed
    weight    [total]: the share of each source, zero elsewhere
    averages  whether the shares of an instance sum to one
    """

    layout: Layout
    instances: tuple[int, ...]
    rows: Tensor
    sources: Tensor
    weight: Tensor
    averages: bool

    def sums(self, values: Tensor, weight: Tensor) -> Tensor:
        """values [total, ...] -> [merges, ...]."""
        if values.device.type == "cpu":
            return torch.stack([torch.tensordot(weight[span], values[span], 1) for span in self.spans])
        weighted = values * weight.view(-1, *[1] * (values.dim() - 1))
        sums = segments.sum(weighted, self.layout)  # not a call for each instance, which costs more than padding
        return sums.to(values.dtype).index_select(0, self._which)  # autocast sums in single precision

    @cached_property
    def _which(self) -> Tensor:
        """[merges] int64: `instances`, on the device."""
        return torch.tensor(self.instances, device=self.rows.device)

    @property
    def spans(self) -> tuple[slice, ...]:
        """The packed rows of each instance."""
        starts = (0, *accumulate(self.layout.lengths))
        return tuple(slice(starts[i], starts[i + 1]) for i in self.instances)


@dataclass(frozen=True)
class Reduction:
    """A plan: which rows stay, and what they gather. It applies alike to contents, positions and sizes.

    before  the layout it starts from
    layout  of the result
    index   [new total] int64: the row each result row comes from; a merged token stands where its last source stood
    merge   None, or the sums that replace the contents of some rows
    """

    before: Layout
    layout: Layout
    index: Tensor
    merge: Merge | None = None

    @property
    def is_affine(self) -> bool:
        """Whether the plan may come before any affine map as well as after it."""
        return self.merge is None or self.merge.averages

    def values(self, values: Tensor) -> Tensor:
        """Per-token values [total, ...] -> [new total, ...]."""
        kept = values.index_select(0, self.index)
        if self.merge is None:
            return kept
        return kept.index_copy(0, self.merge.rows, self.merge.sums(values, self.merge.weight.to(values.dtype)))

    def tokens(self, tokens: PackedTokens) -> PackedTokens:
        """The tokens after the plan. Merged ones sit at their last source's position and count all their sources."""
        out = replace(tokens.take(self.index, self.layout), x=self.values(tokens.x))
        if self.merge is None:
            return out
        size = tokens.size if tokens.size is not None else torch.ones_like(tokens.position)
        gathered = self.merge.sums(size, self.merge.sources.to(size.dtype))
        out = replace(out, size=size.index_select(0, self.index).index_copy(0, self.merge.rows, gathered))
        if out.keep_prob is None or out.counted_prob is None:
            return out
        keep_prob, counted_prob = (
            share.index_fill(0, self.merge.rows, 1.0) for share in (out.keep_prob, out.counted_prob)
        )
        return replace(out, keep_prob=keep_prob, counted_prob=counted_prob)  # a merged token is all there

    def target(self) -> Tensor:
        """[total] int64: the result row that holds each token, -1 for dropped ones. Provenance, for pictures."""
        target = self.index.new_full((self.before.total,), -1)
        target[self.index] = torch.arange(len(self.index), device=self.index.device)
        if self.merge is not None:
            for span, row in zip(self.merge.spans, self.merge.rows.tolist(), strict=True):
                target[span] = target[span].masked_fill(self.merge.sources[span], row)
        return target


class TokenReducer(PrintedPart, ABC):
    """Plans what to do with `counts` [batch] unprotected tokens to keep. `needs` declares the statistics it reads.

    Implementations take `spec` and their own arguments.
    """

    needs: ClassVar[Stat] = Stat.NONE

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Reduction | None:
        """scores [total], counts [batch] int64 -> a Reduction of these tokens, or None where all of them stay."""


@reducers.register("drop")
class Drop(TokenReducer):
    """Keep the `counts` best, in their order; the rest is gone."""

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Reduction | None:
        keep = top_tokens(tokens, scores, counts)
        lengths = tuple(segments.count(keep, tokens.layout).tolist())
        if lengths == tokens.layout.lengths:
            return None
        layout = Layout(lengths, tokens.layout.device)
        return Reduction(tokens.layout, layout, true_rows(keep, layout.total))


@reducers.register("fuse")
class Fuse(TokenReducer):
    """Keep the `counts` best, in their order, and one token more: the sum of the rest, weighted by their scores.

    MADTP (arXiv 2403.02991), section 3.3: sum of score_j / (sum of the rest's scores + 1e-8) x_j. EViT (arXiv 2202.07800),
    equation 3, does not divide: `normalize=False`. The merged token takes the place of its last source, so that in a
    causal tower nothing sees the future. Where the rest's scores do not sum to something positive, it is their mean.
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
        """[total]: each token's share of its instance's merged token."""
        scores = scores.masked_fill(~rest, 0.0)
        if not self.normalize:
            return scores
        total, size = segments.sum(scores, layout), segments.sum(scores.abs(), layout)
        share = scores / (total + _EPS)[layout.instance]
        even = rest.to(scores.dtype) / segments.count(rest, layout).clamp(min=1)[layout.instance]
        usable = (total > 1e-3 * size) & (total > 1e3 * _EPS)
        return torch.where(usable[layout.instance], share, even)


def top_tokens(tokens: PackedTokens, scores: Tensor, counts: Tensor) -> Tensor:
    """[total] bool: the protected tokens, and the `counts` [batch] unprotected ones of largest score; ties by place."""
    standing = segments.rank(scores.detach().masked_fill(tokens.protected, float("-inf")), tokens.layout)
    return tokens.protected | (standing < counts[tokens.layout.instance])


def true_rows(mask: Tensor, total: int) -> Tensor:
    """Where mask [n] bool is true: [total] int64. Like `nonzero` when `total` is known, and then without a host sync."""
    row = torch.where(mask, mask.cumsum(0) - 1, total)
    rows = torch.arange(len(mask), device=mask.device)
    return rows.new_empty(total + 1).scatter_(0, row, rows)[:total]
