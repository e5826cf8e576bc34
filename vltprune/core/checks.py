"""Input checks of public functions: they raise early, name the argument, and say what to write instead."""

from __future__ import annotations

import torch
from torch import Tensor


def check_images(images: Tensor, channels: int | None, size: tuple[int, int] | None, name: str = "images") -> None:
    """ValueError unless images is [batch >= 1, channels, *size] and finite; `channels` or `size` None: any."""
    wanted = f"[batch, {channels or 'channels'}, {', '.join(map(str, size or ('height', 'width')))}]"
    if (
        images.dim() != 4
        or (channels is not None and images.shape[1] != channels)
        or (size and tuple(images.shape[2:]) != size)
    ):
        raise ValueError(
            f"{name} must be {wanted}, got {list(images.shape)}: resize them, or build the model for that size"
        )
    if len(images) == 0:
        raise ValueError(f"{name} is an empty batch: {list(images.shape)}; give at least one image")
    if not images.isfinite().all():
        bad = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{name}[{bad}] holds NaN or infinity: check how it was loaded and normalized")


def check_ids(ids: Tensor, vocabulary: int, longest: int | None, name: str = "input_ids") -> None:
    """ValueError unless ids is [batch >= 1, length >= 1], in 0 .. vocabulary - 1, and no longer than `longest`; None: any."""
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"{name} must be token ids [batch, length] and not empty, got {list(ids.shape)}")
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(
            f"{name} has {ids.shape[1]} tokens, the tower has {longest} positions: truncate when you tokenize"
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"{name} must hold token ids in 0 .. {vocabulary - 1}")


def is_traced() -> bool:
    """Whether torch.jit.trace, or an export that is built on it, records what runs: host integers become constants then."""
    return torch.jit.is_tracing()
