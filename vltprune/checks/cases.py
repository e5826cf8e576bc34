"""Case: one random batch with everything that a part receives, built from a few settings that can be printed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from ..core.layout import Layout
from ..core.statistics import AttentionStats, Stat
from ..core.tokens import PackedTokens
from ..layers import BlockSpec, Guidance, Selection

DIM, HEADS, HEAD_DIM, ANCHORS, DEPTHS = 8, 2, 4, 3, 4
SEGMENTS = 2  # of a text
MOST_TOKENS, MOST_INSTANCES = 9, 4  # small batches have every edge, and a failure that a reader can follow
SHARES = (0.0, 0.2, 1.0)  # of protected tokens, all of them included
LEVELS = (1, 3, 1000)  # distinct values that scores take: ties are where a selection goes wrong
KEPT = (0.0, 0.5, 0.9, 1.0)  # shares of unprotected tokens that a selection keeps
LOGITS = (0.0, 1.0, 1e4)


@dataclass(frozen=True)
class CaseSettings:
    """What a random batch is built from. Equal settings build equal batches.

    Attributes:
        lengths: tokens of each instance, at least one.
        seed: seed of contents, scores, statistics and counts.
        has_summary: whether a protected token represents its instance.
        causal: whether tokens attend to earlier ones only; the summary token is then the last.
        protected: the share of other tokens that are protected, in [0, 1].
        equal: whether all tokens have the same contents.
    """

    lengths: tuple[int, ...]
    seed: int
    has_summary: bool = True
    causal: bool = False
    protected: float = 0.0
    equal: bool = False

    @classmethod
    def from_seed(cls, seed: int) -> CaseSettings:
        """Settings drawn at random.

        Args:
            seed: an integer; equal ones draw equal settings.
        """
        draw = random.Random(seed)
        lengths = tuple(draw.randint(1, MOST_TOKENS) for _ in range(draw.randint(1, MOST_INSTANCES)))
        flags = (draw.random() < 0.5, draw.random() < 0.25)
        return cls(lengths, seed, *flags, protected=draw.choice(SHARES), equal=draw.random() < 0.25)

    def __str__(self) -> str:
        summary = "with a summary token" if self.has_summary else "without a summary token"
        facts = [f"x [{sum(self.lengths)}, {DIM}] of instances of {_listed(self.lengths)} tokens", summary]
        facts += ["causal"] if self.causal else []
        facts += [f"{self.protected:.0%} of the others protected"] if self.protected else []
        facts += ["all contents equal"] if self.equal else []
        return f"{', '.join(facts)}, seed {self.seed}"

    def build(self) -> Case:
        """The batch of these settings."""
        layout, g = Layout(self.lengths), generator(self.seed)
        choose = random.Random(self.seed)
        spread = 0.0 if self.equal else 1.0
        tokens = packed(layout, DIM, self.protected, self.has_summary, self.causal, spread, g)
        if choose.random() < 0.25:  # earlier layers merged tokens
            tokens = dataclasses.replace(tokens, size=1 + torch.arange(layout.total) % 3)
        logits = choose.choice(LOGITS)
        affinity = few(layout.total, choose.choice(LEVELS), g, ANCHORS) * logits - logits / 2
        mapped = tokens.with_x(torch.randn(layout.total, 5, generator=g))
        attend = "sparsemax" if choose.random() < 0.5 else "softmax"
        return Case(
            self,
            BlockSpec("image", choose.randrange(DEPTHS), DEPTHS, DIM, HEADS, self.has_summary, self.causal),
            tokens,
            random_stats(layout.total, choose.choice(LEVELS), g),
            Guidance(affinity, mapped, attend),
            few(layout.total, choose.choice(LEVELS), g) - choose.choice((0.0, 0.5)),
            torch.tensor([choose.randint(0, n + 1) for n in self.lengths]),
            random_selection(tokens, choose.choice(KEPT), choose.random() < 0.5, g),
            torch.randn(layout.batch, SEGMENTS, DIM, generator=g),
        )


@dataclass(frozen=True)
class Case:
    """One batch at one block, with everything that parts receive.

    Attributes:
        settings: what it was built from.
        spec: the block.
        tokens: x [total, dim].
        stats: every attention statistic.
        guidance: affinity [total, anchors].
        scores: [total], in single precision.
        counts: [batch] int64, how many unprotected tokens are to stay; some are larger than there are.
        selection: tokens that are to stay, whatever the counts are.
        query: the text of each instance, [batch, segments, DIM].
    """

    settings: CaseSettings
    spec: BlockSpec
    tokens: PackedTokens
    stats: AttentionStats
    guidance: Guidance
    scores: Tensor
    counts: Tensor
    selection: Selection
    query: Tensor

    @property
    def batch(self) -> int:
        """The number of instances."""
        return self.tokens.layout.batch

    @property
    def available(self) -> list[int]:
        """The number of unprotected tokens of each instance."""
        return [int(free.sum()) for free in self.tokens.free.split(self.tokens.layout.lengths)]

    def take(self, index: Tensor, sizes: Sequence[int], counts: Tensor) -> Case:
        """Gathers tokens by index.

        Args:
            index: [new total] int64, the row of each token.
            sizes: tokens of each new instance.
            counts: [new batch] int64, the counts of the new instances.

        Returns:
            The case of these tokens, in every field.
        """
        layout = Layout(tuple(sizes))
        tokens = self.guidance.tokens.take(index, layout)
        return dataclasses.replace(
            self,
            tokens=self.tokens.take(index, layout),
            stats=self.stats.mapped(lambda value: value[index]),
            guidance=dataclasses.replace(self.guidance, affinity=self.guidance.affinity[index], tokens=tokens),
            scores=self.scores[index],
            counts=counts,
            selection=self._selection(index),
        )

    def _selection(self, index: Tensor) -> Selection:
        """The selection of the tokens at `index`, whose matches are among them."""
        keep, match = self.selection.keep[index], self.selection.match
        if match is None:
            return Selection(keep)
        row = torch.zeros(len(match), dtype=torch.int64)
        row[index] = torch.arange(len(index))
        return Selection(keep, row[match[index]])

    def instances(self, order: Sequence[int]) -> Case:
        """Some of the instances.

        Args:
            order: their indices, in the order that they get.
        """
        rows = torch.arange(self.tokens.layout.total).split(self.tokens.layout.lengths)
        index, sizes = torch.cat([rows[i] for i in order]), [len(rows[i]) for i in order]
        return dataclasses.replace(self.take(index, sizes, self.counts[[*order]]), query=self.query[[*order]])

    def shuffled(self) -> tuple[Case, Tensor]:
        """The tokens of each instance in another order, and the index [total] that gives it."""
        g = generator(self.settings.seed + 1)
        rows = torch.arange(self.tokens.layout.total).split(self.tokens.layout.lengths)
        index = torch.cat([row[torch.randperm(len(row), generator=g)] for row in rows])
        return self.take(index, self.tokens.layout.lengths, self.counts), index

    def reordered(self) -> tuple[Case, list[int]]:
        """The instances in another order, and that order."""
        order = torch.randperm(self.batch, generator=generator(self.settings.seed + 2)).tolist()
        return self.instances(order), order

    def to(self, dtype: torch.dtype) -> Case:
        """The batch as a model in another dtype has it: contents in that dtype, statistics and scores in single precision."""
        if dtype == self.tokens.x.dtype:
            return self
        tokens = self.tokens.with_x(self.tokens.x.to(dtype))
        guided = self.guidance.tokens.with_x(self.guidance.tokens.x.to(dtype))
        return dataclasses.replace(self, tokens=tokens, guidance=dataclasses.replace(self.guidance, tokens=guided))


def packed(
    layout: Layout,
    dim: int,
    protect: float,
    summary: bool,
    causal: bool,
    spread: float,
    g: torch.Generator,
) -> PackedTokens:
    """Random tokens. The summary token is the first of its instance, in a causal tower the last.

    Args:
        layout: their instances.
        dim: the width of a token.
        protect: the share of protected tokens, in [0, 1], besides the summary token.
        summary: whether there is a summary token.
        causal: whether the tower is causal.
        spread: the standard deviation of contents; 0 makes all tokens equal.
        g: draws them.
    """
    place = layout.sizes[layout.instance] - 1 if causal else torch.zeros(layout.total, dtype=torch.int64)
    is_summary = layout.slot == place
    protected = torch.rand(layout.total, generator=g) < protect
    x = 0.3 + spread * torch.randn(layout.total, dim, generator=g)
    gaps = torch.randint(1, 3, (layout.total,), generator=g)  # earlier pruning leaves gaps between positions
    position = gaps.cumsum(0) - gaps.cumsum(0)[layout.offsets[:-1].long()][layout.instance]
    return PackedTokens(
        x, layout, position, protected | is_summary if summary else protected, is_summary if summary else None
    )


def random_stats(total: int, distinct: int, g: torch.Generator) -> AttentionStats:
    """Every attention statistic, with values in [0, 1].

    Args:
        total: the number of tokens.
        distinct: how many different values there are.
        g: draws them.
    """
    by_head = dict.fromkeys((Stat.SUMMARY, Stat.CONTEXT, Stat.VALUE, Stat.LAST, Stat.FROM_QUERY), (HEADS,))
    widths = by_head | dict.fromkeys((Stat.KEY, Stat.VALUE_MEAN), (HEAD_DIM,))
    values = {stat: few(total, distinct, g, *widths.get(stat, ())) for stat in Stat if stat}
    return AttentionStats(reduce(or_, values), values)


def random_selection(tokens: PackedTokens, share: float, matched: bool, g: torch.Generator) -> Selection:
    """A random selection of tokens, protected ones included.

    Args:
        tokens: the tokens.
        share: the share of unprotected tokens that stay, in [0, 1].
        matched: whether each token that goes resembles one that stays.
        g: draws it.
    """
    layout, free = tokens.layout, tokens.free
    keep = ~free | (torch.rand(layout.total, generator=g) < share)
    if not matched:
        return Selection(keep)
    match = torch.arange(layout.total)
    for rows in match.clone().split(layout.lengths):
        kept, goes = rows[(keep & free)[rows]], rows[~keep[rows]]
        if len(kept):
            match[goes] = kept[torch.randint(len(kept), (len(goes),), generator=g)]
    return Selection(keep, match)


def few(total: int, distinct: int, g: torch.Generator, *width: int) -> Tensor:
    """Random values in [0, 1] with ties: [total, *width].

    Args:
        total: the number of tokens.
        distinct: how many different values there are; with one, all are zero.
        g: draws them.
        *width: further dimensions.
    """
    return torch.randint(0, distinct, (total, *width), generator=g) / max(distinct - 1, 1)


def generator(seed: int) -> torch.Generator:
    """A random generator of this seed."""
    return torch.Generator().manual_seed(seed)


def _listed(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths))
