"""Distinctness scorers: tokens that resemble each other divide their score among them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...core import precision, segments
from ...core.statistics import AttentionStats
from ...core.tokens import PackedTokens
from ...registry import scorers
from ..block_spec import BlockSpec
from ..guides.base import Guidance
from .base import Madtp, SelfAttention, TokenScorer, normalize, unit

_LITTLE = 1e-3  # a resemblance that counts as none, and one that is short of a whole one by as much counts as whole
_ROUNDING = 1e-4  # relative: rounding of products, divided by the width, leaves this much of a count in doubt


@scorers.register("distinct")
class Distinct(TokenScorer):
    """Distinctness: 1 / the number of unprotected tokens of the instance that a token resembles, itself included.

    The similarity of tokens z, at zero mean and unit length, is exp(-||z_i - z_j||^2 / width). It is rescaled so that 0.001 is
    0 and 0.999 is 1. A unique token then scores 1 exactly, and each of n copies 1 / n, whatever the rounding of distances. Over
    an instance the scores sum to the number of different tokens: the diversity of order 0 of Leinster and Cobbold (Ecology 93,
    2012). Patches of a plain background score low. Words hardly resemble each other: for texts use `distinct_attention`.

    The scores have no gradients. They cost n^2 * dim MACs for n tokens.

    Args:
        spec: the block.
        width: the squared distance at which tokens differ.

    Raises:
        ValueError: for a width that is not above 0.
    """

    def __init__(self, spec: BlockSpec, width: float = 0.03):
        super().__init__(spec)
        if not width > 0:
            raise ValueError(f"{type(self).__name__}(width={width}) must be above 0: a squared distance, such as 0.03")
        self.width = width

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return uniqueness(tokens, self.width)

    def macs(self, before: Tensor, after: Tensor) -> Tensor:
        return self.spec.dim * before**2


class _Weighted(Distinct):
    """Another scorer's scores times those of `distinct`, normalized over the instance."""

    scorer: ClassVar[type[TokenScorer]]

    def __init__(self, spec: BlockSpec, width: float = 0.03):
        super().__init__(spec, width)
        self.base = self.scorer(spec)
        self.needs = self.base.needs

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return normalize(self.base(tokens, stats, guidance) * uniqueness(tokens, self.width), tokens)


@scorers.register("distinct_attention")
class DistinctAttention(_Weighted):
    """`self_attention` times `distinct`: tokens that resemble each other divide the attention that they receive.

    Args:
        spec: the block.
        width: the squared distance at which tokens differ, as in `distinct`.
    """

    scorer = SelfAttention
    needs = SelfAttention.needs


@scorers.register("distinct_madtp")
class DistinctMadtp(_Weighted):
    """`madtp`, MADTP's mean of three scores, times `distinct`.

    Args:
        spec: the block.
        width: the squared distance at which tokens differ, as in `distinct`.
    """

    scorer = Madtp
    needs = Madtp.needs
    guided = True


@torch.no_grad()
def uniqueness(tokens: PackedTokens, width: float) -> Tensor:
    """Scores of `Distinct`: 1 / the number of unprotected tokens that a token resembles.

    Args:
        tokens: the tokens, x [total, dim].
        width: the squared distance at which tokens differ, above 0.

    Returns:
        The scores, [total], in (0, 1], in single precision and without gradients.
    """
    layout = tokens.layout
    with precision.without_autocast(tokens.x.device):
        z = unit(tokens)
        if layout.is_uniform or z.device.type != "cpu":  # elsewhere a call for each instance costs less than padding
            counts = _resembling(segments.pad(z, layout), segments.pad(tokens.free, layout, False), width)
            counts = segments.unpad(counts, layout)
        else:
            parts = zip(z.split(layout.lengths), tokens.free.split(layout.lengths), strict=True)
            counts = torch.cat([_resembling(one, free, width) for one, free in parts])
        return 1 / segments.equalize(counts, layout, _ROUNDING)


def _resembling(z: Tensor, free: Tensor, width: float) -> Tensor:
    """How many free tokens each token resembles, itself included: z [..., n, dim], free [..., n] -> [..., n]."""
    size = z.square().sum(-1)
    apart = size[..., :, None] + size[..., None, :] - 2 * z @ z.mT
    alike = (((-apart.clamp(min=0) / width).exp() - _LITTLE) / (1 - 2 * _LITTLE)).clamp(0, 1) * free[..., None, :]
    itself = torch.eye(alike.shape[-1], dtype=torch.bool, device=alike.device)
    # itself counts as one, which rounding would make less
    return 1 + alike.masked_fill(itself, 0.0).sum(-1)
