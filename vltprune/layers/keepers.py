"""How many tokens stay: KeepRatioPredictors turn the scores of an instance into a count."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import precision, segments
from ..core.tokens import PackedTokens
from ..registry import keepers
from .block_spec import BlockSpec
from .guides import Guidance
from .printing import PrintedPart
from .scorers import hash_integers


@dataclass(frozen=True)
class Knob:
    """The argument that sets a keeper's cost: what a budget turns.

    name: the keeper's argument and attribute; low .. high: its range; log: whether it is searched on a log scale;
    larger_keeps_more: whether larger values keep more.
    """

    name: str
    low: float
    high: float
    log: bool = False
    larger_keeps_more: bool = True

    def value_at(self, fraction: float) -> float:
        """The value at a fraction of the range, 0 .. 1."""
        if self.log:
            return math.exp(math.log(self.low) * (1 - fraction) + math.log(self.high) * fraction)
        return self.low * (1 - fraction) + self.high * fraction

    def fraction(self, value: float) -> float:
        """The inverse of `value_at`; values outside the range are at its ends."""
        low, high, value = (map(math.log, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return min(max((value - low) / (high - low), 0.0), 1.0)


class KeepRatioPredictor(PrintedPart, ABC):
    """Says how many unprotected tokens each instance keeps at one spec, of scores whose ties are settled (`Pruner`).

    `guided`: whether it reads the guidance; `fixed`: whether its counts follow from how many tokens there are, and from nothing
    that they hold; `knob`: what a budget may turn, None if nothing; an instance may have another
    than its class. Implementations take `spec` and their own arguments, and hold the knob as an attribute of its name.
    """

    guided: ClassVar[bool] = False
    fixed: ClassVar[bool] = False
    knob: Knob | None = None

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        """scores [total] -> counts [batch] int64 of unprotected tokens kept; more than there are means all of them."""

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        """[total]: how far a token's score is above what it is measured by, in standard deviations of its instance's scores.

        For keepers that have a threshold, which soft training needs; ValueError for others.
        """
        raise ValueError(
            f"{type(self).__name__} has no threshold to learn softly: use keep='threshold' or keep='learned'"
        )


@keepers.register("ratio")
class Ratio(KeepRatioPredictor):
    """The same share of every instance's tokens: ceil(ratio * n), ratio in [0, 1].

    decay > 0: behind i blocks that prune, the share is ratio to the power decay^i. At 1 all blocks keep the same share; below 1
    the first blocks prune most, so that more tokens can stay to the end at the same cost.
    """

    fixed = True
    knob = Knob("ratio", 0.0, 1.0)

    def __init__(self, spec: BlockSpec, ratio: float = 0.7, decay: float = 1.0):
        super().__init__(spec)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio(ratio={ratio}) must lie in 0 .. 1: the share of tokens kept")
        self.ratio, self._decay_factor = ratio, decay_factor(spec, decay, "ratio")

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return keep_count(segments.count(tokens.free, tokens.layout), self.ratio**self._decay_factor)


@keepers.register("count")
class Count(KeepRatioPredictor):
    """The same number of tokens of every instance, or all it has if those are fewer."""

    fixed = True

    def __init__(self, spec: BlockSpec, count: int):
        super().__init__(spec)
        if count < 0:
            raise ValueError(f"count(count={count}) must be 0 or more: the number of unprotected tokens kept")
        self.count = count

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return segments.count(tokens.free, tokens.layout).clamp(max=self.count)


@keepers.register("random_ratio")
class RandomRatio(KeepRatioPredictor):
    """A share drawn for each instance, uniform in mean - half_width .. mean + half_width, cut to [0, 1].

    The baseline for per-instance counts. An instance's draw comes from `seed`, the depth, and from which of its tokens
    lie farthest along four random directions: it differs between instances and ignores batch mates.
    """

    knob = Knob("mean", 0.0, 1.0)

    def __init__(self, spec: BlockSpec, mean: float = 0.7, half_width: float = 0.25, seed: int = 0):
        super().__init__(spec)
        if not 0 <= mean <= 1 or not 0 <= half_width <= 1:
            raise ValueError(f"random_ratio(mean={mean}, half_width={half_width}): both must lie in 0 .. 1")
        self.mean, self.half_width, self.seed = mean, half_width, seed

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        ratio = self.mean + self.half_width * (2 * self._draw(tokens) - 1)
        return keep_count(segments.count(tokens.free, tokens.layout), ratio.clamp(0, 1))

    def _draw(self, tokens: PackedTokens) -> Tensor:
        """One number in (0, 1) an instance: [batch]."""
        x, layout = precision.single(tokens.x), tokens.layout
        entry = torch.arange(4 * x.shape[1], device=x.device).view(4, -1)
        signs = ((hash_integers(entry, self.seed) >> 8) % 2 * 2 - 1).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            reach = x @ signs.t()
        # measured from as far back as a token can reach, so that what is equal within rounding is so relative to itself
        reach = reach + segments.pad(x.abs().sum(1), layout).amax(1)[layout.instance, None]
        reach = reach.masked_fill(tokens.protected[:, None], float("-inf"))
        position = segments.pad(tokens.position, layout)

        drawn = torch.full_like(position[:, 0], self.seed * 1009 + self.spec.depth)
        for column in reach.unbind(1):
            farthest = precision.equalize(segments.pad(column, layout, float("-inf"))).argmax(1, keepdim=True)
            drawn = hash_integers(drawn, position.gather(1, farthest)[:, 0])
        return ((drawn >> 8).float() + 0.5) / 2**23


def decay_factor(spec: BlockSpec, decay: float, name: str) -> float:
    """decay^i, with i blocks that prune before the spec: what a share is raised to there, or an error multiplied by.

    ValueError for a decay that is not above 0 and finite.
    """
    if not 0 < decay < math.inf:
        raise ValueError(
            f"{name}(decay={decay}) must be above 0 and finite: 1 prunes alike at all depths, less most at first"
        )
    return decay**spec.before


def keep_count(there: Tensor, ratio: Tensor | float) -> Tensor:
    """ceil(ratio * there) as int64, with a hair off so that 0.7 * 10 is 7: there [batch] int64, ratio [batch] or one."""
    dtype = precision.widest_float(there.device)
    part = there.to(dtype) * ratio
    return (part - part * precision.rounding(dtype) - 1e-9).ceil().long().clamp(min=0)
