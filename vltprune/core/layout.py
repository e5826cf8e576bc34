"""Layout: how many tokens each instance of a batch has, and the indices that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..utils.lazy import lazy


class Layout:
    """The number of tokens of each instance in a batch, and the indices that follow from it.

    Each index tensor is computed when it is first read. Where all instances are equally long, none of them needs the lengths
    one by one, so that the batch may be a symbol of torch.export.

    Args:
        lengths: tokens of each instance.
        device: where the index tensors are.

    Attributes:
        device: where the index tensors are.
        batch: the number of instances.
        longest: the number of tokens of the longest instance.
        total: the number of tokens of all instances.
        is_uniform: whether all instances have the same number of tokens.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | None = None):
        self.device = torch.device("cpu") if device is None else device
        lengths = tuple(lengths)
        self.batch = len(lengths)
        # a single length may be a symbol, which must not be compared
        self.is_uniform = self.batch <= 1 or len(set(lengths)) == 1
        self.longest = lengths[0] if self.batch == 1 else max(lengths, default=0)
        self.total = self.batch * self.longest if self.is_uniform else sum(lengths)
        self._lengths = lengths if self.batch != 1 else None

    @classmethod
    def uniform(cls, batch: int, length: int, device: torch.device | None = None) -> Layout:
        """The layout of equally long instances.

        Args:
            batch: the number of instances.
            length: tokens of each.
            device: where the index tensors are.

        Returns:
            The layout.
        """
        layout = cls((length,), device)
        layout.batch, layout.total = batch, batch * length
        return layout

    @lazy
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each instance, as Python integers."""
        return (self.longest,) * self.batch if self._lengths is None else self._lengths

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout) or (self.batch, self.longest) != (other.batch, other.longest):
            return False
        return (self.is_uniform and other.is_uniform) or self.lengths == other.lengths

    __hash__ = None

    def __repr__(self) -> str:
        return f"Layout({self.lengths})"

    def map(self, function: Callable[[int], int]) -> Layout:
        """The layout with each length replaced by a function of it.

        Args:
            function: maps a number of tokens to another, 0 or more.

        Returns:
            The layout.
        """
        if self.is_uniform:
            return Layout.uniform(self.batch, function(self.longest), self.device)
        return Layout([function(length) for length in self.lengths], self.device)

    def combine(self, other: Layout, function: Callable[[int, int], int]) -> Layout:
        """The layout whose lengths are a function of those of two layouts of the same instances.

        Args:
            other: the other layout.
            function: maps a length of this layout and one of the other to a third, 0 or more.

        Returns:
            The layout.
        """
        if self.is_uniform and other.is_uniform:
            return Layout.uniform(self.batch, function(self.longest, other.longest), self.device)
        return Layout([*map(function, self.lengths, other.lengths)], self.device)

    @lazy
    def sizes(self) -> Tensor:
        """[batch] int64: the lengths, as a tensor."""
        if self.is_uniform:
            return torch.full((self.batch,), self.longest, dtype=torch.int64, device=self.device)
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.device)

    @lazy
    def offsets(self) -> Tensor:
        """[batch + 1] int32: where each instance starts, and the total (`cu_seqlens`)."""
        if self.is_uniform:
            return torch.arange(self.batch + 1, dtype=torch.int32, device=self.device) * self.longest
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @lazy
    def starts(self) -> Tensor:
        """[batch] int64: the row at which each instance starts."""
        return self.offsets[:-1].long()

    @lazy
    def instance(self) -> Tensor:
        """[total] int64: the instance of each token."""
        return self.spread(torch.arange(self.batch, device=self.device))

    @lazy
    def slot(self) -> Tensor:
        """[total] int64: the index of each token within its instance."""
        if self.is_uniform:
            slots = torch.arange(self.longest, device=self.device)
            return slots if _is_one(self.batch) else slots.repeat(self.batch)
        return torch.arange(self.total, device=self.device) - self.spread(self.starts)

    @lazy
    def padded_index(self) -> Tensor:
        """[total] int64: the index of each token in the flattened padded batch, instance * longest + slot."""
        return self.instance * self.longest + self.slot

    @lazy
    def valid(self) -> Tensor:
        """[batch, longest] bool: true where the padded batch holds a token."""
        return torch.arange(self.longest, device=self.device) < self.sizes[:, None]

    def spread(self, values: Tensor) -> Tensor:
        """Gives each token the value of its instance.

        Args:
            values: [batch, ...].

        Returns:
            The values, [total, ...]; a view where there is one instance.
        """
        if self.is_uniform:
            return values[:, None].expand(-1, self.longest, *values.shape[1:]).flatten(0, 1)
        return values.index_select(0, self._spread)

    @lazy
    def _spread(self) -> Tensor:
        """[total] int64: the instance of each token, where lengths differ."""
        which = torch.arange(self.batch, device=self.device)
        return torch.repeat_interleave(which, self.sizes, output_size=self.total)

    def grouped(self, groups: int) -> Layout:
        """The layout of the same tokens with consecutive instances joined.

        Args:
            groups: the number of instances afterwards, a divisor of `batch`.
        """
        if groups == self.batch:
            return self
        each = self.batch // groups
        if self.is_uniform:
            return Layout.uniform(groups, each * self.longest, self.device)
        lengths = tuple(sum(self.lengths[i : i + each]) for i in range(0, self.batch, each))
        return Layout(lengths, self.device)


def _is_one(batch: int) -> bool:
    """Whether there is one instance, without a guard on a batch that is a symbol of torch.export."""
    return isinstance(batch, int) and batch == 1
