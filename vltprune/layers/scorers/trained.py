"""Scorers of trained methods: a network that predicts which tokens to keep, and halting probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...core import precision, segments
from ...core.statistics import AttentionStats
from ...core.tokens import PackedTokens
from ...registry import scorers
from ..block_spec import BlockSpec
from ..guides.base import Guidance
from .base import TokenScorer


@scorers.register("predictor")
class Predictor(TokenScorer):
    """The probability that a token stays, which a small network predicts from the token and the mean of all tokens.

    DynamicViT (Rao et al., arXiv 2106.02034), section 3.2. A linear layer behind a LayerNorm gives each token a local and a
    global half. The global halves of the unprotected tokens are averaged, weighted by size and by probability to stay. An
    MLP of both halves gives two logits, to keep and to drop. The score is the first entry of their softmax. The network is
    random until it is trained.

    Args:
        spec: the block.

    Raises:
        ValueError: for tokens narrower than 4.
    """

    def __init__(self, spec: BlockSpec):
        super().__init__(spec)
        if spec.dim < 4:
            raise ValueError(f"scorer='predictor' halves the width of tokens twice: {spec.dim} is below 4")
        half, quarter = spec.dim // 2, spec.dim // 4
        self.halves = nn.Sequential(nn.LayerNorm(spec.dim), nn.Linear(spec.dim, 2 * half), nn.GELU())
        self.logits = nn.Sequential(
            nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        layout = tokens.layout
        weights = next(self.parameters())
        own, shared = self.halves(tokens.x.to(weights.dtype)).chunk(2, -1)
        weight = tokens.weight.masked_fill(tokens.protected, 0.0)
        total = segments.sum(precision.single(shared) * weight[:, None], layout)
        mean = total / segments.sum(weight, layout).clamp(min=1e-6)[:, None]
        both = torch.cat([own, layout.spread(mean.to(own.dtype))], -1)
        return precision.single(self.logits(both)).softmax(-1)[:, 0]

    def macs(self, before: Tensor, after: Tensor) -> Tensor:
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Linear)]
        return before * (sum(layer.weight.numel() for layer in layers) + self.spec.dim // 2)


@scorers.register("halting")
class Halting(TokenScorer):
    """How far a token is from halting: the logarithm of 1 - eps over the sum of its halting probabilities.

    A-ViT (Yin et al., arXiv 2112.07658): h = sigmoid(gain * x_0 - center), with x_0 the first entry of the token. A token halts
    at the first layer where the sum of h over the layers so far reaches 1 - eps: there this score is no longer above 0. As a
    logarithm it also tells sums apart that are far below 1, so that a budget can halt tokens at another sum. The column
    "halting" carries the score from layer to layer.

    **Departs**: gain and center are constants, as in the reference code. Only layers that score tokens take part in the sum.

    Args:
        spec: the block.
        gain: the scale of x_0. Not 0.
        center: what is subtracted, in units of the logit.
        eps: in [0, 1).

    Raises:
        ValueError: for arguments outside their range.
    """

    remembers: str = "halting"

    def __init__(self, spec: BlockSpec, gain: float = 5.0, center: float = 10.0, eps: float = 0.01):
        super().__init__(spec)
        if gain == 0 or not math.isfinite(gain) or not math.isfinite(center):
            raise ValueError(f"halting(gain={gain}, center={center}): both must be finite, and the gain not 0")
        if not 0 <= eps < 1:
            raise ValueError(f"halting(eps={eps}) must lie in [0, 1): tokens halt where the sum reaches 1 - eps")
        self.gain, self.center, self.eps = gain, center, eps

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        total = torch.nn.functional.logsigmoid(self._logit(tokens))
        before = tokens.columns.get(self.remembers)
        if before is not None:
            total = torch.logaddexp(total, math.log(1 - self.eps) - before)
        return math.log(1 - self.eps) - total

    def halting(self, tokens: PackedTokens) -> Tensor:
        """The halting probabilities at this layer.

        Args:
            tokens: the tokens that enter the layer.

        Returns:
            The probabilities, [total].
        """
        return self._logit(tokens).sigmoid()

    def remaining(self, tokens: PackedTokens) -> Tensor:
        """What the layers before left of 1 - eps.

        Args:
            tokens: the tokens that enter the layer.

        Returns:
            The remainders, [total].
        """
        before = tokens.columns.get(self.remembers)
        if before is None:
            return precision.single(tokens.x.new_full((tokens.layout.total,), 1 - self.eps))
        return (1 - self.eps) * (1 - (-before).exp())

    def _logit(self, tokens: PackedTokens) -> Tensor:
        """[total]: the logit of the halting probabilities."""
        return self.gain * precision.single(tokens.x[:, 0]) - self.center

    def macs(self, before: Tensor, after: Tensor) -> Tensor:
        return before
