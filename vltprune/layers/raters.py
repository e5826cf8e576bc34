"""Raters: the text tokens of a sequence whose attention says which tokens of the image matter (SparseVLM)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import precision
from ..core.modality import RATER, is_of
from ..core.tokens import PackedTokens


@torch.no_grad()
def with_raters(tokens: PackedTokens) -> PackedTokens:
    """Marks the text tokens that resemble the image more than the mean text token does, in the column "rater" [total] bool.

    SparseVLM (arXiv 2410.04417), section 3.2: r = mean over image tokens of softmax over text tokens of H_v H_t^T, of the
    embeddings that enter the first block; raters are those whose r is above its mean. Text tokens are those behind the first
    image token, as in the reference, or all where none is behind it. Where no token is above the mean, all of them rate.

    Args:
        tokens: tokens of a text and an image before the first block.

    Returns:
        The same tokens with the column, which every later reduction keeps.

    Raises:
        LookupError: for tokens of one modality.
    """
    with precision.without_autocast(tokens.x.device):
        parts = zip(precision.single(tokens.x).split(tokens.layout.lengths), _images(tokens), strict=True)
        return tokens.with_column(RATER, torch.cat([_raters(x, is_image) for x, is_image in parts]))


def rater_macs(tokens: PackedTokens) -> list[int]:
    """Multiply-accumulates of `with_raters`, one number an instance.

    Args:
        tokens: the tokens that it was called with.

    Returns:
        The products of image tokens and text tokens.
    """
    return [int(one.sum()) * int(_texts(one).sum()) * tokens.x.shape[1] for one in _images(tokens)]


def _images(tokens: PackedTokens) -> tuple[Tensor, ...]:
    """[n] bool of each instance: the tokens of the image."""
    return is_of(tokens, "image").split(tokens.layout.lengths)


def _texts(is_image: Tensor) -> Tensor:
    """[n] bool: the text tokens behind the first image token; all where none is."""
    behind = ~is_image & (is_image.cumsum(0) > 0)
    return behind if behind.any() else ~is_image


def _raters(x: Tensor, is_image: Tensor) -> Tensor:
    """[n] bool, of one instance x [n, dim]."""
    text = _texts(is_image)
    resembles = (x[is_image] @ x[text].T).softmax(1).mean(0)
    above = resembles > resembles.mean() * (1 + precision.ROUNDING)
    return text.masked_scatter(text, above) if above.any() else text
