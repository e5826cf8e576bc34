"""Token scorers: each turns attention statistics and guidance into one importance score per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import precision, segments
from ...core.kernels.native import kernels
from ...core.statistics import AttentionStats, Stat
from ...core.tokens import PackedTokens
from ...registry import scorers
from ..block_spec import BlockSpec
from ..guides.base import Guidance
from ..printing import PrintedPart

_EPS = 1e-8


class TokenScorer(PrintedPart, ABC):
    """Base class of scorers: they score the tokens that enter a block, and larger scores are kept.

    Implementations take `spec` and arguments of their own. Scores are in single precision, whatever the model's dtype is.

    Attributes:
        needs: the attention statistics that it reads. A block that cannot compute them is refused when the model is built.
        guided: whether it reads the guidance of an alignment guide.
        reads_grid: whether it reads the row and the column of patches, which the tower then gives its tokens.
        remembers: the column of the tokens in which later layers find its scores. None for none.
        spec: the block that it is built for.
    """

    needs: Stat = Stat.NONE
    guided: ClassVar[bool] = False
    reads_grid: ClassVar[bool] = False
    remembers: str | None = None

    def __init__(self, spec: BlockSpec):
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        """Scores the tokens of a block.

        Args:
            tokens: the block's input, x [total, dim].
            stats: the attention statistics of the block that `needs` declares.
            guidance: how the tokens relate to the guide's anchors. None without a guide.

        Returns:
            The scores, [total]. Those of protected tokens are ignored.
        """

    def macs(self, before: Tensor, after: Tensor) -> Tensor | float:
        """Multiply-accumulates of the scorer's own comparisons, [batch]; by default none. Statistics are counted apart.

        Args:
            before: [batch], the tokens that enter the block.
            after: [batch], the tokens that leave it.
        """
        return 0.0


@scorers.register("self_attention")
class SelfAttention(TokenScorer):
    """Attention that a token receives from unprotected tokens, by its strongest head, normalized over the instance.

    MADTP (arXiv 2403.02991), section 3.3, S_self: sum over queries of the maximum over heads.
    """

    needs = Stat.RECEIVED

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return normalize(stats[Stat.RECEIVED], tokens, are_shares=True)


@scorers.register("cls_attention")
class ClsAttention(TokenScorer):
    """Attention that the summary token pays to a token, with heads weighted by the norms of their outputs at the token.

    MADTP (arXiv 2403.02991), section 3.3, S_cls: sum over heads h of P[h, cls, j] ||o[h, j]|| / sum over heads ||o[., j]||.
    """

    needs = Stat.SUMMARY | Stat.CONTEXT

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        context = stats[Stat.CONTEXT]
        return (stats[Stat.SUMMARY] * context).sum(-1) / context.sum(-1).clamp(min=_EPS)


@scorers.register("mean_cls_attention")
class MeanClsAttention(TokenScorer):
    """Attention that the summary token pays to a token, mean over heads: EViT (arXiv 2202.07800), section 3.2."""

    needs = Stat.SUMMARY

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return stats[Stat.SUMMARY].mean(-1)


@scorers.register("text_attention")
class TextAttention(TokenScorer):
    """Attention that a token receives from the text of its instance, mean over heads and over text tokens: PuMer (ACL 2023).

    For single-stream transformers such as ViLT, where text and image are one sequence: s_j = mean_h mean_i A[h, i, j] over
    the text tokens i, its class token included and padding left out. Stages with `modality="image"` prune image tokens by it.

    With raters, the text tokens i are those that resemble the image (SparseVLM, arXiv 2410.04417, section 3.2; `with_raters`).

    Args:
        spec: the block.
        raters: whether text tokens alone count that resemble the image more than the mean text token does.
    """

    needs = Stat.FROM_TEXT

    def __init__(self, spec: BlockSpec, raters: bool = False):
        super().__init__(spec)
        self.raters = raters
        self.needs = Stat.FROM_RATERS if raters else Stat.FROM_TEXT

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return stats[self.needs]


@scorers.register("alignment")
class Alignment(TokenScorer):
    """Affinity to the closest shared anchor, normalized over the instance.

    MADTP (arXiv 2403.02991), section 3.3, S_tok: maximum over anchors k of A[j, k].
    """

    guided = True

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        assert guidance is not None
        return normalize(guidance.affinity.amax(-1), tokens)


@scorers.register("madtp")
class Madtp(TokenScorer):
    """MADTP's token importance score: the mean of `self_attention`, `cls_attention` and `alignment`.

    MADTP (arXiv 2403.02991), section 3.3, TIS = (S_self + S_cls + S_tok) / 3.

    **Departs**: a language model has no summary token. There the text of the prompt has its place: S_cls is `text_attention`.
    """

    needs = SelfAttention.needs | ClsAttention.needs
    guided = True

    def __init__(self, spec: BlockSpec):
        super().__init__(spec)
        summary = TextAttention if spec.modalities and not spec.has_summary else ClsAttention
        self.terms = nn.ModuleList(term(spec) for term in (SelfAttention, summary, Alignment))
        self.needs = SelfAttention.needs | summary.needs

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        received, summary, alignment = (term(tokens, stats, guidance) for term in self.terms)
        return (received + summary + alignment) / 3


@scorers.register("equal")
class Equal(TokenScorer):
    """Scores every token 1, for selectors that look at similarity alone."""

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        return precision.single(tokens.x.new_ones(tokens.layout.total))


@scorers.register("random")
class Random(TokenScorer):
    """Random scores in (0, 1), the baseline of every method.

    They are a hash of the seed, the depth and the token's original position, so that they do not depend on batch mates.

    Args:
        spec: the block.
        seed: another seed gives other scores.
    """

    def __init__(self, spec: BlockSpec, seed: int = 0):
        super().__init__(spec)
        self.key = hash_integers(seed, spec.depth)

    def forward(self, tokens: PackedTokens, stats: AttentionStats, guidance: Guidance | None) -> Tensor:
        drawn = hash_integers(tokens.position, self.key)
        return ((drawn >> 8).float() + 0.5) / 2**23


def normalize(scores: Tensor, tokens: PackedTokens, are_shares: bool = False) -> Tensor:
    """Scores divided by their sum over the unprotected tokens of each instance, MADTP's norm1(z) = z / sum z.

    Dot products may sum to zero or less, where the division would reverse their order or overflow. There the smallest score of
    the instance is subtracted first.

    Args:
        scores: [total]; half precision is converted to single.
        tokens: the tokens that they are of.
        are_shares: whether the scores are shares of attention, which are never negative.

    Returns:
        The normalized scores, [total].
    """
    native = kernels(scores)
    if native is not None:
        normalized = native.normalize(scores, tokens.protected, tokens.layout.lengths, are_shares)
        if normalized is not None:
            return normalized
    layout, z = tokens.layout, segments.pad(precision.single(scores), tokens.layout)
    hides = segments.pad(tokens.protected, layout, True)
    total = z.masked_fill(hides, 0.0).sum(1, keepdim=True)
    if not are_shares and not precision.surely_none(z < 0):
        z = torch.where(total <= z.masked_fill(hides, 0.0).abs().sum(1, keepdim=True) * 1e-6, _lifted(z, hides), z)
        total = z.masked_fill(hides, 0.0).sum(1, keepdim=True)
    return segments.unpad(z / total.clamp(min=_EPS), layout)


def _lifted(scores: Tensor, hides: Tensor) -> Tensor:
    """Scores [batch, longest] minus the smallest one of the instance, where `hides` does not hold."""
    # lifting leaves of scores that are alike little more than rounding: they must be equal before
    equal = precision.equalize(scores.masked_fill(hides, float("-inf")))
    lowest = equal.masked_fill(hides, float("inf")).amin(1, keepdim=True)
    return (equal - lowest).masked_fill(hides, 0.0)


def unit(tokens: PackedTokens) -> Tensor:
    """Tokens at zero mean and unit length, layer_norm(x) / sqrt(dim), in single precision: [total, dim]."""
    dim = tokens.x.shape[-1]
    return F.layer_norm(tokens.x.float(), (dim,)) / dim**0.5


Integers = TypeVar("Integers", Tensor, int)


def hash_integers(a: Integers, b: Integers | int) -> Integers:
    """A 31-bit hash of two integers by xorshift-multiply rounds.

    Args:
        a: an integer, or a tensor of int64, which is hashed element by element.
        b: an integer, or a tensor that broadcasts with `a`.

    Returns:
        The hash, in 0 .. 2^31 - 1, an integer or a tensor as `a` is.
    """
    # engines such as OpenVINO have integers of 32 bits: products may wrap around, but constants must fit
    h = (a * 0x1E3779B1 + ((b * 0x05EBCA77 + 0x165667B1) & 0x7FFFFFFF)) & 0x7FFFFFFF
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        h = ((h ^ (h >> 15)) * multiplier) & 0x7FFFFFFF
    return h ^ (h >> 14)
