"""resized: a copy of a vision tower that shrinks its images, so that fewer patches enter. It is a baseline of pruning."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def resized(model: M, ratio: float) -> M:
    """Copies a vision tower of timm for smaller images, and makes it shrink those that it gets.

    The sides of the patch grid are sqrt(ratio) times as long, rounded, and at least 1: a quarter halves both. Images are
    resized before the patch embedding (bicubic, antialiased), and position embeddings as timm does it. The copy takes images of
    any size. It has weights of its own. `prune` takes it as any tower.

    Args:
        model: a VisionTransformer or Eva of timm.
        ratio: the part of the patches that enters, in (0, 1].

    Returns:
        The copy, in the same mode.

    Raises:
        TypeError: for a model that cannot be set to another image size.
        ValueError: for a ratio outside its range.
    """
    if not hasattr(model, "set_input_size") or not hasattr(model, "patch_embed"):
        raise TypeError(
            f"a {type(model).__name__} has no set_input_size: resized takes towers of timm, such as "
            "timm.create_model('vit_small_patch14_dinov2'); for others use the preset 'pooling'"
        )
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} must lie in (0, 1]: the part of the patches that enters")
    small: Any = copy.deepcopy(model)
    embed = small.patch_embed
    size = tuple(max(1, round(n * ratio**0.5)) * p for n, p in zip(embed.grid_size, embed.patch_size, strict=True))
    small.set_input_size(img_size=size)
    # it gets images of their own size, and the hook shrinks them
    embed.strict_img_size = False
    embed.register_forward_pre_hook(_Shrink(size))
    return small


class _Shrink:
    """A hook that resizes images [batch, channels, H, W] before the patch embedding."""

    def __init__(self, size: tuple[int, ...]):
        self.size = size

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        images, *others = inputs
        if tuple(images.shape[-2:]) == self.size:
            return None
        # single precision: not every device resizes half
        small = F.interpolate(images.float(), self.size, mode="bicubic", align_corners=False, antialias=True)
        return (small.to(images.dtype), *others)
