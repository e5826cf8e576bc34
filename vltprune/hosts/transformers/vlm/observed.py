"""Statistics of the attention of one block of an image tower, read while the tower runs as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ....core.attention_stats import attend_with_stats
from ....core.statistics import AttentionStats, Stat
from ....core.tokens import PackedTokens
from ...graft import shallow_copy, with_descendant

# transformers looks attention up by name; ours is that of a copy of one block
_NAME = "vltprune_statistics"


class Observer:
    """Computes the attention of one block together with its statistics.

    Args:
        needs: The statistics.
        prefix: How many tokens of an image stand before its patches; the first of them is its summary.

    Attributes:
        stats: The statistics of all tokens, once the block has run.
        images: How many images there were.
    """

    def __init__(self, needs: Stat, prefix: int):
        self.needs, self.prefix = needs, prefix
        self.stats, self.images = AttentionStats(), 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, dropout: float) -> Tensor:
        """Attend as transformers' functions do.

        Args:
            q: Queries [images, heads, n, head_dim].
            k: Keys, as q.
            v: Values, as q.
            mask: Which keys are seen, in any form that transformers has; None for all.
            scale: The factor of the dot products.
            dropout: Dropout probability of the attention weights.

        Returns:
            The context [images, n, heads, head_dim].
        """
        shape = (q.shape[0], q.shape[2])
        query, key, value = (one.transpose(1, 2).flatten(0, 1) for one in (q, k, v))
        x = query.flatten(1).unflatten(0, shape)
        tokens = PackedTokens.pack(x, protected=self.prefix, summary=self.prefix > 0)
        options: dict[str, Any] = {"key_bias": _key_bias(mask), "dropout": dropout}
        context, self.stats = attend_with_stats(query, key, value, tokens, scale, self.needs, **options)
        self.images = shape[0]
        return context.unflatten(0, shape)


def observed(tower: nn.Module, blocks: str, attention: str, depth: int, observer: Observer) -> nn.Module:
    """Copy a tower, with one block whose attention an observer computes. All weights are shared; `tower` stays as it is.

    Args:
        tower: The dense tower.
        blocks: Dotted name of its blocks.
        attention: Dotted name of the attention in a block.
        depth: Index of the block.
        observer: What computes its attention.

    Returns:
        The copy.
    """
    layers = shallow_copy(tower.get_submodule(blocks))
    for number, (name, block) in enumerate(tower.get_submodule(blocks).named_children()):
        # all of them: transformers hooks blocks and attentions of a tower whose hidden states a model reads
        attn: Any = shallow_copy(block.get_submodule(attention))
        if number == depth:
            attn.config, attn.observer = copy.copy(attn.config), observer
            attn.config._attn_implementation = _NAME
        layers._modules[name] = with_descendant(block, attention, attn)
    return with_descendant(tower, blocks, layers)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **named: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return module.observer.attend(query, key, value, attention_mask, scale, dropout), None


AttentionInterface.register(_NAME, _attend)


def _key_bias(mask: Any) -> Tensor | None:
    """[tokens of all images]: what is added to the logits of each key. ValueError for a mask that is no tensor."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"the attention of an image tower cannot be read through a {type(mask).__name__}: call "
            "model.set_attn_implementation('sdpa')"
        )
    # padding is the same for all heads and queries
    keys = mask[:, 0, 0] if mask.dim() == 4 else mask
    if not keys.is_floating_point():
        keys = torch.zeros(keys.shape, device=keys.device).masked_fill(keys == 0, float("-inf"))
    return keys.flatten()
