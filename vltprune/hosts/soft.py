"""Soft training behind a tower's blocks: poolers weigh tokens by `keep_prob`, or refuse tokens that are kept in part."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import segments
from ..core.tokens import PackedTokens


def padded_bias(tokens: PackedTokens) -> Tensor | None:
    """The bias of each token's key, padded as `PackedTokens.unpack` pads.

    Returns:
        [batch, longest], added to the attention logits, minus infinity where there is no token; None for nothing to add.
    """
    if tokens.bias is None and tokens.layout.is_uniform:
        return None
    bias = torch.zeros_like(tokens.x[:, 0]) if tokens.bias is None else tokens.bias.to(tokens.x.dtype)
    return segments.pad(bias, tokens.layout, float("-inf"))


def refuse_soft_tokens(tokens: PackedTokens, reader: str, instead: str) -> None:
    """Refuse tokens that are kept in part, for a reader that would take each for whole.

    Args:
        tokens: What the reader gets.
        reader: Its name, for the message.
        instead: What to do instead, for the message.

    Raises:
        ValueError: If `tokens` has a `keep_prob`.
    """
    if tokens.keep_prob is not None:
        raise ValueError(
            f"{reader} cannot weigh tokens, and soft training keeps some in part: {instead}, or train "
            "with soft_temperature 0 (CompressConfig(budget='controller'))"
        )
