"""Adaptive keepers: the number of kept tokens depends on the scores, or on what removing tokens would lose."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core import precision, segments
from ...core.checks import is_recorded
from ...core.kernels.native import kernels
from ...core.statistics import Stat
from ...core.tokens import PackedTokens
from ...registry import keepers
from ..block_spec import BlockSpec
from ..guides.base import Guidance
from ..scorers.base import unit
from .base import KeepRatioPredictor, Knob, decay_factor, keep_count

_ENTIRELY = 1e6  # a margin at which no sigmoid is below 1
_EQUAL = 5e-5  # relative: sums of scores, or of what tokens take with them, that rounding may make of equal ones
_TIE = 1e-8  # relative: a score that is nearer to a threshold does not count as above it
_ALIKE = 1e-9  # a squared distance, of unit vectors, that rounding may make of none
_LEAST = 1e-30  # attention below has no part in an entropy
_TEMPERATURE = Knob("temperature", 1e-6, 1e6, log=True, larger_keeps_more=False)


@keepers.register("threshold")
class Threshold(KeepRatioPredictor):
    """MADTP's dynamic token pruning (arXiv 2403.02991, section 3.3): keeps tokens that score above a threshold.

    theta = min_k sum_j softmax(A / temperature)[j, k] score[j] over anchors k and tokens j, with the affinity A. Of an
    instance's n tokens, m score above theta. Where none does, or all but one do, m is n, as in the reference code. The best
    ceil(n (m / n)^power) are kept: power 1 is MADTP.

    The paper and the reference code set the cost by the temperature. But theta lies between one token's score and the mean of
    all at any temperature. With a trained guide that is a narrow range of costs. The power reaches every cost, except
    where m is n. An instance that keeps more than others at power 1 does so at any power.

    Args:
        spec: the block.
        temperature: above 0. Larger values prune more as a rule.
        power: above 0. Larger values prune more.
        knob: "power" or "temperature", the argument that calibration searches.
        decay: above 0. After i earlier pruned blocks the power is power * decay^i. Below 1 the first blocks prune most.

    Raises:
        ValueError: for arguments outside their range.
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
        above = self._above(scores, guidance, tokens)
        if is_recorded() or above.device.type != "cpu":
            return self._kept(above, tokens.available.sizes)
        # a few numbers, which Python computes in a fraction of the time of as many operations
        return torch.tensor([*map(self._kept, above.tolist(), tokens.available.lengths)], device=above.device)

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        available, layout = tokens.available.sizes, tokens.layout
        near, difference, beyond = self._distance(scores, guidance, tokens)
        counts = self._kept(self._exceeding(near, difference, beyond, tokens), available)
        threshold = (near + beyond)[:, 0]
        if self._exponent != 1:
            # what is kept is no longer what is above: the threshold as if it lay where the counts cut
            cut = torch.where(counts < available, _cut(scores, tokens, counts), threshold)
            threshold = threshold + (cut - threshold).detach()
        margin = (scores - layout.spread(threshold)) / mean_and_deviation(scores, tokens)[1]
        return margin.masked_fill(layout.spread(counts == available), _ENTIRELY)

    def _kept(self, above: Any, available: Any) -> Any:
        """How many tokens stay where so many are above the threshold: [batch] int64, or of one instance as numbers."""
        is_all = (above < 1) | (above >= available - 1)
        if not isinstance(above, Tensor):
            return available if is_all else keep_count(available, (above / available) ** self._exponent)
        counts = torch.where(is_all, available, above)
        if self._exponent == 1:
            return counts
        part = counts.to(precision.widest_float(counts.device)) / available.clamp(min=1)
        return keep_count(available, part**self._exponent)

    def _above(self, scores: Tensor, guidance: Guidance | None, tokens: PackedTokens) -> Tensor:
        """[batch] int64: the number of tokens of each instance that score above its threshold."""
        assert guidance is not None
        native = kernels(scores, guidance.affinity) if guidance.attend == "softmax" else None
        if native is not None and tokens.protected is guidance.tokens.protected:
            lengths = tokens.layout.lengths
            counts = native.above_anchors(guidance.affinity, scores, tokens.protected, lengths, self.temperature, _TIE)
            return torch.tensor(counts, device=scores.device)
        return self._exceeding(*self._distance(scores, guidance, tokens), tokens)

    def _exceeding(self, near: Tensor, difference: Tensor, beyond: Tensor, tokens: PackedTokens) -> Tensor:
        """[batch] int64: the same, by what `_distance` returned."""
        above = difference > beyond + near.abs() * _TIE
        return (above & segments.pad(tokens.free, tokens.layout, False)).sum(1)

    @property
    def _exponent(self) -> float:
        return self.power * self._decay_factor

    def _distance(
        self, scores: Tensor, guidance: Guidance | None, tokens: PackedTokens
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The threshold as a sum of two numbers, one near it and the exact difference, and the scores minus the first.

        At a low temperature the threshold is one token's own score, or very close to it. Summing the differences of the scores
        from a number near them is exact there, while the sum of the scores would be rounded.

        Returns:
            The number near the threshold [batch, 1], the scores minus it [batch, longest], the threshold minus it [batch, 1].
        """
        assert guidance is not None
        layout = tokens.layout
        attention = segments.pad(guidance.attention(self.temperature), layout)
        padded = segments.pad(scores.to(attention.dtype), layout)

        def lowest(values: Tensor, attention: Tensor) -> Tensor:
            """The smallest of the anchors' sums of values [batch, longest]: [batch, 1]."""
            return (values[:, None] @ attention).amin(2)

        near = lowest(padded.detach(), attention.detach())
        difference = padded - near
        return near, difference, lowest(difference, attention)


@keepers.register("learned")
class Learned(KeepRatioPredictor):
    """A learned threshold per depth, on scores standardized over their instance.

    Soft training learns it from the loss and the expected cost, as LTP does (Kim et al., arXiv 2107.00910, section 4.2).
    Standardized scores fit every scorer and length. At least one token stays.

    Args:
        spec: the block.
        threshold: the initial threshold, in standard deviations above the mean.
        shift: the knob of calibration, added to all thresholds.
        hard: whether soft training keeps a token or masks it, with the gradient of its probability, as AS-ViT does (arXiv
            2209.13802). Otherwise tokens stay in part.

    Raises:
        ValueError: for arguments that are not finite.
    """

    knob = Knob("shift", -8.0, 8.0, larger_keeps_more=False)

    def __init__(self, spec: BlockSpec, threshold: float = -2.0, shift: float = 0.0, hard: bool = False):
        super().__init__(spec)
        if not math.isfinite(threshold) or not math.isfinite(shift):
            raise ValueError(f"learned(threshold={threshold}, shift={shift}): both must be finite")
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))
        self.shift, self.hard = shift, hard

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        middle, deviation = mean_and_deviation(scores, tokens)
        size = middle.abs() + deviation  # scores that are alike are not above their mean, whatever rounding says
        above = scores - middle - (self.threshold + self.shift) * deviation > precision.ROUNDING * size
        available = tokens.available.sizes
        return segments.count(above & tokens.free, tokens.layout).clamp(min=1).minimum(available)

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        mean, deviation = mean_and_deviation(scores, tokens)
        return (scores - mean) / deviation - self.threshold - self.shift


