"""What is not told twice: scores that tokens share with those that resemble them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core import segments
from ..core.attention import AttentionStats
from ..core.tokens import PackedTokens
from ..registry import scorers
from .block_spec import BlockSpec
from .guides import Guidance
from .scorers import Madtp, SelfAttention, TokenScorer, normalize, unit

_LITTLE = 1e-3  # a resemblance that counts as none, and one that is short of a whole one by as much counts as whole
_ROUNDING = 1e-4  # relative: rounding of products, divided by the width, leaves this much of a count in doubt


@scorers.register("distinct")
class Distinct(TokenScorer):
    """1 / how many unprotected tokens of the instance a token resembles, itself among them: 1 for one that is like no other.

    Tokens z, at zero mean and unit length (a layer norm over sqrt(dim)), resemble each other by exp(-||z_i - z_j||^2 / width),
    stretched so that all below a thousandth is 0 and all above 999 thousandths is 1: a token like no other scores 1 exactly,
    and each of n copies 1 / n, whatever rounding makes of their distances.
    Over an instance the scores add up to how many different tokens it has: the diversity of order 0 of Leinster and Cobbold
    (Ecology 93, 2012), all tokens as frequent. A plain ground, whose patches attention likes no less than others, goes first.
    Words hardly resemble each other: for texts use `distinct_attention`.

    width: the squared distance at which tokens differ. ValueError unless above 0. The scores have no gradients, so that they
    cannot be taught; of those they are multiplied with the gradients stay. They cost n^2 dim MACs.
    """

    pairwise = True

    def __init__(self, spec: BlockSpec, width: float = 0.03):
        super().__init__(spec)
        if not width > 0:
            raise ValueError(f"{type(self).__name__}(width={width}) must be above 0: a squared distance, such as 0.03")
        self.width = width

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return uniqueness(tokens, self.width)


class _Shared(Distinct):
    """Another scorer's scores, each times what `distinct` says, normalized over the instance."""

    scorer: ClassVar[type[TokenScorer]]

    def __init__(self, spec: BlockSpec, width: float = 0.03):
        super().__init__(spec, width)
        self.base = self.scorer(spec)

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return normalize(self.base(tokens, stats, guidance) * uniqueness(tokens, self.width), tokens)


@scorers.register("distinct_attention")
class DistinctAttention(_Shared):
    """`self_attention` times `distinct`: what tokens receive that resemble each other, they share. width: as there."""

    scorer = SelfAttention
    needs = SelfAttention.needs


@scorers.register("distinct_madtp")
class DistinctMadtp(_Shared):
    """`madtp`, MADTP's mean of three scores, times `distinct`. width: as there."""

    scorer = Madtp
    needs = Madtp.needs
    guided = True


@torch.no_grad()
def uniqueness(tokens: PackedTokens, width: float) -> Tensor:
    """What `Distinct` scores: [total], in (0, 1], in single precision."""
    layout = tokens.layout
    with torch.autocast(tokens.x.device.type, enabled=False):
        z = unit(tokens)
        if layout.is_uniform or z.device.type != "cpu":  # elsewhere a call for each instance costs less than padding
            counts = _resembling(segments.pad(z, layout), segments.pad(tokens.free, layout, False), width)
            counts = segments.unpad(counts, layout)
        else:
            parts = zip(z.split(layout.lengths), tokens.free.split(layout.lengths), strict=True)
            counts = torch.cat([_resembling(one, free, width) for one, free in parts])
        return 1 / segments.equalize(counts, layout, _ROUNDING)


def _resembling(z: Tensor, free: Tensor, width: float) -> Tensor:
    """z [..., n, dim], free [..., n] -> how many free tokens each resembles, [..., n], itself at least."""
    size = z.square().sum(-1)
    apart = size[..., :, None] + size[..., None, :] - 2 * z @ z.mT
    alike = (((-apart.clamp(min=0) / width).exp() - _LITTLE) / (1 - 2 * _LITTLE)).clamp(0, 1) * free[..., None, :]
    alike.diagonal(dim1=-2, dim2=-1).fill_(0)  # itself counts as one, which rounding would make less
    return 1 + alike.sum(-1)
