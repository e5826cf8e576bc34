"""Token selectors: each chooses which tokens stay, and what each of the others resembles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...core import segments
from ...core.layout import Layout
from ...core.statistics import AttentionStats, Stat
from ...core.tokens import PackedTokens
from ...registry import selectors
from ..block_spec import BlockSpec
from ..printing import PrintedPart


@dataclass(frozen=True)
class Selection:
    """Which tokens of a block stay.

    Attributes:
        keep: [total] bool, true for the tokens that stay; for all protected ones.
        match: [total] int64, for a token that goes, the row of the token that it resembles, which stays and is unprotected;
            its own row for a token that stays. None where the selector relates no tokens.
        columns: values per token by name, [total, ...], that the tokens carry to later layers.
        kept: how many tokens stay in each instance, protected ones included, where the pruner knows it already. A selector
            leaves it None.
    """

    keep: Tensor
    match: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Layout | None = None


class TokenSelector(PrintedPart, ABC):
    """Base class of selectors: they choose which tokens of a block stay.

    Implementations take `spec` and arguments of their own.

    Attributes:
        needs: the attention statistics that it reads.
        fixed: whether it keeps exactly `counts` tokens, whatever they hold.
        reads_grid: whether it reads the row and the column of patches, which the tower then gives its tokens.
        takes_kept: whether `forward` also takes `kept`: a layout with `counts` as Python integers, or None where they are not
            known without a synchronization.
        matches: whether its selections have a match for every token that goes, so that no reducer compares tokens.
        spec: the block that it is built for.
    """

    needs: Stat = Stat.NONE
    fixed: ClassVar[bool] = True
    reads_grid: ClassVar[bool] = False
    takes_kept: ClassVar[bool] = False
    matches: ClassVar[bool] = False
    spec: BlockSpec

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        """Selects tokens of a block.

        Args:
            tokens: the block's input, x [total, dim].
            scores: [total], larger is kept longer; those that are equal within rounding are exactly equal.
            counts: [batch] int64, how many unprotected tokens of each instance stay. Larger numbers than there are mean all.
            stats: the attention statistics that `needs` declares.

        Returns:
            The selection. It may keep fewer than `counts`, never more, and one at least where `counts` is one at least.
        """

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        """Multiply-accumulates of the selector's own comparisons, [batch]; by default none.

        Args:
            before: [batch], the tokens that enter the block.
            after: [batch], the tokens that leave it.
        """
        return 0.0


def largest(kept: Layout | None) -> int | None:
    """The largest count of a layout. None where there is none."""
    return None if kept is None else kept.longest


def padded_selection(
    tokens: PackedTokens, keep: Tensor, match: Tensor | None = None, columns: Mapping[str, Tensor] | None = None
) -> Selection:
    """Makes a selection of what algorithms on the padded batch returned.

    Args:
        tokens: the tokens of a block.
        keep: [batch, longest] bool, the unprotected tokens that stay.
        match: [batch, longest] int64, the slot of the token that each one resembles. None where tokens are not related.
        columns: further columns by name, [batch, longest, ...]. None for none.

    Returns:
        The selection, with all protected tokens.
    """
    layout = tokens.layout
    return Selection(
        tokens.protected | segments.unpad(keep, layout),
        None if match is None else segments.unpad(match + layout.offsets[:-1, None], layout),
        {name: segments.unpad(column, layout) for name, column in (columns or {}).items()},
    )


@selectors.register("top")
class Top(TokenSelector):
    """The `counts` tokens of largest score, ties by position."""

    def forward(self, tokens: PackedTokens, scores: Tensor, counts: Tensor, stats: AttentionStats) -> Selection:
        return Selection(top_tokens(tokens, scores, counts))


def top_tokens(tokens: PackedTokens, scores: Tensor, counts: Tensor) -> Tensor:
    """The protected tokens and the `counts` unprotected ones of largest score, ties by position.

    Args:
        tokens: the tokens of a block.
        scores: [total].
        counts: [batch] int64.

    Returns:
        The mask, [total] bool.
    """
    layout = tokens.layout
    ranked = segments.pad(scores.detach().masked_fill(tokens.protected, float("-inf")), layout, float("-inf"))
    return first_tokens(tokens, ranked.argsort(dim=1, descending=True, stable=True), counts)


def first_tokens(tokens: PackedTokens, order: Tensor, counts: Tensor | Layout) -> Tensor:
    """The protected tokens and the first `counts` unprotected ones in an order.

    Args:
        tokens: the tokens of a block.
        order: [batch, longest] int64, the slots of each instance's tokens, the unprotected ones first.
        counts: [batch] int64, or the same numbers as a layout.

    Returns:
        The mask, [total] bool.
    """
    layout = tokens.layout
    if isinstance(counts, Layout) and counts.is_uniform and layout.is_uniform:
        keep = segments.pad(tokens.protected, layout).scatter(1, order[:, : counts.longest], 1)
        return segments.unpad(keep, layout)
    counts = counts.sizes if isinstance(counts, Layout) else counts
    stays = torch.arange(layout.longest, device=order.device) < counts[:, None]
    keep = torch.zeros_like(stays).scatter(1, order, stays)
    return tokens.protected | segments.unpad(keep, layout)