@keepers.register("top_p")
class TopP(KeepRatioPredictor):
    """Keeps the fewest tokens whose scores sum to a fraction p of their instance's total.

    It is the rule of nucleus sampling (Holtzman et al., arXiv 1904.09751), with scores as probabilities. Scores below 0
    count as 0. At least one token stays.

    Args:
        spec: the block.
        p: the fraction in [0, 1]. 1 keeps all.

    Raises:
        ValueError: for p outside its range.
    """

    knob = Knob("p", 0.0, 1.0)

    def __init__(self, spec: BlockSpec, p: float = 0.9):
        super().__init__(spec)
        if not 0 <= p <= 1:
            raise ValueError(f"top_p(p={p}) must lie in 0 .. 1: the share of the scores' sum that is kept")
        self.p = p

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        layout, available = tokens.layout, tokens.available.sizes
        weight = (
            scores.detach().to(precision.widest_float(scores.device)).clamp(min=0).masked_fill(tokens.protected, 0.0)
        )
        ranked = segments.pad(weight, layout, 0.0).sort(1, descending=True).values
        reached = ranked.cumsum(1) - ranked  # by the tokens before each
        wanted = self.p * ranked.sum(1, keepdim=True) * (1 - _EQUAL)
        return (reached < wanted).sum(1).clamp(min=1).minimum(available) if self.p < 1 else available


