"""Regions: which tokens attend to each other, where these are not all of an instance, or where a token is several rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.lazy import lazy
from . import precision, segments
from .layout import Layout
from .tokens import PackedTokens


@dataclass(frozen=True)
class Regions:
    """The regions that attention stays within, such as windows of an image, and how many rows of attention a token is.

    A region is of one instance, and the regions of an instance follow each other.

    Attributes:
        layout: the rows of each region.
        rows: how many rows of attention a token is, such as the patches that become one visual token.
        order: [total] int64, the tokens region after region. None where that is the order in which they are.
        bias: [rows of all], what is added to the logits of each row as a key, region after region. None for nothing.
    """

    layout: Layout
    rows: int = 1
    order: Tensor | None = None
    bias: Tensor | None = None

    @lazy
    def _inverse(self) -> Tensor:
        """[total] int64: the place of each token in `order`."""
        assert self.order is not None
        place = torch.arange(self.order.shape[0], device=self.order.device)
        return torch.empty_like(place).scatter_(0, self.order, place)

    def spread(self, values: Tensor) -> Tensor:
        """Gives each row the value of its token.

        Args:
            values: [total, ...].

        Returns:
            The values, region after region, [rows of all, ...].
        """
        values = values if self.order is None else values.index_select(0, self.order)
        return values if self.rows == 1 else values.repeat_interleave(self.rows, 0)

    def gather(self, values: Tensor) -> Tensor:
        """Gathers values per row by token: the inverse of `spread`.

        Args:
            values: [rows of all, ...], region after region.

        Returns:
            The values of the rows of each token, [total, rows, ...].
        """
        values = values.unflatten(0, (-1, self.rows))
        return values if self.order is None else values.index_select(0, self._inverse)

    def rows_of(self, tokens: PackedTokens) -> PackedTokens:
        """The rows as tokens of instances that are regions, for attention and its statistics.

        Args:
            tokens: the tokens, x [total, rows * dim].

        Returns:
            One token a row, x [rows of all, dim], with what biases attention: sizes and keep probabilities.
        """

        def column(values: Tensor | None) -> Tensor | None:
            return None if values is None else self.spread(values)

        x = tokens.x if self.order is None else tokens.x.index_select(0, self.order)
        return PackedTokens(
            x.reshape(self.layout.total, -1),
            self.layout,
            self.spread(tokens.position),
            self.spread(tokens.protected),
            None,
            column(tokens.size),
            column(tokens.keep_prob),
            column(tokens.counted_prob),
            tokens.proportional,
        )

    def pairs(self, layout: Layout) -> Tensor:
        """Counts the pairs of a query and a key.

        Args:
            layout: the instances of the tokens.

        Returns:
            The pairs of rows of each instance, [batch], as floating-point numbers to compute with.
        """
        keys = self.layout.spread(self.layout.sizes).to(precision.widest_float(layout.device))
        return segments.sum(keys.unflatten(0, (-1, self.rows)).sum(1), layout)
