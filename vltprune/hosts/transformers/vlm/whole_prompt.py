"""The whole prompt around a model that reads a short one: logits of its length, and what `generate` hands out in between."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import slice_logits_to_keep

from .prompt import PromptIndex


@dataclass(frozen=True)
class WholeLogits:
    """Where logits of short prompts stand in the whole ones: at each token those of the last one that is left up to it.

    Attributes:
        row: int64, for each of the logits asked for its row in those computed, [batch * number]; -1 where none is left. Its
            shape is that of what the dense model returns, without the vocabulary.
        number: How many of the last tokens of each short prompt they are computed of.
    """

    row: Tensor
    number: int

    @classmethod
    def from_prompt(
        cls, prompt: PromptIndex, is_token: Tensor, length: int, logits_to_keep: int | Tensor
    ) -> WholeLogits | None:
        """Find the rows of a call.

        Args:
            prompt: Where the tokens of the short prompts stand in the whole ones, those of a cache too.
            is_token: [batch, short] bool, false at padding of the tokens in this call.
            length: Tokens of each row that the call was given.
            logits_to_keep: As in the dense model, of the whole prompts.

        Returns:
            The rows; None where nothing is gone.
        """
        batch, short = is_token.shape
        device = is_token.device
        place = prompt.index[:, -short:] - (prompt.length - length)
        slots = torch.arange(short, device=device).expand(batch, -1)
        if short == length and torch.equal(place, slots) and bool(is_token.all()):
            return None
        # one place more is for padding
        left = torch.full((batch, length + 1), -1, device=device)
        left = left.scatter(1, place.masked_fill(~is_token, length), slots)[:, :length].cummax(1).values
        owner = torch.arange(batch, device=device)[:, None].expand_as(left)
        slot, owner = slice_logits_to_keep(torch.stack([left, owner], -1), logits_to_keep).unbind(-1)
        number = short - int(slot.clamp(min=0).amin()) if slot.numel() else short
        return cls(torch.where(slot < 0, -1, owner * number + slot - (short - number)), number)

    def expand(self, logits: Tensor) -> Tensor:
        """Give each token its logits.

        Args:
            logits: [batch, number, vocabulary].

        Returns:
            [*row.shape, vocabulary]; 0 where no token is left.
        """
        row = self.row.to(logits.device)
        out = logits.flatten(0, 1).index_select(0, row.clamp(min=0).flatten()).unflatten(0, row.shape)
        # in place: this is as large as all logits of the dense model
        return out.masked_fill_((row < 0)[..., None], 0.0)


@dataclass(frozen=True)
class WholePrompt:
    """The prompts that `generate` was given, in place of the short ones that the model reads.

    Attributes:
        ids: [batch, length] int64.
        short: Tokens of each short prompt.
        is_real: [batch, length] bool, false at padding.
    """

    ids: Tensor
    short: int
    is_real: Tensor

    @classmethod
    def from_short(cls, ids: Tensor, short: int, prompt: PromptIndex, is_token: Tensor) -> WholePrompt:
        """Take the prompts as they were given.

        Args:
            ids: [batch, length] int64, the prompts, or their last tokens where a cache holds the others.
            short: Tokens of each short prompt that the dense model's `generate` is given.
            prompt: Where the tokens of the short prompts stand in the whole ones, those of a cache too.
            is_token: [batch, all of these] bool, false at padding.

        Returns:
            The whole prompts.
        """
        # `generate` pads at the left
        first = prompt.index.gather(1, is_token.int().argmax(1, keepdim=True)) - (prompt.length - ids.shape[1])
        return cls(ids, short, torch.arange(ids.shape[1], device=first.device) >= first)

    @property
    def gone(self) -> int:
        """How many tokens longer the whole prompts are."""
        return self.ids.shape[1] - self.short

    def extend(self, ids: Tensor) -> Tensor:
        """Put the whole prompts in place of the short ones.

        Args:
            ids: [rows, short + new] int64, the short prompts and new tokens; beams are rows of their own.

        Returns:
            [rows, length + new] int64.
        """
        whole = self.ids.repeat_interleave(len(ids) // len(self.ids), 0).to(ids.device)
        return torch.cat([whole, ids[:, self.short :]], 1)

    def lengthened(self, generation_config: Any) -> Any:
        """A configuration whose lengths are of whole prompts and new tokens."""
        out = copy.copy(generation_config)
        for name in ("max_length", "min_length"):
            if getattr(out, name, None):
                setattr(out, name, getattr(out, name) + self.gone)
        return out


class _Processors(LogitsProcessorList):
    """Logits processors that see the whole prompts."""

    def __init__(self, processors: LogitsProcessorList, whole: WholePrompt):
        super().__init__(processors)
        self.whole = whole

    def __call__(self, input_ids: Any, scores: Any, **named: Any) -> Any:
        whole: Any = self.whole.extend(input_ids)
        return super().__call__(whole, scores, **named)


class _Criteria(StoppingCriteriaList):
    """Stopping criteria that see the whole prompts."""

    def __init__(self, criteria: StoppingCriteriaList, whole: WholePrompt):
        super().__init__(criteria)
        self.whole = whole

    def __call__(self, input_ids: Any, scores: Any, **named: Any) -> Any:
        whole: Any = self.whole.extend(input_ids)
        return super().__call__(whole, scores, **named)

    @property
    def max_length(self) -> int | None:
        """The limit as `generate` counts, with short prompts."""
        whole = super().max_length
        return None if whole is None else whole - self.whole.gone


class WholeStreamer(BaseStreamer):
    """Hands what `generate` streams to a streamer, with the whole prompt first.

    Args:
        streamer: What gets it.
        whole: The whole prompt.
    """

    def __init__(self, streamer: Any, whole: WholePrompt):
        self.streamer = streamer
        self.whole = whole
        self.is_first = True

    def put(self, value: Tensor) -> None:
        self.streamer.put(self.whole.extend(value) if self.is_first else value)
        self.is_first = False

    def end(self) -> None:
        self.streamer.end()


_current: ContextVar[WholePrompt | None] = ContextVar("whole_prompt", default=None)


@contextmanager
def whole_prompt(whole: WholePrompt | None) -> Iterator[None]:
    """Give whole prompts to the models of `with_whole_prompts` that generate within the `with` block."""
    token = _current.set(whole)
    try:
        yield
    finally:
        _current.reset(token)


class _SeesWholePrompts:
    """What a model's class puts before transformers' own making of processors and criteria."""

    def _get_logits_processor(
        self, generation_config: Any, input_ids_seq_length: Any = None, encoder_input_ids: Any = None, **named: Any
    ) -> Any:
        make, whole = super()._get_logits_processor, _current.get()  # pyrefly: ignore
        if whole is None:
            return make(generation_config, input_ids_seq_length, encoder_input_ids, **named)
        repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        mask = whole.is_real.long().repeat_interleave(repeats, 0)
        named["model_kwargs"] = {**(named.get("model_kwargs") or {}), "attention_mask": mask}
        made = make(whole.lengthened(generation_config), whole.ids.shape[1], whole.ids, **named)
        return _Processors(made, whole)

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **named: Any) -> Any:
        make, whole = super()._get_stopping_criteria, _current.get()  # pyrefly: ignore
        if whole is None:
            return make(generation_config, *args, **named)
        return _Criteria(make(whole.lengthened(generation_config), *args, **named), whole)


@functools.cache
def _whole_class(dense: type[nn.Module]) -> type[nn.Module]:
    return type(dense.__name__, (_SeesWholePrompts, dense), {"__module__": dense.__module__})


def with_whole_prompts(model: nn.Module) -> Any:
    """The same model, whose `generate` hands whole prompts to processors and criteria, its own and those given.

    Args:
        model: The model as its dense class. The result shares all that it has.

    Returns:
        The model; `whole_prompt` says which prompts.
    """
    cls = _whole_class(type(model))
    view = cls.__new__(cls)
    view.__dict__ = model.__dict__
    return view
