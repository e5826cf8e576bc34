"""Keepers of trained methods: a learned threshold that rises with depth, a fixed or fitted one, a sampled ratio."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...core import precision, segments
from ...core.tokens import PackedTokens
from ...registry import keepers
from ..block_spec import BlockSpec
from ..guides.base import Guidance
from .adaptive import mean_and_deviation
from .base import KeepRatioPredictor, Knob, keep_count
from .fixed import Ratio

_CERTAIN = 1e-6  # a probability that is nearer to 0 or 1 than this has the logit of this distance


@keepers.register("rising_threshold")
class RisingThreshold(KeepRatioPredictor):
    """Keeps tokens that score above a threshold, which rises linearly over the blocks and learns a shift at each.

    LTP (Kim et al., arXiv 2107.00910): at block l of L, counted from 1, theta_l = final * l / L + learned.

    **Departs**: the paper's threshold is one of mean attention, which is 1 / n on average over n tokens. By default it is here
    in units of 1 / n, so that it fits towers and inputs of any length. With `relative=False` it is the paper's. Soft training
    measures the distance to the threshold in standard deviations of the instance's scores, as all keepers do.

    Args:
        spec: the block.
        final: the threshold at the last block before training, at least 0. Larger values prune more.
        relative: whether the threshold is in units of 1 / n, with n the tokens of the instance, protected ones included.

    Raises:
        ValueError: for a threshold that is negative or infinite.
    """

    knob = Knob("final", 0.0, 16.0, larger_keeps_more=False)

    def __init__(self, spec: BlockSpec, final: float = 1.0, relative: bool = True):
        super().__init__(spec)
        if not 0 <= final < math.inf:
            raise ValueError(
                f"rising_threshold(final={final}) must be 0 or more and finite: the threshold at the last block"
            )
        self.final, self.relative = final, relative
        self.learned = nn.Parameter(torch.zeros(()))

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return _count_above(scores, self._threshold(scores, tokens), tokens)

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return (scores - self._threshold(scores, tokens)) / mean_and_deviation(scores.detach(), tokens)[1]

    def _threshold(self, scores: Tensor, tokens: PackedTokens) -> Tensor:
        """[total]: the threshold of each token's instance."""
        threshold = self.final * (self.spec.depth + 1) / self.spec.depths + self.learned.to(scores.dtype)
        if not self.relative:
            return threshold.expand_as(scores)
        return threshold / tokens.layout.spread(tokens.layout.sizes)


@keepers.register("above")
class Above(KeepRatioPredictor):
    """Keeps the tokens that score above a fixed threshold. None may stay.

    With the scorer `halting` and the threshold 0 it is the rule of A-ViT (arXiv 2112.07658). Nothing is learned here. So the
    cost has gradients to the scores in soft training, which measures the distance to the threshold in the scores' own units.

    Args:
        spec: the block.
        threshold: the threshold, in the units of the scores.

    Raises:
        ValueError: for a threshold that is not finite.
    """

    knob = Knob("threshold", -16.0, 128.0, larger_keeps_more=False)
    cost_trains_scores = True

    def __init__(self, spec: BlockSpec, threshold: float = 0.0):
        super().__init__(spec)
        if not math.isfinite(threshold):
            raise ValueError(f"above(threshold={threshold}) must be finite: the score above which tokens stay")
        self.threshold = threshold

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return _count_above(scores, scores.new_full((), self.threshold), tokens)

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        return scores - self.threshold