@keepers.register("distortion")
class Distortion(KeepRatioPredictor):
    """Keeps the fewest tokens whose removal distorts an instance by at most `error`.

    The distortion of removing token j is p_j || z_j - sum_i p_i z_i ||^2. Here p is the score divided by the instance's total,
    and z the token at zero mean and unit length. The sum is the token that fusing would put in its place. Over all tokens
    it is a variance: 0 where all are alike, and below 1. So few tokens stay where they resemble each other, and many where they
    differ. The tokens of largest score stay, at least one. Scores below 0 count as 0.

    Args:
        spec: the block.
        error: the allowed distortion, in [0, 1]. Larger values prune more.
        decay: above 0. After i earlier pruned blocks the error is error * decay^i. Below 1 the first blocks prune most.

    Raises:
        ValueError: for arguments outside their range.
    """

    knob = Knob("error", 1e-6, 1.0, log=True, larger_keeps_more=False)

    def __init__(self, spec: BlockSpec, error: float = 0.1, decay: float = 1.0):
        super().__init__(spec)
        if not 0 <= error <= 1:
            raise ValueError(f"distortion(error={error}) must lie in 0 .. 1: what may be lost of a squared length of 1")
        self.error, self._decay_factor = error, decay_factor(spec, decay, "distortion")

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        layout, available = tokens.layout, tokens.available.sizes
        rank = segments.rank(scores.masked_fill(tokens.protected, float("-inf")), layout)
        lost = _lost(scores, tokens)
        ranked = lost.new_zeros(layout.batch, layout.longest).index_put((layout.instance, rank), lost)
        # the distortion of removing each token and all below it
        behind = ranked.flip(1).cumsum(1).flip(1)
        allowed = max(self.error * self._decay_factor * (1 + _EQUAL), _ALIKE)
        return (behind > allowed).sum(1).clamp(min=1).minimum(available)


@keepers.register("entropy")
class Entropy(KeepRatioPredictor):
    """Prunes at every second block down to a number at the last, most where class attention is least even.

    FlowCut (arXiv 2505.19536): where m blocks follow, of n tokens round((n - count) / sqrt(m) * (1 - (H(a) / log n)^2)) go,
    for even m. H is the entropy of the summary token's attention a, the mean over heads, normalized over unprotected tokens.
    Where m is odd all stay, so that scores are smoothed over all blocks. Behind the last block exactly `count` stay, and
    nowhere fewer.

    Args:
        spec: the block.
        count: the unprotected tokens that stay at the last block, all where there are fewer. A fraction counts in earlier
            blocks. Below 1 a single one stays, and earlier blocks prune more than a published count can.

    Raises:
        ValueError: for a count that is not finite.
    """

    needs = Stat.SUMMARY
    knob = Knob("count", -4096.0, 4096.0)

    def __init__(self, spec: BlockSpec, count: float = 64.0):
        super().__init__(spec)
        if not math.isfinite(count):
            raise ValueError(f"entropy(count={count}) must be finite: the tokens that stay at the last block")
        self.count = count

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        layout, available = tokens.layout, tokens.available.sizes
        left, most = self.spec.depths - 1 - self.spec.depth, available.clamp(max=max(round(self.count), 1))
        if left == 0 or left % 2:
            return available if left else most
        attention = tokens.columns["SUMMARY"].detach().mean(-1).masked_fill(tokens.protected, 0.0)
        attention = attention / layout.spread(segments.sum(attention, layout).clamp(min=_LEAST))
        entropy = -segments.sum(attention * attention.clamp(min=_LEAST).log(), layout)
        evenness = entropy / available.clamp(min=2).log()
        goes = (available - self.count).clamp(min=0) / math.sqrt(left) * (1 - evenness**2).clamp(min=0)
        return torch.maximum(available - goes.round().long(), most)


@torch.no_grad()
def _lost(scores: Tensor, tokens: PackedTokens) -> Tensor:
    """[total]: the distortion of removing each token, in single precision; zero for protected ones."""
    layout, z = tokens.layout, unit(tokens)
    weight = scores.float().clamp(min=0) + 1e-12  # equal where no score is above 0
    weight = weight.masked_fill(tokens.protected, 0.0)
    part = weight / layout.spread(segments.sum(weight, layout).clamp(min=1e-12))
    mean = segments.weighted_sum(part[:, None], z, layout)[:, 0]
    return part * (z - layout.spread(mean)).square().sum(-1)


def _cut(scores: Tensor, tokens: PackedTokens, counts: Tensor) -> Tensor:
    """[batch]: the midpoint of the last kept score and the first removed one, for these counts."""
    ranked = segments.pad(scores.masked_fill(tokens.protected, float("-inf")), tokens.layout, float("-inf"))
    ranked = ranked.sort(1, descending=True).values
    last = torch.stack([counts - 1, counts.clamp(max=ranked.shape[1] - 1)], 1).clamp(min=0)
    return ranked.gather(1, last).mean(1)


def mean_and_deviation(scores: Tensor, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scores of each token's instance, without protected and masked tokens.

    The deviation is at least a thousandth of the scores' magnitude, so that equal scores are equally far from any threshold.

    Args:
        scores: [total].
        tokens: the tokens that they are of.

    Returns:
        The mean and the deviation, [total] each: one value an instance, repeated for each of its tokens.
    """
    layout, free = tokens.layout, tokens.free & tokens.present
    available = segments.count(free, layout).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return layout.spread(segments.sum(values.masked_fill(~free, 0.0), layout) / available)

    middle = mean(scores)
    least = 1e-3 * mean(scores.detach().abs()) + 1e-12
    return middle, (mean((scores - middle) ** 2) + least**2).sqrt()
