"""Distributed training: every weight that pruning adds gets a gradient, zero where nothing uses it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.tokens import PackedTokens


def reach_weights(tokens: PackedTokens, *parts: nn.Module | None) -> PackedTokens:
    """Connects the trainable weights of parts to tokens with a zero gradient.

    DistributedDataParallel waits for the gradients of all weights in each step. Some weights may get none, such as those of a
    guide's map where nothing is fused. Outside torch.distributed, and without gradients, the tokens are returned unchanged.

    Args:
        tokens: the tower's output.
        *parts: modules whose weights are connected; None is ignored.

    Returns:
        The tokens, with equal contents.
    """
    if not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
        return tokens
    weights = [weight for part in parts if part is not None for weight in part.parameters() if weight.requires_grad]
    return tokens.with_x(_Tie.apply(tokens.x, *weights)) if weights else tokens


class _Tie(torch.autograd.Function):
    """The identity of its first argument; the gradient of all others, weights, is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.weights]
        return gradients[0], *zeros
