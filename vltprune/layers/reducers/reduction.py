"""Reduction: the plan of one pruned layer, which applies alike to everything per token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ...core import precision, segments
from ...core.checks import is_traced
from ...core.tokens import Layout, PackedTokens


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


@dataclass(frozen=True)
class Reduction:
    """A plan for all values per token: each result row is a weighted sum of rows, or one row as it is.

    Attributes:
        before: the layout before the reduction.
        layout: the layout after it.
        index: [new total] int64, ascending: the row that each result row stands at. A merged token has its position.
        target: [total] int64, the result row that each token goes into, -1 for dropped tokens. None where tokens are only
            dropped. It counts there for size and provenance.
        weight: [total], the weight of each token in the sum of its result row. None with `target` None.
        merged: [new total] bool, the result rows that are sums. None with `target` None.
        is_affine: whether the weights of every result row sum to one, so that the plan commutes with every affine map and may
            be applied before one.
        proportional: whether later layers add the logarithm of a token's size to its attention logits.
        keeps_norm: whether a sum is scaled to the largest norm of its sources, as in MLERP (arXiv 2312.01026).
        terms: further terms of the sums, of tokens that go into several result rows. None for none.
    """

    before: Layout
    layout: Layout
    index: Tensor
    target: Tensor | None = None
    weight: Tensor | None = None
    merged: Tensor | None = None
    is_affine: bool = True
    proportional: bool = False
    keeps_norm: bool = False
    terms: Terms | None = None

    def adding(self, terms: Terms) -> Reduction:
        """The plan with further terms. It must have sums, and not keep norms.

        Args:
            terms: the terms, whose results are then sums.

        Returns:
            The plan.
        """
        assert self.merged is not None and not self.keeps_norm
        if not self.layout.total:
            return self
        number = torch.zeros(self.layout.total, device=terms.weight.device)
        number = number.index_add(0, terms.result, (terms.weight != 0).to(number.dtype))
        return replace(self, merged=self.merged | (number > 0), terms=terms)

    def values(self, values: Tensor) -> Tensor:
        """Applies the plan to values per token: [total, ...] -> [new total, ...]."""
        if self.weight is None:
            return values.index_select(0, self.index)
        sums = self._sums(values, self.weight)
        if self.terms is not None:
            return self.terms.add(sums, values)
        return self._scaled(sums, values) if self.keeps_norm else sums

    def tokens(self, tokens: PackedTokens) -> PackedTokens:
        """Applies the plan to tokens and to all their columns.

        The size of a merged token is the sum of its sources' sizes. In soft training it stays with certainty. Every other
        column has the value of the row that it stands at.
        """
        out = replace(tokens.take(self.index, self.layout), x=self.values(tokens.x))
        if self.merged is None:
            return out
        size = tokens.size if tokens.size is not None else torch.ones_like(tokens.position)
        size = self._sums(size, torch.ones_like(size))
        out = replace(out, size=size, proportional=self.proportional or tokens.proportional)
        if out.keep_prob is None or out.counted_prob is None:
            return out
        keep_prob, counted_prob = (prob.masked_fill(self.merged, 1.0) for prob in (out.keep_prob, out.counted_prob))
        return replace(out, keep_prob=keep_prob, counted_prob=counted_prob)

    def provenance(self) -> Tensor:
        """The result row that holds each token, [total] int64, -1 for dropped ones."""
        if self.target is not None:
            return self.target
        target = self.index.new_full((self.before.total,), -1)
        return target.index_copy(0, self.index, torch.arange(len(self.index), device=self.index.device))

    @cached_property
    def _filled_target(self) -> Tensor:
        """[total] int64: the target, with a row behind the last for dropped tokens."""
        assert self.target is not None
        return torch.where(self.target < 0, self.layout.total, self.target)

    @cached_property
    def _summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that are summed, the number of the sum of each, and the result rows that hold the sums."""
        assert self.merged is not None
        rows = self.merged.nonzero().squeeze(1)
        number = torch.full((self.layout.total + 1,), -1, device=self.index.device)
        number = number.index_copy(0, rows, torch.arange(len(rows), device=rows.device))
        number = number.index_select(0, self._filled_target)
        sources = (number >= 0).nonzero().squeeze(1)
        return sources, number.index_select(0, sources), rows

    def _sums(self, values: Tensor, weight: Tensor) -> Tensor:
        """Weighted sums by result row: values [total, ...] and weight [total] -> [new total, ...]."""
        shape = (-1, *[1] * (values.dim() - 1))
        if values.device.type != "cpu" or is_traced():
            # without a synchronization, and without the number of sums of one input
            weighted = precision.single(values) * weight.view(shape)
            sums = weighted.new_zeros(self.layout.total + 1, *values.shape[1:]).index_add(
                0, self._filled_target, weighted
            )
            return sums[:-1].to(values.dtype)
        # most tokens of a merge stay as they are, and a copy costs a fraction of a sum
        sources, number, rows = self._summed
        weighted = precision.single(values.index_select(0, sources)) * weight.index_select(0, sources).view(shape)
        sums = weighted.new_zeros(len(rows), *values.shape[1:]).index_add(0, number, weighted).to(values.dtype)
        return values.index_select(0, self.index).index_copy(0, rows, sums)

    def _scaled(self, sums: Tensor, values: Tensor) -> Tensor:
        """The merged rows of sums [new total, ...], scaled to the largest norm of their sources in values [total, ...]."""
        assert self.merged is not None
        width = prod(values.shape[1:])
        sources, results = (precision.single(one).reshape(len(one), width).norm(dim=1) for one in (values, sums))
        largest = sources.new_zeros(self.layout.total + 1).scatter_reduce(0, self._filled_target, sources, "amax")[:-1]
        # where sources cancel each other, there is no direction to scale
        factor = largest / results.clamp(min=torch.finfo(results.dtype).tiny).maximum(1e-6 * largest)
        factor = torch.where(self.merged, factor, 1.0)
        return (sums * factor.view(-1, *[1] * (sums.dim() - 1))).to(sums.dtype)


