"""Input checks of public functions: errors name the argument and say what to write instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_images(
    images: Tensor,
    channels: int | None,
    size: tuple[int, int] | None,
    name: str = "images",
    leading: Sequence[str] = ("batch",),
) -> None:
    """Checks a batch of images.

    Args:
        images: [batch, channels, height, width]; with further dimensions where `leading` names them.
        channels: the channels that a model takes. None for any.
        size: height and width in pixels that a model takes. None for any.
        name: the argument's name, for the error.
        leading: the names of the dimensions before the channels.

    Raises:
        ValueError: for another shape, for an empty batch, and for NaN or infinity.
    """
    wanted = f"[{', '.join(map(str, (*leading, channels or 'channels', *(size or ('height', 'width')))))}]"
    if (
        images.dim() != len(leading) + 3
        or (channels is not None and images.shape[-3] != channels)
        or (size and tuple(images.shape[-2:]) != size)
    ):
        raise ValueError(
            f"{name} must be {wanted}, got {list(images.shape)}: resize them, or build the model for that size"
        )
    if images.shape[0] == 0:
        raise ValueError(f"{name} is an empty batch: {list(images.shape)}; give at least one image")
    check_finite(images, name)


def check_finite(values: Tensor, name: str) -> None:
    """Checks that a batch holds no NaN and no infinity. What records a graph passes.

    Args:
        values: [batch, ...].
        name: the argument's name, for the error.

    Raises:
        ValueError: for NaN or infinity.
    """
    # one pass: a sum of finite numbers may overflow, but one with NaN or infinity is never finite
    if not is_recorded() and not values.sum().isfinite() and not values.isfinite().all():
        bad = int((~values.flatten(1).isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{name}[{bad}] holds NaN or infinity: check how it was loaded and normalized")


def check_ids(ids: Tensor, vocabulary: int, longest: int | None, name: str = "input_ids") -> None:
    """Checks a batch of token ids.

    Args:
        ids: [batch, length].
        vocabulary: the number of ids that a model knows.
        longest: the number of positions that a model has. None for any length.
        name: the argument's name, for the error.

    Raises:
        ValueError: for another shape, for an empty batch, for ids that are out of range, and for texts that are too long.
    """
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"{name} must be token ids [batch, length] and not empty, got {list(ids.shape)}")
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(
            f"{name} has {ids.shape[1]} tokens, the tower has {longest} positions: truncate when you tokenize"
        )
    if not is_recorded() and (ids.min() < 0 or ids.max() >= vocabulary):
        raise ValueError(f"{name} must hold token ids in 0 .. {vocabulary - 1}: use the model's own tokenizer")


def is_traced() -> bool:
    """Whether torch.jit.trace is recording, where Python integers become constants."""
    return torch.jit.is_tracing()


def is_recorded() -> bool:
    """Whether torch.jit.trace, torch.compile or torch.export records a graph, in which no decision can read a tensor."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def bound(number: int, most: int = 1024) -> int:
    """A number of rounds that a recorded graph can have: the number, or the least one that it cannot exceed.

    Args:
        number: a size or a count. While torch.export records a graph, it may depend on data.
        most: where to stop looking.

    Returns:
        It, as an integer. Where nothing bounds it, torch's own error is raised.
    """
    if isinstance(number, int):
        return number
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    known = next((one for one in range(most + 1) if statically_known_true(number <= one)), None)
    return int(number) if known is None else known
