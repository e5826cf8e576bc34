"""How many tokens stay: KeepRatioPredictors turn the scores of an instance into a count."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import segments
from ..registry import keepers
from ..tokens import Layout, PackedTokens
from .guides import Guidance
from .scorers import hash_integers
from .site import Site

_ENTIRELY = 1e6  # a margin at which no sigmoid is below 1


@dataclass(frozen=True)
class Knob:
    """The argument that sets a keeper's cost: what a budget turns.

    name: the keeper's argument and attribute; low .. high: its range; log: whether it is searched on a log scale; keeps:
    whether larger values keep more.
    """

    name: str
    low: float
    high: float
    log: bool = False
    keeps: bool = True

    def at(self, place: float) -> float:
        """The value at a place of the range, 0 .. 1."""
        if self.log:
            return math.exp(math.log(self.low) * (1 - place) + math.log(self.high) * place)
        return self.low * (1 - place) + self.high * place

    def place(self, value: float) -> float:
        """The inverse of `at`; values outside the range are at its ends."""
        low, high, value = (map(math.log, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return min(max((value - low) / (high - low), 0.0), 1.0)


class KeepRatioPredictor(nn.Module, ABC):
    """Says how many unprotected tokens each instance keeps at one site.

    `guided`: whether it reads the guidance; `knob`: what a budget may turn, None if nothing. Implementations take `site`
    and their own arguments, and hold the knob as an attribute of its name.
    """

    guided: ClassVar[bool] = False
    knob: ClassVar[Knob | None] = None

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

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


@keepers.register("threshold")
class Threshold(KeepRatioPredictor):
    """DTP: keep what scores above the weakest anchor's weighted mean score (MADTP, arXiv 2403.02991, section 3.3).

    theta = min over anchors k of sum over tokens j of softmax(A / temperature)[j, k] score[j]; kept are the tokens with
    score > theta. Where none would stay, or only one would go, nothing is pruned, as in the reference.

    Arguments: temperature > 0, larger prunes more; across: "instance", each by its own count, or "batch", the reference's
    rule that all keep as many as the neediest, which makes results depend on batch mates and exists for comparison only.
    """

    guided = True
    knob = Knob("temperature", 1e-6, 1e6, log=True, keeps=False)

    def __init__(self, site: Site, temperature: float = 1.0, across: Literal["instance", "batch"] = "instance"):
        super().__init__(site)
        if not temperature > 0:
            raise ValueError(
                f"threshold(temperature={temperature}) must be above 0; to prune nothing, leave the depth out of `at`"
            )
        if across not in ("instance", "batch"):
            raise ValueError(f"threshold(across={across!r}): write across='instance' or across='batch'")
        self.temperature = temperature
        self.across = across

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return self._counts(scores, self._threshold(scores, guidance, tokens.layout), tokens)

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        threshold, there = self._threshold(scores, guidance, tokens.layout), segments.count(tokens.free, tokens.layout)
        whole = self._counts(scores, threshold, tokens) == there
        margin = (scores - threshold[tokens.layout.instance]) / spread(scores, tokens)[1]
        return margin.masked_fill(whole[tokens.layout.instance], _ENTIRELY)

    def _counts(self, scores: Tensor, threshold: Tensor, tokens: PackedTokens) -> Tensor:
        layout, free = tokens.layout, tokens.free
        above = scores.to(threshold.dtype) > (threshold + 1e-8 * threshold.abs())[layout.instance]
        counts, there = segments.count(above & free, layout), segments.count(free, layout)
        if self.across == "batch":
            counts = counts.amax().expand_as(counts)
        return torch.where((counts < 1) | (there - counts <= 1), there, counts)

    def _threshold(self, scores: Tensor, guidance: Guidance | None, layout: Layout) -> Tensor:
        """[batch], in double precision: a cold softmax puts the threshold onto one token's own score, and rounding would
        decide the tie."""
        assert guidance is not None
        exact = _exact(scores)
        attention = guidance.attention(self.temperature, exact)
        return segments.sum(attention * scores.to(exact)[:, None], layout).amin(-1)


@keepers.register("learned")
class Learned(KeepRatioPredictor):
    """A threshold that is learned, one a depth: kept are the tokens that score so many standard deviations above the mean.

    The threshold learns in soft training, from the loss and from the expected cost (LTP, Kim et al., arXiv 2107.00910,
    section 4.2, learns one a layer so; here scores are measured by their instance's mean and spread, which fits every
    scorer and length). One token stays at least.

    Arguments: threshold, where it starts; shift, what a budget turns: it is added to all thresholds.
    """

    knob = Knob("shift", -8.0, 8.0, keeps=False)

    def __init__(self, site: Site, threshold: float = -2.0, shift: float = 0.0):
        super().__init__(site)
        if not math.isfinite(threshold) or not math.isfinite(shift):
            raise ValueError(f"learned(threshold={threshold}, shift={shift}): both must be finite")
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))
        self.shift = shift

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        above = self.margin(scores, tokens, guidance) > 0
        return segments.count(above & tokens.free, tokens.layout).clamp(min=1)

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        mean, deviation = spread(scores, tokens)
        return (scores - mean) / deviation - self.threshold - self.shift


@keepers.register("top_p")
class TopP(KeepRatioPredictor):
    """The fewest tokens whose scores add up to a share p of their instance's: few where a few matter, many where many do.

    The rule of nucleus sampling (Holtzman et al., arXiv 1904.09751), with scores in the place of chances. Equal scores make
    it a static share. Scores below 0 count as 0; one token stays at least, and p = 1 keeps all.
    """

    knob = Knob("p", 0.0, 1.0)

    def __init__(self, site: Site, p: float = 0.9):
        super().__init__(site)
        if not 0 <= p <= 1:
            raise ValueError(f"top_p(p={p}) must lie in 0 .. 1: the share of the scores' sum that is kept")
        self.p = p

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        layout, there = tokens.layout, segments.count(tokens.free, tokens.layout)
        weight = scores.detach().to(_exact(scores)).clamp(min=0).masked_fill(tokens.protected, 0.0)
        ranked = segments.pad(weight, layout, 0.0).sort(1, descending=True).values
        reached = ranked.cumsum(1) - ranked  # by the tokens before each
        wanted = self.p * ranked.sum(1, keepdim=True) * (1 - 1e-9)
        return (reached < wanted).sum(1).clamp(min=1).minimum(there) if self.p < 1 else there


@keepers.register("ratio")
class Ratio(KeepRatioPredictor):
    """The same share of every instance's tokens: ceil(ratio * n), ratio in [0, 1]."""

    knob = Knob("ratio", 0.0, 1.0)

    def __init__(self, site: Site, ratio: float = 0.7):
        super().__init__(site)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio(ratio={ratio}) must lie in 0 .. 1: the share of tokens kept")
        self.ratio = ratio

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return share(segments.count(tokens.free, tokens.layout), self.ratio)


