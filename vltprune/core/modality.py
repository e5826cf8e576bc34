"""Modality of tokens: which tokens of a sequence that holds a text and an image are of which, as a column of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .tokens import PackedTokens

COLUMN = "modality"
RATER = "rater"  # the column that marks text tokens whose attention rates those of the image
Modality = Literal["text", "image"]
_NUMBERS = {modality: number for number, modality in enumerate(get_args(Modality))}


def with_modality(tokens: PackedTokens, is_image: Tensor) -> PackedTokens:
    """Adds the modality of the tokens, in the column "modality": [total] int64, 0 for text and 1 for image.

    Args:
        tokens: the tokens before the first block.
        is_image: [total] bool, true for the tokens of an image, its class token included.

    Returns:
        The same tokens with the column, which every later reduction keeps.
    """
    return tokens.with_column(COLUMN, is_image.long())


def is_of(tokens: PackedTokens, modality: Modality) -> Tensor:
    """Which tokens are of a modality.

    Args:
        tokens: tokens of a tower of both modalities.
        modality: "text" or "image".

    Returns:
        The mask, [total] bool.

    Raises:
        LookupError: for tokens of one modality, which have no such column.
    """
    if COLUMN not in tokens.columns:
        raise LookupError(
            f"these tokens are of one modality: they have no column {COLUMN!r} that tells {modality} apart"
        )
    return tokens.columns[COLUMN] == _NUMBERS[modality]


def rater_marks(tokens: PackedTokens) -> Tensor:
    """Which text tokens rate those of the image.

    Args:
        tokens: tokens of a tower of both modalities.

    Returns:
        The mask, [total] bool.

    Raises:
        LookupError: for tokens without marks.
    """
    if RATER not in tokens.columns:
        raise LookupError(
            f"these tokens have no column {RATER!r}, which marks raters: a tower whose parts read them adds it"
        )
    return tokens.columns[RATER]


def text_counts(column: Tensor | None, lengths: Sequence[int]) -> Tensor | float:
    """The number of text tokens of each instance.

    Args:
        column: the column "modality", [total] int64. None for tokens of one modality.
        lengths: tokens of each instance.

    Returns:
        The numbers, [batch] int64; 0 for tokens of one modality.
    """
    if column is None:
        return 0.0
    return torch.stack([(one == _NUMBERS["text"]).sum() for one in column.split(tuple(lengths))])
