"""Prompts of vision-language models: which of their tokens stay, and the inputs that are one value per token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# inputs of one value per token, [batch, length], with what they hold at padding; the id of padding is the tokenizer's
PER_TOKEN = {"input_ids": 0, "attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
TYPES = {"token_type_ids", "mm_token_type_ids"}


@dataclass(frozen=True)
class PromptIndex:
    """Where the tokens of short prompts stand in the whole ones.

    Attributes:
        index: [batch, short] int64, the index of each token in the prompt before it was shortened; any index at padding.
        length: Tokens of a whole prompt, padding included.
    """

    index: Tensor
    length: int

    @property
    def is_whole(self) -> bool:
        """Whether no token is gone."""
        if self.index.shape[1] != self.length:
            return False
        return bool((self.index == torch.arange(self.length, device=self.index.device)).all())

    def whole_length(self, total: int) -> int:
        """How long `total` tokens, the short prompt and those behind it, are with the tokens that are gone."""
        return self.length + max(total - self.index.shape[1], 0)

    def until(self, batch: int, total: int) -> Tensor:
        """The index of the first tokens, the short prompt and those behind it.

        Args:
            batch: The number of rows: a multiple of the prompts, where beams repeat these.
            total: How many tokens of each row.

        Returns:
            [batch, total] int64.
        """
        index = self.index.repeat_interleave(batch // len(self.index), 0)
        behind = torch.arange(self.length, self.whole_length(total), device=index.device)
        return torch.cat([index, behind.expand(batch, -1)], 1)[:, :total]


@dataclass(frozen=True)
class VisualTokens:
    """Which tokens of the prompt that a language model reads are visual.

    Attributes:
        is_visual: [batch, length] bool; false for rows that end a line of an image.
        keep_prob: [batch, length], the probability that each token stays, in soft training; 1 of text. None for 1.
        counted_prob: [batch, length], the same with the gradients of the cost. None where `keep_prob` is.
        grid: [2, batch, length] int64, row and column of visual tokens, the images of a prompt below each other. None where
            they are no grid.
        last: [batch, length] bool, where there are labels: the last text token before the answer, one of each prompt. None
            without labels.
        source: [batch, length] int64, which token of the image tower each is, -1 for none. None where visual tokens are in the
            tower's order.
    """

    is_visual: Tensor
    keep_prob: Tensor | None = None
    counted_prob: Tensor | None = None
    grid: Tensor | None = None
    last: Tensor | None = None
    source: Tensor | None = None

    @property
    def expected(self) -> Tensor | None:
        """The expected number of visual tokens of all prompts, with the cost's gradients; None outside of soft training."""
        return None if self.counted_prob is None else self.counted_prob[self.is_visual].sum()


_current: ContextVar[VisualTokens | None] = ContextVar("visual_tokens", default=None)


def current_visual_tokens() -> VisualTokens | None:
    """The visual tokens of the prompt that a pruned model reads in this thread; None outside of such a call."""
    return _current.get()


@contextmanager
def visual_tokens(visual: VisualTokens | None) -> Iterator[None]:
    """Give the visual tokens of a prompt to the language model that is called within the `with` block."""
    token = _current.set(visual)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class ShortPrompt:
    """The tokens of each prompt that stay, padded to the longest.

    Attributes:
        index: [batch, short] int64, the place of each token in the prompt; any place at padding.
        valid: [batch, short] bool, false at padding.
    """

    index: Tensor
    valid: Tensor

    @classmethod
    def from_mask(cls, stays: Tensor, pads_right: bool = False, extra: int = 0, in_place: bool = False) -> ShortPrompt:
        """Take the tokens where a mask is true.

        Args:
            stays: [batch, length] bool.
            pads_right: Whether padding is behind the tokens, not before them.
            extra: How many places of padding more than needed there are.
            in_place: Whether padding stands where tokens are gone, so that none get further apart. Else it is at one end.

        Returns:
            The short prompts.
        """
        short = min(int(stays.sum(1).amax()) + extra, stays.shape[1])
        key = (~stays if pads_right else stays).int()
        index = key.argsort(dim=1, stable=True)
        index = index[:, :short] if pads_right else index[:, stays.shape[1] - short :]
        index = index.sort(1).values if in_place else index
        return cls(index, stays.gather(1, index))

    def gather(self, values: Tensor, fill: float = 0) -> Tensor:
        """Gather values per token.

        Args:
            values: [..., batch, length].
            fill: The value at padding.

        Returns:
            [..., batch, short].
        """
        index = self.index.expand(*values.shape[:-2], *self.index.shape)
        return values.gather(-1, index).masked_fill(~self.valid, fill)

    def inputs(self, given: Mapping[str, Any], pad_id: int) -> dict[str, Any]:
        """Gather all inputs that are one value per token.

        Args:
            given: Inputs of the model by name.
            pad_id: The id of padding.

        Returns:
            All inputs, those short.
        """
        fills = {**PER_TOKEN, "input_ids": pad_id}
        short = {name: self.gather(given[name], fill) for name, fill in fills.items() if given.get(name) is not None}
        for name in TYPES & short.keys():
            # padding within an image would part it in two
            short[name] = given[name].gather(1, self.index)
        if "labels" in short:
            # padding must not be asked for the first token of a prompt
            short["labels"] = short["labels"].masked_fill(self.valid & (self.valid.cumsum(-1) == 1), -100)
        return {**given, **short}


def text_positions(attention_mask: Tensor, counts_padding: bool) -> Tensor:
    """The positions that transformers gives the tokens of a prompt.

    Args:
        attention_mask: [batch, length].
        counts_padding: Whether padding has positions too, as in `forward`; in `generate` it has none.

    Returns:
        [batch, length] int64.
    """
    if counts_padding:
        return torch.arange(attention_mask.shape[1], device=attention_mask.device).expand(attention_mask.shape)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_before_answer(labels: Tensor, is_text: Tensor) -> Tensor:
    """The last text token before the first label of each prompt; its last one where none is before it.

    Args:
        labels: [batch, length] int64, -100 for tokens without a label.
        is_text: [batch, length] bool, false for visual tokens and padding.

    Returns:
        [batch, length] bool, one true in each row.
    """
    place = torch.arange(labels.shape[1], device=labels.device)
    first = torch.where(labels != -100, place, labels.shape[1]).amin(1, keepdim=True)
    text = torch.where(is_text, place, -1)
    before = text.masked_fill(place >= first, -1).amax(1, keepdim=True)
    return place == torch.where(before < 0, text.amax(1, keepdim=True), before)