@keepers.register("count")
class Count(KeepRatioPredictor):
    """The same number of tokens of every instance, or all it has if those are fewer."""

    def __init__(self, site: Site, count: int):
        super().__init__(site)
        if count < 0:
            raise ValueError(f"count(count={count}) must be 0 or more: the number of unprotected tokens kept")
        self.count = count

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return segments.count(tokens.free, tokens.layout).clamp(max=self.count)


@keepers.register("random_ratio")
class RandomRatio(KeepRatioPredictor):
    """A share drawn for each instance, uniform in mean - spread .. mean + spread, cut to [0, 1].

    The baseline for per-instance counts. An instance's draw comes from `seed`, the depth, and from which of its tokens
    lie farthest along a few fixed random directions: it differs between instances and ignores batch mates.
    """

    knob = Knob("mean", 0.0, 1.0)

    def __init__(self, site: Site, mean: float = 0.7, spread: float = 0.25, seed: int = 0):
        super().__init__(site)
        if not 0 <= mean <= 1 or not 0 <= spread <= 1:
            raise ValueError(f"random_ratio(mean={mean}, spread={spread}): both must lie in 0 .. 1")
        self.mean, self.spread, self.seed = mean, spread, seed
        directions = torch.randn(4, site.dim, generator=torch.Generator().manual_seed(seed)).t().contiguous()
        self.directions: Tensor
        self.register_buffer("directions", directions, persistent=False)

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        ratio = self.mean + self.spread * (2 * self._draw(tokens) - 1)
        return share(segments.count(tokens.free, tokens.layout), ratio.clamp(0, 1))

    def _draw(self, tokens: PackedTokens) -> Tensor:
        """One number in (0, 1) an instance: [batch]."""
        reach = (tokens.x @ self.directions.to(tokens.x.dtype)).masked_fill(tokens.protected[:, None], float("-inf"))
        padded = segments.pad(reach, tokens.layout, float("-inf"))
        farthest = segments.pad(tokens.position, tokens.layout).gather(1, padded.argmax(1))  # [batch, 4]

        drawn = torch.full_like(farthest[:, 0], self.seed * 1009 + self.site.depth)
        for column in farthest.unbind(1):
            drawn = hash_integers(drawn, column)
        return ((drawn >> 8).double() + 0.5) / 2**23


def _exact(scores: Tensor) -> torch.dtype:
    """What decides near a tie: double precision, where the device has it."""
    return torch.float64 if scores.device.type != "mps" else scores.dtype


def spread(scores: Tensor, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scores of each token's instance, protected ones left out: [total] each.

    The deviation is at least a thousandth of the scores' size, so that equal scores are equally far from any threshold.
    """
    layout, free = tokens.layout, tokens.free
    there = segments.count(free, layout).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return (segments.sum(values.masked_fill(~free, 0.0), layout) / there)[layout.instance]

    middle = mean(scores)
    least = 1e-3 * mean(scores.detach().abs()) + 1e-12
    return middle, (mean((scores - middle) ** 2) + least**2).sqrt()


def share(there: Tensor, ratio: Tensor | float) -> Tensor:
    """ceil(ratio * there) as int64: there [batch]; in double, and with a hair off so that 0.7 * 10 is 7."""
    return (there.double() * ratio - 1e-9).ceil().long().clamp(min=0)
