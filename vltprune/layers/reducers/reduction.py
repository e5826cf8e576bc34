"""Reduction: the plan of one pruned layer, which applies alike to everything per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ...core import precision, segments
from ...core.checks import is_recorded
from ...core.layout import Layout
from ...core.tokens import PackedTokens
from ...utils.lazy import lazy


@dataclass(frozen=True)
class Terms:
    """Further terms of a plan's sums: a token may so go into several result rows.

    Attributes:
        source: [terms] int64, the row before the reduction.
        result: [terms] int64, the result row that it is added to.
        weight: [terms], its weight there. 0 for a term that is none.
    """

    source: Tensor
    result: Tensor
    weight: Tensor

    def add(self, sums: Tensor, values: Tensor) -> Tensor:
        """Adds the terms of a plan to its sums.

        Args:
            sums: the sums so far, [new total, ...].
            values: values per token, [total, ...].

        Returns:
            The sums, [new total, ...].
        """
        weight = self.weight.view(-1, *[1] * (values.dim() - 1))
        weighted = precision.single(values.index_select(0, self.source)) * weight
        return precision.single(sums).index_add(0, self.result, weighted).to(values.dtype)


class Sums(ABC):
    """What becomes of the tokens of a plan that sums some of them: the result rows that are sums, and how they are made.

    Attributes:
        weight: [total], the weight of each token in the sum of its result row.
        target: [total] int64, the result row that each token goes into, -1 for dropped tokens. It counts there for size.
        merged: [new total] bool, the result rows that are sums.
        terms: further terms of the sums, of tokens that go into several result rows. None for none.
    """

    weight: Tensor
    target: Tensor
    merged: Tensor
    terms: Terms | None

    @abstractmethod
    def contents(self, values: Tensor, index: Tensor) -> Tensor:
        """The weighted sums, and single values at the other result rows.

        Args:
            values: [total, ...].
            index: [new total] int64, the row that each result row stands at.

        Returns:
            [new total, ...].
        """

    @abstractmethod
    def counted(self, size: Tensor, index: Tensor) -> Tensor:
        """The sums of sizes, each token once, and single sizes at the other result rows.

        Args:
            size: [total].
            index: as in `contents`.

        Returns:
            [new total].
        """


@dataclass(frozen=True)
class ScatteredSums(Sums):
    """Sums in any number of result rows.

    Attributes:
        target, weight, merged, terms: as `Sums` has them.
        rows: how many result rows there are.
        keeps_norm: whether a sum is scaled to the largest norm of its sources, as in MLERP (arXiv 2312.01026).
    """

    target: Tensor
    weight: Tensor
    merged: Tensor
    rows: int
    keeps_norm: bool = False
    terms: Terms | None = None

    def contents(self, values: Tensor, index: Tensor) -> Tensor:
        sums = self._sums(values, index, self.weight)
        if self.terms is not None:
            return self.terms.add(sums, values)
        return self._scaled(sums, values) if self.keeps_norm else sums

    def counted(self, size: Tensor, index: Tensor) -> Tensor:
        return self._sums(size, index, None)

    @lazy
    def _filled_target(self) -> Tensor:
        """[total] int64: the target, with a row behind the last for dropped tokens."""
        return torch.where(self.target < 0, self.rows, self.target)

    @lazy
    def _summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that are summed, the number of the sum of each, and the result rows that hold the sums."""
        rows = self.merged.nonzero().squeeze(1)
        number = torch.full((self.rows + 1,), -1, device=self.target.device)
        number = number.index_copy(0, rows, torch.arange(rows.shape[0], device=rows.device))
        number = number.index_select(0, self._filled_target)
        sources = (number >= 0).nonzero().squeeze(1)
        return sources, number.index_select(0, sources), rows

    def _sums(self, values: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
        """Sums by result row, weighted or not: values [total, ...] and weight [total] -> [new total, ...]."""
        if values.device.type != "cpu" or is_recorded():
            # without a synchronization, and without the number of sums of one input
            weighted = _times(values, weight)
            sums = weighted.new_zeros(self.rows + 1, *values.shape[1:]).index_add(0, self._filled_target, weighted)
            return sums[:-1].to(values.dtype)
        # most tokens of a merge stay as they are, and a copy costs a fraction of a sum
        sources, number, rows = self._summed
        weighted = _times(values.index_select(0, sources), None if weight is None else weight.index_select(0, sources))
        sums = weighted.new_zeros(rows.shape[0], *values.shape[1:]).index_add(0, number, weighted).to(values.dtype)
        return values.index_select(0, index).index_copy(0, rows, sums)

    def _scaled(self, sums: Tensor, values: Tensor) -> Tensor:
        """The merged rows of sums [new total, ...], scaled to the largest norm of their sources in values [total, ...]."""
        width = prod(values.shape[1:])
        sources, results = (precision.single(one).reshape(one.shape[0], width).norm(dim=1) for one in (values, sums))
        largest = sources.new_zeros(self.rows + 1).scatter_reduce(0, self._filled_target, sources, "amax")[:-1]
        # where sources cancel each other, there is no direction to scale
        factor = largest / results.clamp(min=torch.finfo(results.dtype).tiny).maximum(1e-6 * largest)
        factor = torch.where(self.merged, factor, 1.0)
        return (sums * factor.view(-1, *[1] * (sums.dim() - 1))).to(sums.dtype)


def _times(values: Tensor, weight: Tensor | None) -> Tensor:
    """Values [total, ...], each times its weight [total]; in single precision at least where there are weights."""
    if weight is None:
        return values
    return precision.single(values) * weight.view(-1, *[1] * (values.dim() - 1))


@dataclass(frozen=True)
class Reduction:
    """A plan for all values per token: each result row is a weighted sum of rows, or one row as it is.

    Attributes:
        before: the layout before the reduction.
        layout: the layout after it.
        index: [new total] int64, ascending: the row that each result row stands at. A merged token has its position.
        sums: the result rows that are sums. None where tokens are only dropped.
        is_affine: whether the weights of every result row sum to one, so that the plan commutes with every affine map and may
            be applied before one.
        proportional: whether later layers add the logarithm of a token's size to its attention logits.
    """

    before: Layout
    layout: Layout
    index: Tensor
    sums: Sums | None = None
    is_affine: bool = True
    proportional: bool = False

    @property
    def merged(self) -> Tensor | None:
        """[new total] bool: the result rows that are sums. None where tokens are only dropped."""
        return None if self.sums is None else self.sums.merged

    @property
    def terms(self) -> Terms | None:
        """Further terms of the sums. None for none."""
        return None if self.sums is None else self.sums.terms

    def adding(self, terms: Terms) -> Reduction:
        """The plan with further terms. It must have sums, and not keep norms.

        Args:
            terms: the terms, whose results are then sums.

        Returns:
            The plan.
        """
        sums, rows = self.sums, self.layout.total
        assert sums is not None
        if not rows:
            return self
        number = torch.zeros(rows, device=terms.weight.device)
        number = number.index_add(0, terms.result, (terms.weight != 0).to(number.dtype))
        merged = sums.merged | (number > 0)
        return replace(self, sums=ScatteredSums(sums.target, sums.weight, merged, rows, terms=terms))

    def values(self, values: Tensor) -> Tensor:
        """Applies the plan to values per token: [total, ...] -> [new total, ...]."""
        return values.index_select(0, self.index) if self.sums is None else self.sums.contents(values, self.index)

    def tokens(self, tokens: PackedTokens) -> PackedTokens:
        """Applies the plan to tokens and to all their columns.

        The size of a merged token is the sum of its sources' sizes. In soft training it stays with certainty. Every other
        column has the value of the row that it stands at.
        """
        out = tokens.take(self.index, self.layout, self.values(tokens.x))
        if self.sums is None:
            return out
        size = tokens.size if tokens.size is not None else torch.ones_like(tokens.position)
        size = self.sums.counted(size, self.index)
        out = replace(out, size=size, proportional=self.proportional or tokens.proportional)
        if out.keep_prob is None or out.counted_prob is None:
            return out
        merged = self.sums.merged
        keep_prob, counted_prob = (prob.masked_fill(merged, 1.0) for prob in (out.keep_prob, out.counted_prob))
        return replace(out, keep_prob=keep_prob, counted_prob=counted_prob)

    def provenance(self) -> Tensor:
        """The result row that holds each token, [total] int64, -1 for dropped ones."""
        if self.sums is not None:
            return self.sums.target
        target = self.index.new_full((self.before.total,), -1)
        return target.index_copy(0, self.index, torch.arange(self.index.shape[0], device=self.index.device))


def plan_reduction(
    layout: Layout,
    keep: Tensor,
    leader: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    kept: Layout | None = None,
    is_affine: bool = True,
    at_last: bool = False,
    proportional: bool = False,
    keeps_norm: bool = False,
) -> Reduction | None:
    """Builds the plan that sums each token into its leader.

    Args:
        layout: the instances, [total] tokens.
        keep: [total] bool, the tokens that stay.
        leader: [total] int64, the row of the token that each one goes into: its own for tokens that stay, -1 for tokens that
            are dropped. A leader is its own leader, and of the same instance. None where tokens are only dropped.
        weight: [total], the weight of each token in the sum of its leader's group, 1 for a token alone. None as `leader`.
        kept: how many tokens stay in each instance, `Selection.kept`. None where it is not known, and must be counted.
        is_affine: as `Reduction` has it.
        at_last: whether a merged token stands at its last source and not at its leader, so that in a causal tower no token
            attends to a later one.
        proportional: as `Reduction` has it.
        keeps_norm: as `ScatteredSums` has it.

    Returns:
        The plan, or None where all tokens stay.
    """
    kept = counted(kept, keep, layout)
    if kept == layout:
        return None
    if leader is None or weight is None:
        index, reduced = true_rows(keep, kept, layout)
        return Reduction(layout, reduced, index)
    row = torch.arange(layout.total, device=leader.device)
    group, stands = leader.clamp(min=0), leader
    if at_last:
        last = row.scatter_reduce(0, group, torch.where(leader < 0, -1, row), "amax")
        stands = torch.where(leader < 0, -1, last.index_select(0, group))
    is_result = stands == row
    index, reduced = true_rows(is_result, kept, layout)

    gains = (~keep).index_add(0, group, (leader >= 0) & ~keep)
    merged = gains.index_select(0, group.index_select(0, index))
    number = is_result.cumsum(0) - 1
    target = torch.where(stands < 0, -1, number.index_select(0, stands.clamp(min=0)))
    sums = ScatteredSums(target, weight, merged, reduced.total, keeps_norm)
    return Reduction(layout, reduced, index, sums, is_affine, proportional)


def counted(kept: Layout | None, keep: Tensor, layout: Layout) -> Layout | None:
    """How many tokens of each instance stay.

    Args:
        kept: the numbers, where they are known already.
        keep: [total] bool, the tokens that stay.
        layout: their instances.

    Returns:
        The numbers. None where torch.export makes them a size of its own.
    """
    if kept is not None or torch.compiler.is_exporting():
        return kept
    # the only synchronization of a pruned layer
    return Layout(segments.count(keep, layout).tolist(), layout.device)


def true_rows(mask: Tensor, number: Layout | None, layout: Layout) -> tuple[Tensor, Layout]:
    """Finds where a mask is true.

    Where the number of these rows is known, accelerators and recorded graphs need no synchronization.

    Args:
        mask: [total] bool.
        number: how many there are in each instance. None for one instance of a number that is a size of torch.export.
        layout: the instances.

    Returns:
        The indices, [new total] int64, ascending, and their layout.
    """
    if number is None:
        index = mask.nonzero().squeeze(1)
        torch._check(index.shape[0] >= 1)
        torch._check(index.shape[0] <= layout.total)
        return index, Layout.uniform(1, index.shape[0], layout.device)
    if mask.device.type == "cpu" and not is_recorded():
        return mask.nonzero().squeeze(1), number
    row = torch.where(mask, mask.cumsum(0) - 1, number.total)
    rows = torch.arange(mask.shape[0], device=mask.device)
    return rows.new_empty(number.total + 1).scatter_(0, row, rows)[:-1], number