@keepers.register("fitted_threshold")
class FittedThreshold(KeepRatioPredictor):
    """Keeps the tokens that score above a threshold, which is fitted so that a ratio of all tokens of a batch stays.

    DyMU (arXiv 2504.17040), section 3.1: at each block the threshold is where the r B edges of highest similarity of a batch of
    B images end, averaged over batches. So every image has its own count, and the ratio is that of the mean. Tokens that score
    the same as the first that stays do too.

    `vltprune.calibrate` takes the mean over its batches for each ratio that it tries. `vltprune.training` has a running mean,
    and the batch's own threshold in training, as in batch normalization. Elsewhere the threshold is fixed (`batch_weight` 0).
    Thresholds are saved with the weights; a config alone has them not.

    Args:
        spec: the block.
        threshold: the threshold before it is fitted, in the units of the scores.
        ratio: the kept ratio, in [0, 1], of all tokens of a batch. 1 keeps all.

    Raises:
        ValueError: for a threshold that is not finite, and for a ratio outside its range.
    """

    knob = Knob("ratio", 0.0, 1.0)
    fits_data = True
    threshold: Tensor

    def __init__(self, spec: BlockSpec, threshold: float = 0.0, ratio: float = 0.85):
        super().__init__(spec)
        if not math.isfinite(threshold) or not 0 <= ratio <= 1:
            raise ValueError(
                f"fitted_threshold(threshold={threshold}, ratio={ratio}): the threshold must be finite, and the ratio of "
                "tokens that stay lie in 0 .. 1"
            )
        self.ratio = ratio
        self.register_buffer("threshold", torch.tensor(float(threshold)))

    def forward(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        if self.ratio == 1:
            return tokens.available.sizes
        if not (self.training and self.batch_weight) or not tokens.layout.total:
            return _count_above(scores, self.threshold.to(scores.dtype), tokens)
        threshold = self._of_batch(scores.detach(), tokens)
        with torch.no_grad():
            self.threshold.lerp_(threshold.to(self.threshold.dtype), self.batch_weight)
        return _count_above(scores, threshold, tokens)

    def _of_batch(self, scores: Tensor, tokens: PackedTokens) -> Tensor:
        """The threshold of a batch, a scalar: halfway between the first score that stays and the next lower one."""
        ranked, number = scores.masked_fill(tokens.protected, math.inf).sort().values, tokens.free.sum()
        goes = number - keep_count(number, self.ratio)
        first = ranked[torch.minimum(goes, number - 1).clamp(min=0)]
        below = ranked.masked_fill(ranked >= first, -math.inf).amax()
        threshold = torch.where(below.isfinite(), (first + below) / 2, first)
        return torch.where(number > 0, threshold, self.threshold.to(threshold.dtype))


@keepers.register("sampled_ratio")
class SampledRatio(Ratio):
    """Keeps the same ratio of every instance's tokens, and samples which ones stay in soft training.

    DynamicViT (Rao et al., arXiv 2106.02034), section 3.2. Scores are probabilities to stay, as the scorer `predictor` gives
    them. Soft training adds logistic noise to their logits, which is the Gumbel softmax of two classes. A token stays or is
    masked by the sign of the sum, with the gradient of its sigmoid. The cost has gradients to the scores too: they alone
    decide how many tokens stay.

    **Departs**: a masked token does not attend to itself, as it does in the reference. No other token reads what it then is. In
    evaluation the ratio is one of the tokens that enter the block, rounded up. The reference rounds rho^s n down.

    Args:
        spec: the block.
        ratio: the kept ratio, in [0, 1].
        decay: above 0. After i earlier pruned blocks the ratio is ratio^(decay^i).
        hard: whether a sample is 0 or 1, at temperature 1 as in the paper. Otherwise it is the relaxed one, a probability that
            hardens as training's temperature falls. Tokens with little of it then leave the batch, so that training is faster.

    Raises:
        ValueError: for arguments outside their range.
    """

    cost_trains_scores = True

    def __init__(self, spec: BlockSpec, ratio: float = 0.7, decay: float = 1.0, hard: bool = True):
        super().__init__(spec, ratio, decay)
        self.hard = hard

    def margin(self, scores: Tensor, tokens: PackedTokens, guidance: Guidance | None) -> Tensor:
        logit = torch.logit(scores, _CERTAIN)
        if not self.training:
            return logit
        # the difference of two Gumbel variables is logistic
        return logit + torch.logit(torch.rand_like(scores), _CERTAIN)


def _count_above(scores: Tensor, threshold: Tensor, tokens: PackedTokens) -> Tensor:
    """[batch] int64: the unprotected tokens of each instance whose scores are above a threshold by more than rounding."""
    size = scores.abs() + threshold.abs()
    above = scores - threshold > precision.ROUNDING * size
    return segments.count(above & tokens.free, tokens.layout)
