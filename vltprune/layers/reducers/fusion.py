"""Fusion: all tokens of an instance that go become one more token."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...core import precision, segments
from ...core.kernels.native import kernels
from ...core.layout import Layout
from ...utils.lazy import lazy
from .reduction import Reduction, Sums, counted, true_rows


@dataclass(frozen=True)
class FusedSums(Sums):
    """One sum for each instance: a product of the weights with the tokens.

    Attributes:
        before: the layout before the reduction.
        sources: [total] bool, the tokens that are summed.
        shares: [total], their weights, 0 for other tokens.
        result: [sums] int64, the result row of each sum.
        instances: [sums] int64, the instance of each sum. None for a sum in each instance.
        number: [total] int64, the result row of each token that stays.
        rows: how many result rows there are.
        terms: none.
    """

    before: Layout
    sources: Tensor
    shares: Tensor
    result: Tensor
    instances: Tensor | None
    number: Tensor
    rows: int
    terms: None = None

    @lazy
    def weight(self) -> Tensor:
        return torch.where(self.sources, self.shares, 1.0)

    @lazy
    def target(self) -> Tensor:
        of_instance = self.result
        if self.instances is not None:
            of_instance = self.result.new_zeros(self.before.batch).index_copy(0, self.instances, self.result)
        return torch.where(self.sources, self.before.spread(of_instance), self.number)

    @lazy
    def _which(self) -> list[int]:
        """The instance of each sum."""
        return list(range(self.before.batch)) if self.instances is None else self.instances.tolist()

    @lazy
    def merged(self) -> Tensor:
        return torch.zeros(self.rows, dtype=torch.bool, device=self.result.device).index_fill(0, self.result, 1)

    def contents(self, values: Tensor, index: Tensor) -> Tensor:
        native = kernels(values)
        if native is not None and self.shares.dtype == values.dtype:
            return native.fuse(values, self.shares, self.sources, index, self.result, self._which, self.before.lengths)
        rows = precision.single(values).reshape(values.shape[0], prod(values.shape[1:]))
        sums = segments.weighted_sum(self.shares[:, None].to(rows.dtype), rows, self.before)
        return self._place(values, index, sums.view(-1, *values.shape[1:]))

    def counted(self, size: Tensor, index: Tensor) -> Tensor:
        native = kernels(self.shares)
        if native is not None and size.dtype in (torch.float32, torch.int64) and type(size) is Tensor:
            return native.fuse(size, None, self.sources, index, self.result, self._which, self.before.lengths)
        return self._place(size, index, segments.sum(size.masked_fill(~self.sources, 0), self.before))

    def _place(self, values: Tensor, index: Tensor, sums: Tensor) -> Tensor:
        """The rows of values [total, ...] at `index`, with the sums of all instances [batch, ...] in place of some."""
        sums = sums if self.instances is None else sums.index_select(0, self.instances)
        return values.index_select(0, index).index_copy(0, self.result, sums.to(values.dtype))


def plan_fusion(
    layout: Layout, keep: Tensor, weight: Tensor, kept: Layout | None = None, *, is_affine: bool = True
) -> Reduction | None:
    """Builds the plan that sums all tokens of an instance that go into one more token, at the last of them.

    Args:
        layout: the instances, [total] tokens.
        keep: [total] bool, the tokens that stay.
        weight: [total], the weight of each token that goes, 0 for those that stay.
        kept: as in `plan_reduction`.
        is_affine: as `Reduction` has it.

    Returns:
        The plan, or None where all tokens stay.
    """
    kept = counted(kept, keep, layout)
    if kept == layout:
        return None
    sources, instances, after = ~keep, None, None
    slots = segments.pad(torch.where(sources, layout.slot, -1), layout, -1).amax(1)
    if kept is None:
        # whether anything goes is not known: the last token is else the sum of itself alone
        slots = torch.where(slots < 0, layout.sizes - 1, slots)
        alone = keep & (layout.slot == layout.spread(slots))
        sources, weight = sources | alone, torch.where(alone, 1.0, weight)
    else:
        lost = layout.combine(kept, lambda before, behind: before - behind)
        after = kept.combine(lost, lambda stay, go: stay + (go > 0))
        if not lost.is_uniform and 0 in lost.lengths:
            instances = torch.tensor([i for i, go in enumerate(lost.lengths) if go], device=layout.device)
    last = layout.starts + slots
    last = last if instances is None else last.index_select(0, instances)
    is_result = keep.index_fill(0, last, 1)
    index, reduced = true_rows(is_result, after, layout)
    number = is_result.cumsum(0) - 1
    sums = FusedSums(layout, sources, weight, number.index_select(0, last), instances, number, reduced.total)
    return Reduction(layout, reduced, index, sums, is_affine)


def plan_fusion_natively(
    native: Any, layout: Layout, keep: Tensor, scores: Tensor, is_normalized: bool
) -> Reduction | None:
    """Builds the plan of `plan_fusion` in one call, its weights included.

    Args:
        native: the compiled kernels.
        layout: the instances, [total] tokens.
        keep: [total] bool, the tokens that stay.
        scores: [total], by which the tokens that go are weighted.
        is_normalized: whether the weights of an instance sum to one.

    Returns:
        The plan, or None where all tokens stay.
    """
    shares, index, number, result, instances, lengths = native.plan_fusion(scores, keep, layout.lengths, is_normalized)
    if not instances:
        return None
    after = Layout(lengths, layout.device)
    every = None if len(instances) == layout.batch else torch.tensor(instances, device=layout.device)
    sums = FusedSums(layout, ~keep, shares, result, every, number, after.total)
    return Reduction(layout, after, index, sums, is_affine=is_normalized)
