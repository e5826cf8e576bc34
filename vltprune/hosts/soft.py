"""Soft training, behind a tower's blocks: tokens that are there in part are weighed by what reads them, or refused."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import segments
from ..core.tokens import PackedTokens


def padded_bias(tokens: PackedTokens) -> Tensor | None:
    """[batch, longest]: what is added to the attention logits of each token's key, padded as `unpack` pads; minus infinity
    where there is no token. None for nothing."""
    if tokens.bias is None and tokens.layout.is_uniform:
        return None
    bias = torch.zeros_like(tokens.x[:, 0]) if tokens.bias is None else tokens.bias.to(tokens.x.dtype)
    return segments.pad(bias, tokens.layout, float("-inf"))


def refuse_parts(tokens: PackedTokens, reader: str, instead: str) -> None:
    """ValueError where tokens are there in part, for a reader that would take them for whole; `instead`: what to do."""
    if tokens.keep_prob is not None:
        raise ValueError(
            f"{reader} takes each token for whole, and soft training keeps some in part: {instead}, or train "
            "with soft_temperature 0 (CompressConfig(budget='controller'))"
        )
