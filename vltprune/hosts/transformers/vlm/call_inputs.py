"""What the inputs of a call must be where visual tokens are pruned."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# names of a model's pixels, by modality
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def check_inputs(kind: str, named: Mapping[str, Any], placeholders: Mapping[str, int], has_cache: bool) -> None:
    """Check inputs before anything runs.

    Args:
        kind: The name of the model's class.
        named: The inputs of the call, those of new tokens behind a cache.
        placeholders: The ids of placeholders, by modality.
        has_cache: Whether a cache holds what is before them.

    Raises:
        ValueError: For inputs that cannot be pruned, or not pruned right.
    """
    if "mm_encoder_outputs" in named:
        raise ValueError("mm_encoder_outputs holds features that are not pruned: give the images, pixel_values=...")
    unknown = next((name for name in named if name.startswith("pixel_values") and name not in PIXELS.values()), None)
    if unknown is not None:
        raise ValueError(
            f"a pruned {kind} does not take {unknown}: what is pruned are images given as pixel_values and "
            "videos given as pixel_values_videos; give those alone, or run the dense model"
        )
    pixels = [name for name in PIXELS.values() if name in named]
    ids = named.get("input_ids")
    if pixels:
        if ids is None:
            raise ValueError(
                f"{pixels[0]} is given without input_ids: give the prompt as token ids, with its placeholders"
            )
        check_mask(named.get("attention_mask"))
    without = next((one for one, name in PIXELS.items() if name in named and one not in placeholders), None)
    if without is not None:
        raise ValueError(f"a {kind} has no placeholders of {without}s: leave {PIXELS[without]} out")
    for modality, placeholder in placeholders.items():
        if PIXELS[modality] not in named and ids is not None:
            places = int((ids == placeholder).sum())
            if places:
                what = "behind what the cache holds the prompt" if has_cache else "the prompt"
                raise ValueError(
                    f"{what} has {places} placeholders of {modality}s and no {PIXELS[modality]}: give the {modality}s"
                )


def refuse_pixels(base: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Hook before the model inside a pruned one, which has no images to look at unless it is called by itself.

    Args:
        base: That model.
        args: What it is called with.
        named: The same by name.

    Raises:
        ValueError: For pixels.
    """
    if args:
        named = {**inspect.signature(base.forward).bind_partial(*args).arguments, **named}
    if any(named.get(pixels) is not None for pixels in PIXELS.values()):
        raise ValueError(
            f"a {type(base).__name__} inside a pruned model does not prune by itself: call the whole model, model(**inputs), "
            "with logits_to_keep=1 where no logits are asked for"
        )


def check_mask(mask: Any) -> None:
    """ValueError for a mask that is not [batch, length]."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        form = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(f"attention_mask must be [batch, length] where images are pruned, got {form}")


def mask_of(model: Any, named: Mapping[str, Any], generating: bool) -> Tensor:
    """The attention mask of the prompt; where none is given, as transformers infers it.

    Args:
        model: The model, dense or pruned.
        named: The inputs of the call.
        generating: Whether it is `generate`.

    Returns:
        [batch, length].
    """
    mask, ids = named.get("attention_mask"), named["input_ids"]
    if mask is not None:
        return mask
    config = model.generation_config
    pad, end = config.pad_token_id, config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    return (ids != pad).long() if generating and pad is not None and pad not in ends else torch.ones_like(ids)