def plan_reduction(
    layout: Layout,
    keep: Tensor,
    leader: Tensor,
    weight: Tensor | None = None,
    *,
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
            are dropped. A leader is its own leader, and of the same instance.
        weight: [total], the weight of each token in the sum of its leader's group, 1 for a token alone. None where tokens are
            only dropped.
        is_affine: as `Reduction` has it.
        at_last: whether a merged token stands at its last source and not at its leader, so that in a causal tower no token
            attends to a later one.
        proportional: as `Reduction` has it.
        keeps_norm: as `Reduction` has it.

    Returns:
        The plan, or None where all tokens stay.
    """
    row = torch.arange(layout.total, device=leader.device)
    group, stands = leader.clamp(min=0), leader
    if at_last and weight is not None:
        last = row.scatter_reduce(0, group, torch.where(leader < 0, -1, row), "amax")
        stands = torch.where(leader < 0, -1, last.index_select(0, group))
    is_result = stands == row
    # the only synchronization of a pruned layer
    after, lost = torch.stack([segments.count(mask, layout) for mask in (is_result, ~keep)]).tolist()
    if not any(lost):
        return None
    reduced = Layout(tuple(after), layout.device)
    index = true_rows(is_result, reduced.total)
    if weight is None:
        return Reduction(layout, reduced, index)

    gains = (~keep).index_add(0, group, (leader >= 0) & ~keep)
    merged = gains.index_select(0, group.index_select(0, index))
    number = is_result.cumsum(0) - 1
    target = torch.where(stands < 0, -1, number.index_select(0, stands.clamp(min=0)))
    return Reduction(layout, reduced, index, target, weight, merged, is_affine, proportional, keeps_norm)


def true_rows(mask: Tensor, total: int) -> Tensor:
    """The indices where a mask is true: `nonzero` for a known number of them, without synchronization.

    Args:
        mask: [n] bool.
        total: how many of its entries are true.

    Returns:
        The indices, [total] int64, ascending.
    """
    row = torch.where(mask, mask.cumsum(0) - 1, total)
    rows = torch.arange(len(mask), device=mask.device)
    return rows.new_empty(total + 1).scatter_(0, row, rows)[:total]
