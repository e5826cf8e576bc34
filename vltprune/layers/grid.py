"""Grid: the row and the column of each patch in its image, as a column of the tokens that every later reduction keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import segments
from ..core.tokens import PackedTokens
from .algorithms.similarity import put_last

COLUMN = "grid"


def with_grid(tokens: PackedTokens, image: tuple[int, int] | None) -> PackedTokens:
    """Adds the grid of the tokens at a tower's input, in the column "grid": [total, 2] int64, row and column.

    Unprotected tokens are square patches in rows. Where they fill no grid of the image's proportions, or there is no image, the
    row of each is -1 and its column counts the unprotected tokens of its instance. Protected tokens have what comes last.
    Tokens whose host gave them a grid keep it.

    Args:
        tokens: the tokens before the first block.
        image: height and width of the images. None for towers of texts.

    Returns:
        The same tokens with the column.
    """
    if COLUMN in tokens.columns:
        return tokens
    layout = tokens.layout
    number = segments.unpad(segments.pad(tokens.free.long(), layout, 0).cumsum(1), layout) - 1
    number = number.clamp(min=0)
    if image is None:
        return tokens.with_column(COLUMN, torch.stack([torch.full_like(number, -1), number], 1))
    height, width = image
    patches = segments.count(tokens.free, layout)
    rows = (patches.double() * height / width).sqrt().round().long().clamp(min=1)
    columns = (patches // rows).clamp(min=1)
    is_grid = layout.spread(rows * columns == patches)
    columns = layout.spread(columns)
    row, column = torch.where(is_grid, number // columns, -1), torch.where(is_grid, number % columns, number)
    return tokens.with_column(COLUMN, torch.stack([row, column], 1))


def grid(tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    """The row and the column of each token.

    Args:
        tokens: any tokens.

    Returns:
        Row and column, [total] int64 each. Without a grid the row is -1 and the column the position in the sequence.
    """
    if COLUMN not in tokens.columns:
        return torch.full_like(tokens.position, -1), tokens.position
    row, column = tokens.columns[COLUMN].unbind(1)
    return row, column


def window_ids(tokens: PackedTokens, size: int) -> Tensor:
    """The window of each token: a square of the grid, or as many consecutive tokens where there is no grid.

    Args:
        tokens: any tokens.
        size: the rows and the columns of a window.

    Returns:
        The window, [total] int64, the same number for tokens of one window of an instance.
    """
    row, column = grid(tokens)
    # no image has so many columns of windows
    return torch.where(row < 0, column // size**2, row // size * 2**20 + column // size)


def first_of_window(tokens: PackedTokens, size: int) -> tuple[Tensor, Tensor]:
    """The first token, by position, of the window of each unprotected token.

    Args:
        tokens: the tokens of a block.
        size: rows and columns of a window, in patches.

    Returns:
        The unprotected tokens [batch, n] bool, and the slots [batch, n] int64; the own slot for other tokens.
    """
    layout = tokens.layout
    candidates, window = segments.pad(tokens.free, layout), segments.pad(window_ids(tokens, size), layout)
    position = segments.pad(tokens.position, layout)
    own = torch.arange(layout.longest, device=position.device).expand_as(position)
    together = (window[:, :, None] == window[:, None, :]) & candidates[:, None, :]
    first = put_last(position[:, None], together).argmin(2)
    return candidates, torch.where(candidates, first, own)
