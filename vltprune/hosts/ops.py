"""Operations on packed tokens and checks of blocks that several hosts share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..core import precision, segments
from ..core.tokens import Layout, PackedTokens
from .refusals import dotted


def check_blocks(
    tower: nn.Module, blocks: Iterable[nn.Module], known: Mapping[type, Sequence[type]], attention: str = "attn"
) -> None:
    """TypeError unless each block's type is a key of `known` and its `attention` is of one of the types listed there."""
    for depth, block in enumerate(blocks):
        part: Any = block if type(block) not in known else attrgetter(attention)(block)
        if part is block or type(part) not in known[type(block)]:
            pairs = "; ".join(f"{b.__name__} with {', '.join(a.__name__ for a in attns)}" for b, attns in known.items())
            raise TypeError(
                f"cannot prune this {type(tower).__name__}: block {depth} has a {dotted(type(part))}, which no host takes "
                f"apart. Supported blocks: {pairs}"
            )


def drop_path(module: nn.Module, branch: Tensor, layout: Layout) -> Tensor:
    """Stochastic depth per instance, on packed tokens: branch [total, dim].

    timm's DropPath drops along the first dimension, which here are tokens; its probability and scaling are read instead.
    """
    probability: Any = getattr(module, "drop_prob", 0.0)
    if not module.training or not probability:
        return branch
    keep = 1 - probability
    mask = branch.new_empty(layout.batch).bernoulli_(keep)
    if getattr(module, "scale_by_keep", True):
        mask = mask / keep
    return branch * mask[layout.instance, None]


def is_affine(projection: nn.Module) -> bool:
    """Whether a projection is certain to be x W^T + b.

    An adapter, a quantized layer or a hook may compute anything, and then tokens are averaged behind it.
    """
    if type(projection) is nn.Identity:
        return True
    if type(projection) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return False
    weight: Any = projection.weight
    return type(weight) is nn.Parameter and not (projection._forward_hooks or projection._forward_pre_hooks)


def weighted_mean(tokens: PackedTokens, counted: Tensor) -> Tensor:
    """Mean over the counted [total] tokens of each instance, [batch, dim]; a merged token weighs as many as it stands for."""
    x = precision.single(tokens.x)  # in half a sum of many tokens overflows
    size = counted.to(x.dtype) * tokens.weight
    mean = segments.sum(x * size[:, None], tokens.layout) / segments.sum(size, tokens.layout)[:, None]
    return mean.to(tokens.x.dtype)


def by_tiles(function: Callable[[Tensor], Tensor], x: Tensor, rows: int = 640) -> Tensor:
    """function(x) for a function that acts row by row, a tile of rows at a time: x [total, dim].

    An MLP's hidden layer then stays in cache, which on CPUs is worth more than the larger matrix product; elsewhere, and
    where autograd records, it is one call.
    """
    if x.device.type != "cpu" or len(x) <= rows or torch.is_grad_enabled():
        return function(x)
    out = torch.empty_like(x)
    tiles = -(-len(x) // rows)
    for tile, space in zip(x.tensor_split(tiles), out.tensor_split(tiles), strict=True):
        space.copy_(function(tile))
    return out
