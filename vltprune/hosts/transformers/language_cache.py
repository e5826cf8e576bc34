"""Key-value cache of a pruned language model: each layer holds some of the tokens that it has seen, and knows which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class PrunedCacheLayer(DynamicLayer):
    """Keys and values of the tokens that entered one layer.

    Its length is the number of tokens seen, and not that of those held. Masks made for the dense model so fit it:
    `index` picks their columns. `is_croppable` is false, so that transformers refuses assisted decoding.

    Attributes:
        keys: [batch, heads, n, head_dim], instances of fewer tokens padded.
        values: As keys.
        index: [batch, n] int64, which of the tokens seen each one is; -1 for padding.
        seen: How many tokens each row of the batch has brought so far, padding included.
        is_padded: Whether there is padding.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.index: Tensor | None = None
        self.seen = 0
        self.is_padded = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the tokens of a call.

        Args:
            key_states: [batch, heads, new, head_dim].
            value_states: As key_states.
            *args: The index of the new tokens [batch, new] int64, -1 for padding; the number of tokens seen, those of this
                call included; and whether there is padding.
            **kwargs: None.

        Returns:
            Keys and values of all tokens held.
        """
        index, self.seen, is_padded = args
        self.is_padded = self.is_padded or is_padded
        self.index = index if self.index is None else torch.cat([self.index, index], 1)
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        """The number of tokens seen."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what a prompt keeps depends on all of it."""
        raise ValueError(
            "a pruned language model cannot take tokens back from its cache: generate without assistant_model and "
            "prompt_lookup_num_tokens"
        )

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.index, self.seen, self.is_padded = None, 0, False

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take other rows of the batch, for beam search."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        if self.index is not None:
            self.index = self.index.repeat_interleave(repeats, 0)

    def _select(self, rows: Tensor) -> None:
        if self.index is not None:
            self.index = self.index[rows.to(self.index.device)]

    def visible(self, dense: Tensor | None) -> Tensor | None:
        """Which of the tokens held each query sees.

        Args:
            dense: [1 or batch, queries, seen] bool, which of the tokens seen each query sees. None for all.

        Returns:
            [batch, 1, queries, n] bool; None for all.
        """
        index = self.index
        if index is None or (dense is None and not self.is_padded):
            return None
        held = (index >= 0)[:, None]
        if dense is None:
            return held[:, None]
        columns = index.clamp(min=0)[:, None].expand(-1, dense.shape[1], -1)
        return (dense.expand(len(index), -1, -1).gather(2, columns) & held)[:, None]


def adopt(cache: Cache, depths: int) -> None:
    """Give an empty cache layers that know which tokens they hold.

    Args:
        cache: What the model was called with.
        depths: The number of layers of the model.

    Raises:
        ValueError: For a cache of another type, and for one that a dense model filled.
    """
    stock = (DynamicLayer, DynamicSlidingWindowLayer)
    known = (*stock, PrunedCacheLayer)
    if not isinstance(cache, DynamicCache) or any(type(layer) not in known for layer in cache.layers):
        layers = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
        raise ValueError(
            f"a pruned language model holds other tokens in each layer, and a {type(cache).__name__} of "
            f"{', '.join(sorted(layers)) or 'no layers'} cannot: leave cache_implementation out, or give a "
            "transformers.DynamicCache()"
        )
    if all(type(layer) is PrunedCacheLayer for layer in cache.layers) and len(cache.layers) == depths:
        return
    if cache.get_seq_length() > 0:
        raise ValueError(
            "this cache holds tokens that another model put there, and a pruned one needs to know which of them each layer "
            "has: begin with an empty transformers.DynamicCache()"
        )
    cache.layers[:] = [PrunedCacheLayer() for _ in range(depths)]
