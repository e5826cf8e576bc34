"""Operations on packed tokens and checks of blocks that several hosts use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..core import precision, segments
from ..core.checks import is_recorded
from ..core.layout import Layout
from ..core.tokens import PackedTokens
from ..layers.guides.base import TokenProjection
from .refusals import dotted


def token_projection(norm: object, projection: object) -> TokenProjection | None:
    """Build a TokenProjection of a tower's final norm and the projection behind it.

    Args:
        norm: The final norm.
        projection: A linear layer, or a weight [dim of the tower, embed_dim].

    Returns:
        The projection; None for other layers, and for weights that are quantized or sharded.
    """
    weight, bias = projection, None
    if type(projection) is nn.Linear:
        weight, bias = projection.weight, projection.bias
    elif isinstance(projection, Tensor):
        weight = projection.mT
    plain = type(weight) in (nn.Parameter, Tensor) and isinstance(weight, Tensor) and weight.is_floating_point()
    if not plain or not isinstance(norm, nn.LayerNorm) or weight.shape[1:] != norm.normalized_shape:
        return None
    return TokenProjection(norm, weight, bias)


def image_projection(norm: object, projection: object) -> dict[str, TokenProjection]:
    """Build the TokenProjection of an image tower.

    Args:
        norm: The final norm.
        projection: As in `token_projection`.

    Returns:
        The projection by the tower's name; empty where there is none.
    """
    found = token_projection(norm, projection)
    return {} if found is None else {"image": found}


def check_blocks(
    tower: nn.Module, blocks: Iterable[nn.Module], known: Mapping[type, Sequence[type]], attention: str = "attn"
) -> None:
    """Check that a host knows the type of each block and of its attention.

    Args:
        tower: The tower, for the message.
        blocks: Its blocks.
        known: Types of blocks, each with the types of attention that it may have.
        attention: Dotted name of the attention in a block.

    Raises:
        TypeError: For a block or an attention of another type.
    """
    for depth, block in enumerate(blocks):
        part: nn.Module = block if type(block) not in known else attrgetter(attention)(block)
        if part is block or type(part) not in known[type(block)]:
            pairs = "; ".join(f"{b.__name__} with {', '.join(a.__name__ for a in attns)}" for b, attns in known.items())
            raise TypeError(
                f"cannot prune this {type(tower).__name__}: block {depth} has a {dotted(type(part))}, which no host runs. "
                f"Supported blocks: {pairs}"
            )


def drop_path(module: nn.Module, branch: Tensor, layout: Layout) -> Tensor:
    """Apply stochastic depth per instance.

    timm's DropPath drops along the first dimension, which in packed tokens is not the batch. So only its probability and
    scaling are used.

    Args:
        module: The block's DropPath, or an Identity.
        branch: Output of a branch [total, dim].
        layout: Layout of its tokens.

    Returns:
        The branch [total, dim], zero for dropped instances; as it is outside training.
    """
    probability: Any = getattr(module, "drop_prob", 0.0)
    if not module.training or not probability:
        return branch
    keep = 1 - probability
    mask = branch.new_empty(layout.batch).bernoulli_(keep)
    if getattr(module, "scale_by_keep", True):
        mask = mask / keep
    return branch * layout.spread(mask)[:, None]


def is_affine(projection: nn.Module) -> bool:
    """Whether a projection is certain to be x W^T + b.

    An adapter, a quantized layer or a hook may compute anything; then tokens are averaged behind it. A module of another class
    may say so itself, by an attribute `is_affine`.
    """
    if type(projection) is nn.Identity:
        return True
    if type(projection) in (nn.Linear, NonDynamicallyQuantizableLinear):
        plain = type(projection.weight) is nn.Parameter
    else:
        plain = getattr(projection, "is_affine", False) is True
    return plain and not (projection._forward_hooks or projection._forward_pre_hooks)


def weighted_mean(tokens: PackedTokens, counted: Tensor) -> Tensor:
    """Mean over the counted tokens of each instance; a merged token weighs as many as it stands for.

    Args:
        tokens: Packed tokens, x [total, dim].
        counted: Bool [total], the tokens to average.

    Returns:
        [batch, dim].
    """
    # in half precision a sum of many tokens overflows
    x = precision.single(tokens.x)
    size = counted.to(x.dtype) * tokens.weight
    mean = segments.sum(x * size[:, None], tokens.layout) / segments.sum(size, tokens.layout)[:, None]
    return mean.to(tokens.x.dtype)


def by_tiles(function: Callable[[Tensor], Tensor], x: Tensor, rows: int = 640) -> Tensor:
    """Compute function(x) a tile of rows at a time.

    On CPUs an MLP's hidden layer then stays in cache, which is worth more than the larger matrix product. On other devices, and
    where autograd records, it is one call.

    Args:
        function: Acts on each row by itself, and keeps its width.
        x: [total, dim].
        rows: Most rows of a tile.

    Returns:
        function(x), [total, dim].
    """
    if x.device.type != "cpu" or is_recorded() or x.shape[0] <= rows or torch.is_grad_enabled():
        return function(x)
    out = torch.empty_like(x)
    tiles = -(-x.shape[0] // rows)
    for tile, result in zip(x.tensor_split(tiles), out.tensor_split(tiles), strict=True):
        result.copy_(function(tile))
    return out
