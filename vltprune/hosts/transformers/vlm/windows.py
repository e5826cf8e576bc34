"""Sliding windows of language models that read short prompts: they reach as far back as in the whole prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from ...graft import shallow_copy
from .prompt import PromptIndex

M = TypeVar("M", bound=nn.Module)

_SLIDING = "sliding_attention"


def with_whole_windows(language: M, config: Any, index: PromptIndex, is_block_exempt: bool) -> M:
    """Copy a language model so that its windows count the tokens of the whole prompts, those that are gone too.

    The copy is handed its masks. Calls that no window cuts stay as they are.

    Args:
        language: The language model, dense or run by its host; it stays as it is.
        config: The configuration of the whole model.
        index: Where the tokens of the prompts that it reads stand in the whole ones.
        is_block_exempt: Whether tokens of a prompt that see each other both ways do so across windows.

    Returns:
        The copy; `language` itself where no layer has a window.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if window is None or _SLIDING not in (getattr(text, "layer_types", None) or (_SLIDING,)):
        return language

    def give_masks(module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**named, "attention_mask": _masks(text, window, index, is_block_exempt, **named)}

    out = shallow_copy(language)
    out.register_forward_pre_hook(give_masks, with_kwargs=True)
    return out


def _masks(
    config: Any,
    window: int,
    index: PromptIndex,
    is_block_exempt: bool,
    inputs_embeds: Tensor,
    attention_mask: Any = None,
    cache: Cache | None = None,
    **rest: Any,
) -> Any:
    """The masks of a call, by kind of layer or of all; those given where the window reaches over everything.

    ValueError for attention without masks of pairs.
    """
    # layers of a kind have seen the same tokens, and dropped the same
    depth = cache.is_sliding.index(True) if cache is not None and True in cache.is_sliding else 0
    batch, new = inputs_embeds.shape[:2]
    seen = 0 if cache is None else int(cache.get_query_offset(depth))
    if index.whole_length(seen + new) <= window:
        return attention_mask
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"{config._attn_implementation} counts the sliding window of {window} tokens without those that are gone, and "
            f"the whole prompt has {index.whole_length(seen + new)}: write model.set_attn_implementation('sdpa')"
        )
    masks = attention_mask
    if not isinstance(masks, Mapping):
        # without positions, whose gaps would be taken for ends of sequences
        masks = create_masks_for_generate(config, inputs_embeds, attention_mask, cache)
    short = masks[_SLIDING] if isinstance(masks, Mapping) else masks
    place = index.until(batch, seen + new).to(inputs_embeds.device)
    keys, first = (new, 0) if cache is None else cache.get_mask_sizes(new, depth)
    key = torch.arange(first, first + (keys if short is None else short.shape[-1]), device=place.device)
    query = torch.arange(seen, seen + new, device=place.device)[:, None]
    # a static cache has room for keys that are still to come, which nobody sees
    is_far = place[:, query] - window >= place[:, None, key.clamp(max=seen + new - 1)]
    whole = _narrowed(short, is_far[:, None], key > query, is_block_exempt and not seen)
    return {**masks, _SLIDING: whole} if isinstance(masks, Mapping) else whole


def _narrowed(mask: Tensor | None, is_far: Tensor, is_later: Tensor, is_block_exempt: bool) -> Tensor:
    """A mask of pairs, true or 0 where a key is seen, that hides those far away too; None is a causal one.

    `mask` and `is_far` are [batch, 1, queries, keys], `is_later` [queries, keys].
    """
    if mask is None:
        return ~(is_far | is_later)
    if is_block_exempt:
        seen = (mask if mask.dtype is torch.bool else mask == 0)[..., : mask.shape[-2]]
        both = nn.functional.pad(seen & seen.mT, (0, mask.shape[-1] - mask.shape[-2]))
        is_far = is_far & ~both
    return mask & ~is_far if mask.dtype is torch.bool else mask.masked_fill(is_far, torch.finfo(mask.dtype).min)
