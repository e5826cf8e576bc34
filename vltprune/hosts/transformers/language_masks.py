"""Masks of language models: which tokens of a call are visual, which are padding, and which keys a query sees."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ...core.tokens import LAST, SOURCE, PackedTokens
from ...layers.grid import COLUMN as GRID
from .vlm.prompt import current_visual_tokens


def visual_rows(mask: Tensor | None, batch: int, length: int, seen: int, device: torch.device) -> Tensor:
    """Which tokens of a prompt are visual, as the call says or the vision-language model that it is a part of.

    Args:
        mask: What the call says, [batch, prompt] bool; None for nothing.
        batch: The number of rows.
        length: Tokens of each row in this call.
        seen: Tokens of each row in the cache.
        device: Of the result.

    Returns:
        [batch, length] bool; all false behind a prompt.

    Raises:
        ValueError: For a part of a prompt.
    """
    current = current_visual_tokens()
    if mask is None and current is not None:
        mask = current.is_visual.repeat_interleave(batch // len(current.is_visual), 0)  # beams
    if mask is None or seen:
        return torch.zeros(batch, length, dtype=torch.bool, device=device)
    if mask.shape[1] > length:
        raise ValueError(
            f"a language model is pruned by the whole prompt, and {length} of its {mask.shape[1]} tokens came: leave "
            "prefill_chunk_size out"
        )
    # without a cache the tokens generated so far are behind the prompt
    return functional.pad(mask.to(device), (0, length - mask.shape[1]))


def given_mask(mask: object, kind: str, batch: int, length: int, seen: int) -> Tensor | None:
    """The caller's mask for one kind of layer.

    Args:
        mask: `attention_mask` as the dense model takes it: [batch, seen + length], [batch, 1, length, seen + length], or one by
            kind of layer.
        kind: "full_attention" or "sliding_attention".
        batch: The number of rows.
        length: Tokens of each row in this call.
        seen: Tokens of each row in the cache.

    Returns:
        Of padding, [batch, seen + length] bool, or of pairs, [batch, length, seen + length] bool; None for none.

    Raises:
        TypeError, ValueError: For another form or shape.
    """
    if isinstance(mask, Mapping):
        if kind not in mask:
            raise ValueError(f"attention_mask has no mask for {kind}, only for {', '.join(mask)}")
        mask = mask[kind]
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise TypeError(
            "a pruned language model takes attention_mask [batch, length], or [batch, 1, length, length] of each pair, not a "
            f"{type(mask).__name__}: write model.set_attn_implementation('sdpa')"
        )
    wanted = (batch, seen + length) if mask.ndim == 2 else (batch, 1, length, seen + length)
    if tuple(mask.shape) not in (wanted, (1, *wanted[1:])):
        raise ValueError(f"attention_mask must be {list(wanted)}, got {list(mask.shape)}")
    if mask.ndim == 2:
        return mask.bool()
    # of eager attention: 0 where a key is seen, a large negative number elsewhere
    pairs = mask if mask.dtype is torch.bool else mask == 0
    return pairs[:, 0].expand(batch, -1, -1)


def real_tokens(masks: Mapping[str, Tensor | None]) -> Tensor | None:
    """Which tokens of a prompt are no padding, [batch, length] bool: those that see themselves. None for all."""
    for mask in masks.values():
        if mask is not None:
            return mask if mask.ndim == 2 else mask.diagonal(dim1=1, dim2=2)
    return None


def visible_keys(
    mask: Tensor | None, window: int | None, seen: int, length: int, device: torch.device
) -> Tensor | None:
    """Which keys the tokens behind a prompt see.

    Args:
        mask: What `given_mask` returned.
        window: How many tokens back a query sees, itself included; None for all.
        seen: Tokens of each row in the cache.
        length: Tokens of each row in this call.
        device: Of the result.

    Returns:
        [1 or batch, length, seen + length] bool; None for all.
    """
    if mask is not None and mask.ndim == 3:
        return mask
    if mask is None and length == 1 and (window is None or window > seen):
        return None
    key = torch.arange(seen + length, device=device)
    query = key[seen:, None]
    visible = key <= query
    if window is not None:
        visible = visible & (query - key < window)
    return visible[None] if mask is None else visible & mask[:, None].to(device)


def with_prompt_values(tokens: PackedTokens, length: int, seen: int) -> PackedTokens:
    """The tokens of a prompt with what the vision-language model around knows of each.

    These are probabilities to stay, in soft training, the grid of patches, which token of the image tower each is, and a mark
    on the token that ends the instruction.

    Args:
        tokens: The tokens of the call.
        length: Tokens of each row in this call.
        seen: Tokens of each row in the cache.

    Returns:
        The same tokens; they are unchanged where nothing is known, and behind a prompt.
    """
    current = current_visual_tokens()
    if current is None or seen:
        return tokens
    row = tokens.layout.instance * length + tokens.position

    def column(values: Tensor) -> Tensor:
        return values.to(row.device).flatten(-2).index_select(-1, row)

    if current.keep_prob is not None and current.counted_prob is not None:
        tokens = tokens.with_keep_prob(column(current.keep_prob), column(current.counted_prob))
    if current.grid is not None and current.grid.shape[1:] == (tokens.layout.batch, length):
        tokens = tokens.with_column(GRID, column(current.grid).T)
    # a call without images, as classifier-free guidance makes one, has none of these tokens
    if current.source is not None and current.source.shape[1] == length:
        # beams repeat prompts
        repeats = tokens.layout.batch // len(current.source)
        tokens = tokens.with_column(SOURCE, column(current.source.repeat_interleave(repeats, 0)))
    return tokens if current.last is None else tokens.with_column(LAST, column(current.last))
