"""Counts that each instance has of its own: by its scores, or by what would be lost with its tokens."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..core import precision, segments
from ..core.tokens import Layout, PackedTokens
from ..registry import keepers
from .block_spec import BlockSpec
from .guides import Guidance
from .keepers import KeepRatioPredictor, Knob, decay_factor, keep_count
from .scorers import unit

_ENTIRELY = 1e6  # a margin at which no sigmoid is below 1
_EQUAL = 5e-5  # relative: sums of scores, or of what tokens take with them, that rounding may make of equal ones
_TIE = 1e-8  # relative: a score that is nearer to a threshold does not count as above it
_ALIKE = 1e-9  # a squared distance, of unit vectors, that rounding may make of none
_TEMPERATURE = Knob("temperature", 1e-6, 1e6, log=True, larger_keeps_more=False)


@keepers.register("threshold")
class Threshold(KeepRatioPredictor):
    """DTP: keep what scores above the weakest anchor's weighted mean score (MADTP, arXiv 2403.02991, section 3.3).

    theta = min over anchors k of sum over tokens j of softmax(A / temperature)[j, k] score[j]; of an instance's n tokens, m
    score above it. Where none does, as where all are alike, or only one would go, m is n, as in the reference. Kept are the
    best ceil(n (m / n)^power).

    At power 1 that is DTP. Paper and reference turn the temperature for a budget, but theta lies between one token's score and
    the mean of all at any temperature: of a guide that was trained to score, that is a narrow range of costs. A power reaches
    every cost, but where m is n. Who keeps more than others at 1 does so at any power, by the less the milder the cost
    (docs/ablations.md).

    Arguments: temperature > 0, larger prunes more as a rule; power > 0, larger prunes more; knob: which of them a budget sets;
    decay > 0: behind i blocks that prune, the power is power * decay^i, so that below 1 the first blocks prune most, as with
    `ratio`.
    """

    guided = True
    knob = Knob("power", 1 / 64, 64.0, log=True, larger_keeps_more=False)

    def __init__(
        self,
        spec: BlockSpec,
        temperature: float = 1.0,
        power: float = 1.0,
        knob: Literal["power", "temperature"] = "power",
        decay: float = 1.0,
    ):
        super().__init__(spec)
        if not temperature > 0:
            raise ValueError(
                f"threshold(temperature={temperature}) must be above 0; to prune nothing, leave the depth out of `at`"
            )
        if not 0 < power < math.inf:
            raise ValueError(f"threshold(power={power}) must be above 0 and finite: 1 is DTP, less prunes less")
        if knob not in ("power", "temperature"):
            raise ValueError(f"threshold(knob={knob!r}): write knob='power' or knob='temperature'")
        self.temperature = temperature
        self.power, self._decay_factor = power, decay_factor(spec, decay, "threshold")
        if knob == "temperature":
            self.knob = _TEMPERATURE

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return self._counts(scores, *self._threshold(scores, guidance, tokens.layout), tokens)

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        there = segments.count(tokens.free, tokens.layout)
        near, beyond = self._threshold(scores, guidance, tokens.layout)
        counts, threshold = self._counts(scores, near, beyond, tokens), near + beyond
        if self._exponent != 1:
            # what is kept is no longer what is above: the threshold as if it lay where the counts cut
            cut = torch.where(counts < there, _cut(scores, tokens, counts), threshold)
            threshold = threshold + (cut - threshold).detach()
        margin = (scores - threshold[tokens.layout.instance]) / mean_and_deviation(scores, tokens)[1]
        return margin.masked_fill((counts == there)[tokens.layout.instance], _ENTIRELY)

    def _counts(self, scores: Tensor, near: Tensor, beyond: Tensor, tokens: PackedTokens) -> Tensor:
        there, counts = segments.count(tokens.free, tokens.layout), self._above(scores, near, beyond, tokens)
        counts = torch.where((counts < 1) | (there - counts <= 1), there, counts)
        if self._exponent == 1:
            return counts
        part = counts.to(precision.widest_float(counts.device)) / there.clamp(min=1)
        return keep_count(there, part**self._exponent)

    def _above(self, scores: Tensor, near: Tensor, beyond: Tensor, tokens: PackedTokens) -> Tensor:
        """[batch]: how many tokens of each instance score above its threshold."""
        layout = tokens.layout
        above = scores - near[layout.instance] > (beyond + _TIE * near.abs())[layout.instance]
        return segments.count(above & tokens.free, layout)

    @property
    def _exponent(self) -> float:
        return self.power * self._decay_factor

    def _threshold(self, scores: Tensor, guidance: Guidance | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """A number near the threshold, and by how much the threshold is beyond it: [batch] each.

        A cold softmax puts the threshold onto one token's own score, or very little off. The sum of what the scores are apart
        from a number near them is exact there, where the sum of the scores would be rounded.
        """
        assert guidance is not None
        attention = guidance.attention(self.temperature)
        near = segments.sum(attention.detach() * scores.detach()[:, None], layout).amin(-1)
        return near, segments.sum(attention * (scores - near[layout.instance])[:, None], layout).amin(-1)


@keepers.register("learned")
class Learned(KeepRatioPredictor):
    """A threshold that is learned, one a depth: kept are the tokens that score so many standard deviations above the mean.

    The threshold learns in soft training, from the loss and from the expected cost (LTP, Kim et al., arXiv 2107.00910,
    section 4.2, learns one a layer so; here scores are measured by their instance's mean and spread, which fits every
    scorer and length). One token stays at least.

    Arguments: threshold, where it starts; shift, what a budget turns: it is added to all thresholds.
    """

    knob = Knob("shift", -8.0, 8.0, larger_keeps_more=False)

    def __init__(self, spec: BlockSpec, threshold: float = -2.0, shift: float = 0.0):
        super().__init__(spec)
        if not math.isfinite(threshold) or not math.isfinite(shift):
            raise ValueError(f"learned(threshold={threshold}, shift={shift}): both must be finite")
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))
        self.shift = shift

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        middle, deviation = mean_and_deviation(scores, tokens)
        size = middle.abs() + deviation  # scores that are alike are not above their mean, whatever rounding says
        above = scores - middle - (self.threshold + self.shift) * deviation > precision.ROUNDING * size
        return segments.count(above & tokens.free, tokens.layout).clamp(min=1)

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        mean, deviation = mean_and_deviation(scores, tokens)
        return (scores - mean) / deviation - self.threshold - self.shift


@keepers.register("top_p")
class TopP(KeepRatioPredictor):
    """The fewest tokens whose scores add up to a share p of their instance's: few where a few matter, many where many do.

    The rule of nucleus sampling (Holtzman et al., arXiv 1904.09751), with scores in the place of chances. Equal scores make
    it a static share. Scores below 0 count as 0; one token stays at least, and p = 1 keeps all.
    """

    knob = Knob("p", 0.0, 1.0)

    def __init__(self, spec: BlockSpec, p: float = 0.9):
        super().__init__(spec)
        if not 0 <= p <= 1:
            raise ValueError(f"top_p(p={p}) must lie in 0 .. 1: the share of the scores' sum that is kept")
        self.p = p

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        layout, there = tokens.layout, segments.count(tokens.free, tokens.layout)
        weight = (
            scores.detach().to(precision.widest_float(scores.device)).clamp(min=0).masked_fill(tokens.protected, 0.0)
        )
        ranked = segments.pad(weight, layout, 0.0).sort(1, descending=True).values
        reached = ranked.cumsum(1) - ranked  # by the tokens before each
        wanted = self.p * ranked.sum(1, keepdim=True) * (1 - _EQUAL)
        return (reached < wanted).sum(1).clamp(min=1).minimum(there) if self.p < 1 else there


@keepers.register("distortion")
class Distortion(KeepRatioPredictor):
    """The fewest tokens that leave an error behind: few where tokens resemble each other, many where they differ.

    What a token takes with it is its score's share p of its instance, times its squared distance from the mean of the
    instance so weighted, which is what fusing would put in its place: p_j || z_j - sum over i of p_i z_i ||^2, with z the token
    at zero mean and unit length (a layer norm over sqrt(dim)). All tokens together take a variance, 0 where all are alike and
    below 1. The best by score stay, as many as it needs for the rest to take at most `error`. One token stays at least.

    Thresholds on scores, as DTP's, see how scores are spread, and not what is lost with the tokens, which differs between
    instances (docs/ablations.md).

    Arguments: error in 0 .. 1, larger prunes more; decay > 0: behind i blocks that prune, the error is error * decay^i, so
    that below 1 the first blocks prune most, as with `ratio`. Scores below 0 count as 0.
    """

    knob = Knob("error", 1e-6, 1.0, log=True, larger_keeps_more=False)

    def __init__(self, spec: BlockSpec, error: float = 0.1, decay: float = 1.0):
        super().__init__(spec)
        if not 0 <= error <= 1:
            raise ValueError(f"distortion(error={error}) must lie in 0 .. 1: what may be lost of a squared length of 1")
        self.error, self._decay_factor = error, decay_factor(spec, decay, "distortion")

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        layout, there = tokens.layout, segments.count(tokens.free, tokens.layout)
        place = segments.rank(scores.masked_fill(tokens.protected, float("-inf")), layout)
        lost = _lost(scores, tokens)
        ranked = lost.new_zeros(layout.batch, layout.longest).index_put((layout.instance, place), lost)
        behind = ranked.flip(1).cumsum(1).flip(1)  # what each token and those below it take with them
        return (behind > max(self.error * self._decay_factor * (1 + _EQUAL), _ALIKE)).sum(1).clamp(min=1).minimum(there)


@torch.no_grad()
def _lost(scores: Tensor, tokens: PackedTokens) -> Tensor:
    """[total]: what each token takes with it, in single precision; zero for protected ones."""
    layout, z = tokens.layout, unit(tokens)
    weight = scores.float().clamp(min=0) + 1e-12  # equal where no score is above 0
    weight = weight.masked_fill(tokens.protected, 0.0)
    part = weight / segments.sum(weight, layout).clamp(min=1e-12)[layout.instance]
    mean = segments.weighted_sum(part[:, None], z, layout)[:, 0]
    return part * (z - mean[layout.instance]).square().sum(-1)


def _cut(scores: Tensor, tokens: PackedTokens, counts: Tensor) -> Tensor:
    """[batch]: halfway between the last score that is kept, of so many, and the first that is not."""
    ranked = segments.pad(scores.masked_fill(tokens.protected, float("-inf")), tokens.layout, float("-inf"))
    ranked = ranked.sort(1, descending=True).values
    last = torch.stack([counts - 1, counts.clamp(max=ranked.shape[1] - 1)], 1).clamp(min=0)
    return ranked.gather(1, last).mean(1)


def mean_and_deviation(scores: Tensor, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
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
