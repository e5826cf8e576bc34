"""What hypothesis draws: ragged tokens with everything a part may read, and arguments for any registered part."""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from vltprune import AttentionStats, BlockSpec, Guidance, Layout, PackedTokens, Selection, Stat, reducers

DIM, HEADS, HEAD_DIM, ANCHORS = 8, 2, 4, 3

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)  # length 1 is where things break
levels = st.sampled_from([1, 3, 1000])  # distinct values a score may take: ties are where selection breaks
seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from([0.0, 0.2, 1.0])  # of protected tokens, all of them included


@dataclass(frozen=True)
class Case:
    """One batch at one spec, with everything that parts read. Every field follows `take`."""

    spec: BlockSpec
    tokens: PackedTokens
    stats: AttentionStats
    guidance: Guidance
    scores: Tensor

    @property
    def batch(self) -> int:
        return self.tokens.layout.batch

    def take(self, index: Tensor, sizes: Sequence[int]) -> Case:
        """The tokens at `index`, dealt out to instances of these sizes."""
        layout = Layout(tuple(sizes))
        tokens = self.guidance.tokens.take(index, layout)
        return dataclasses.replace(
            self,
            tokens=self.tokens.take(index, layout),
            stats=self.stats.mapped(lambda value: value[index]),
            guidance=dataclasses.replace(self.guidance, affinity=self.guidance.affinity[index], tokens=tokens),
            scores=self.scores[index],
        )

    def instances(self, order: Sequence[int]) -> Case:
        """Some of the instances, in this order."""
        rows = torch.arange(self.tokens.layout.total).split(self.tokens.layout.lengths)
        return self.take(torch.cat([rows[i] for i in order]), [len(rows[i]) for i in order])

    def shuffled(self, seed: int) -> tuple[Case, Tensor]:
        """The tokens of each instance in another order, and the index that does it."""
        g = generator(seed)
        rows = torch.arange(self.tokens.layout.total).split(self.tokens.layout.lengths)
        index = torch.cat([row[torch.randperm(len(row), generator=g)] for row in rows])
        return self.take(index, self.tokens.layout.lengths), index


@st.composite
def cases(draw, dim: int = DIM, has_summary: bool | None = None) -> Case:
    """Ragged batches with ties, any share of protected tokens, all tokens equal, and logits from nothing to huge."""
    layout, g = Layout(draw(lengths)), generator(draw(seeds))
    causal, depth = draw(st.booleans()), draw(st.integers(0, 3))
    summary = draw(st.booleans()) if has_summary is None else has_summary
    logits = draw(st.sampled_from([0.0, 1.0, 1e4]))

    tokens = packed(layout, dim, draw(shares), summary, causal, draw(st.sampled_from([0.0, 1.0])), g)
    affinity = few(layout.total, draw(levels), g, ANCHORS) * logits - logits / 2
    mapped = tokens.with_x(torch.randn(layout.total, 5, generator=g))
    return Case(
        BlockSpec("image", depth, 4, dim, HEADS, summary, causal),
        tokens,
        random_stats(layout.total, draw(levels), g),
        Guidance(affinity, mapped, draw(st.sampled_from(["softmax", "sparsemax"]))),
        few(layout.total, draw(levels), g) - draw(st.sampled_from([0.0, 0.5])),
    )


def packed(
    layout: Layout, dim: int, protect: float, summary: bool, causal: bool, spread: float, g: torch.Generator
) -> PackedTokens:
    """Random tokens; `spread` 0 makes all of them equal. The summary token is the first, in a causal tower the last."""
    place = layout.sizes[layout.instance] - 1 if causal else torch.zeros(layout.total, dtype=torch.int64)
    speaks = layout.slot == place
    protected = torch.rand(layout.total, generator=g) < protect
    x = 0.3 + spread * torch.randn(layout.total, dim, generator=g)
    gaps = torch.randint(1, 3, (layout.total,), generator=g)  # earlier pruning leaves gaps between positions
    position = gaps.cumsum(0) - gaps.cumsum(0)[layout.offsets[:-1].long()][layout.instance]
    return PackedTokens(x, layout, position, protected | speaks if summary else protected, speaks if summary else None)


def random_stats(total: int, distinct: int, g: torch.Generator) -> AttentionStats:
    """Every statistic, non-negative where attention's are."""
    by_head = dict.fromkeys((Stat.SUMMARY, Stat.CONTEXT, Stat.VALUE, Stat.LAST), (HEADS,))
    widths = by_head | dict.fromkeys((Stat.KEY, Stat.VALUE_MEAN), (HEAD_DIM,))
    every = {stat: few(total, distinct, g, *widths.get(stat, ())) for stat in Stat if stat}
    return AttentionStats(reduce(or_, every), every)


def few(total: int, distinct: int, g: torch.Generator, *width: int) -> Tensor:
    """[total, *width] in 0 .. 1 with this many distinct values; with one, all zero."""
    return torch.randint(0, distinct, (total, *width), generator=g) / max(distinct - 1, 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def arguments(draw, maker: Callable[..., Any], vary: bool = True) -> dict[str, Any]:
    """Arguments for a registered part, read off its signature: what it requires and its knob; with `vary`, its options.

    Registering a part is enough to have it tested: this is why.
    """
    drawn: dict[str, Any] = {}
    knob = getattr(maker, "knob", None)
    hints = typing.get_type_hints(maker.__init__)
    for name, parameter in inspect.signature(maker).parameters.items():
        if name in ("spec", "specs"):
            continue
        options = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is typing.Literal else ()
        options = (False, True) if hints[name] is bool else options
        if knob is not None and knob.name == name:
            drawn[name] = draw(values_of(knob))
        elif options and vary:
            drawn[name] = draw(st.sampled_from(options))
        elif parameter.default is inspect.Parameter.empty:
            drawn[name] = draw({int: st.integers(0, 12), float: st.floats(0, 1)}[hints[name]])
    return drawn


def values_of(knob: Any) -> st.SearchStrategy[float]:
    """Anything between the ends of a knob, both included."""
    if not knob.log:
        return st.floats(knob.low, knob.high)
    inner = st.floats(math.log(knob.low), math.log(knob.high)).map(math.exp)
    return st.sampled_from([knob.low, knob.high]) | inner.map(lambda value: min(max(value, knob.low), knob.high))


@st.composite
def counted(draw):
    """A case, and counts from none to more than there are."""
    case = draw(cases())
    return case, torch.tensor([draw(st.integers(0, n + 1)) for n in case.tokens.layout.lengths])


@st.composite
def reductions(draw, name):
    """Arguments, a case whose tokens may stand for several already, and any selection, with matches or without."""
    case = draw(cases())
    layout, free, g = case.tokens.layout, case.tokens.free, generator(draw(seeds))
    keep, match = ~free | (torch.rand(layout.total, generator=g) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))), None
    if draw(st.booleans()):
        match = torch.arange(layout.total)
        for rows in match.clone().split(layout.lengths):
            kept = rows[(keep & free)[rows]]
            if len(kept):
                goes = rows[~keep[rows]]
                match[goes] = kept[torch.randint(len(kept), (len(goes),), generator=g)]
    if draw(st.booleans()):
        size = 1 + torch.arange(case.tokens.layout.total) % 3
        case = dataclasses.replace(case, tokens=dataclasses.replace(case.tokens, size=size))
    return draw(arguments(reducers[name])), case, Selection(keep, match)
