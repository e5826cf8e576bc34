"""Several turns on one key-value cache: which tokens of the whole prompts it holds, and what a further call brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .prompt import PER_TOKEN, PromptIndex, ShortPrompt

_ATTRIBUTE = "pruned_prompt"


@dataclass(frozen=True)
class CachedPrompt:
    """What a cache remembers of the prompts that a pruned model read into it. What was generated behind them follows from it.

    Attributes:
        model: The key of the model; see `VlmComposite.key`.
        prompt: Which tokens of the whole prompts it holds.
        is_token: [batch, short] bool, false at padding of the short prompts.
        next_position: [batch] int64, the position of the first token behind each prompt.
    """

    model: str
    prompt: PromptIndex
    is_token: Tensor
    next_position: Tensor

    def repeated(self, batch: int) -> CachedPrompt:
        """The same for `batch` rows, a multiple of the prompts, which `generate` repeats one by one."""
        times = batch // len(self.is_token)
        if times == 1:
            return self
        index, is_token, following = (
            one.repeat_interleave(times, 0) for one in (self.prompt.index, self.is_token, self.next_position)
        )
        return replace(self, prompt=replace(self.prompt, index=index), is_token=is_token, next_position=following)


def remember(prompt: CachedPrompt | None, *holders: Any) -> None:
    """Let caches remember prompts.

    Args:
        prompt: What they remember. None to forget.
        *holders: Caches, and outputs of a model, which may have one. Others are left alone.
    """
    for holder in holders:
        parts = holder if isinstance(holder, tuple) else (getattr(holder, "cache", holder),)
        for cache in parts:
            if isinstance(cache, Cache):
                setattr(cache, _ATTRIBUTE, prompt)


def recall(cache: Cache, model: str, rows: int, repeats: int) -> CachedPrompt:
    """What a filled cache remembers.

    Args:
        cache: The cache.
        model: The key of the model that reads it.
        rows: Rows of the call.
        repeats: How many times `generate` repeats each of them.

    Returns:
        The prompts of these rows.

    Raises:
        ValueError: For a cache that this model has not filled, and for rows that do not fit it.
    """
    found: CachedPrompt | None = getattr(cache, _ATTRIBUTE, None)
    past = int(cache.get_seq_length())
    if found is None or found.model != model:
        raise ValueError(
            f"the cache holds {past} tokens that another model or a search with beams put there, and this model must know "
            "which tokens of the prompts they are: begin with an empty cache, transformers.DynamicCache()"
        )
    keys = next((one for one in (getattr(layer, "keys", None) for layer in cache.layers) if one is not None), None)
    held = len(found.is_token) if keys is None else keys.shape[0]
    if held != rows * repeats or rows % len(found.is_token):
        raise ValueError(
            f"the cache holds {held} rows of {len(found.is_token)} prompts, and this call has {rows * repeats}: give one "
            "row for each, with num_beams and num_return_sequences left out, or repeat its rows first, "
            "cache.batch_repeat_interleave(...)"
        )
    if past < found.prompt.index.shape[1] and not found.prompt.is_whole:
        raise ValueError(
            f"the cache was cropped to {past} tokens, fewer than the {found.prompt.index.shape[1]} of its prompt: begin "
            "with an empty cache, transformers.DynamicCache()"
        )
    return found.repeated(rows)


@dataclass(frozen=True)
class Turn:
    """A call on a filled cache: what it holds, and the tokens that are new.

    Attributes:
        held: [batch, past] int64, where the tokens of the cache stand in the whole prompts.
        is_token: [batch, past] bool, false at padding of the short prompts.
        start: [batch] int64, the position of the first new token.
        mask: [batch, length] of the whole prompts.
        new: How many tokens each row brings.
        inputs: All inputs, those of one value per token of the new tokens; without the cache.
        given: The same of the whole prompts.
        is_whole: Whether the caller gives the tokens of the whole prompts.
    """

    held: Tensor
    is_token: Tensor
    start: Tensor
    mask: Tensor
    new: int
    inputs: dict[str, Any]
    given: dict[str, Any]
    is_whole: bool

    @property
    def begin(self) -> int:
        """Where the new tokens begin in the whole prompts."""
        return self.mask.shape[1] - self.new

    @classmethod
    def from_call(
        cls, found: CachedPrompt, past: int, named: Mapping[str, Any], mask: Tensor | None, generating: bool
    ) -> Turn:
        """Split a call.

        Args:
            found: What the cache remembers.
            past: How many tokens each row of it has.
            named: All inputs of the call.
            mask: The attention mask of the call; None for none.
            generating: Whether `generate` is called, which takes the tokens of whole prompts, or new ones with a longer mask.

        Returns:
            The turn.

        Raises:
            ValueError: For a call without new tokens, and for masks of another length.
        """
        tokens = named["input_ids"] if "input_ids" in named else named["inputs_embeds"]
        batch, length = tokens.shape[:2]
        known = past + found.prompt.length - found.prompt.index.shape[1]
        is_whole = generating and (mask is None or mask.shape[1] == length)
        new = length - known if is_whole else length
        if mask is None:
            mask = torch.ones(batch, known + new, dtype=torch.int64, device=tokens.device)
        if new < 1 or mask.shape[1] < known + new:
            raise ValueError(
                f"the cache holds the first {known} tokens of the conversation, and the call gives {length} tokens with an "
                f"attention_mask of {mask.shape[1]}: give the whole conversation, or its new tokens with the mask of all"
            )
        held = found.prompt.until(batch, past)
        behind = torch.ones(batch, past, dtype=torch.bool, device=held.device)[:, found.is_token.shape[1] :]
        is_token = torch.cat([found.is_token, behind], 1)[:, :past]
        start = found.next_position + (past - found.prompt.index.shape[1])
        given = {name: value for name, value in named.items() if name != "cache"} | {"attention_mask": mask}
        inputs = given | {name: given[name][:, -new:] for name in PER_TOKEN if name in given}
        return cls(held, is_token, start, mask, new, inputs, given, is_whole)

    def counts(self) -> tuple[list[int], list[int]]:
        """How many tokens of each prompt the cache holds, and how many it would with those that are gone."""
        seen = self.mask.gather(1, self.held) != 0
        return (seen & self.is_token).sum(1).tolist(), (self.mask[:, : self.begin] != 0).sum(1).tolist()

    def is_new(self, places: Tensor) -> Tensor:
        """Which placeholders are new.

        Args:
            places: [batch, length] bool, the placeholders of the whole prompts.

        Returns:
            [placeholders] bool.
        """
        column = torch.arange(places.shape[1], device=places.device)
        return (column >= places.shape[1] - self.new).expand(places.shape)[places]

    def joined(self, short: Mapping[str, Any], pad_id: int, placeholders: Sequence[int]) -> dict[str, Any]:
        """Put the tokens of the cache before the new ones, where `generate` of the dense model takes both.

        Args:
            short: The shortened inputs of the new tokens.
            pad_id: The id of padding.
            placeholders: The ids of placeholders. None stays before the new ones: transformers counts them by image.

        Returns:
            The inputs of the dense model, without the cache.
        """
        out, fills = dict(short), {**PER_TOKEN, "input_ids": pad_id}
        for name in PER_TOKEN:
            if name in short and (self.is_whole or name == "attention_mask"):
                before = self.given[name].gather(1, self.held).masked_fill(~self.is_token, fills[name])
                for one in placeholders if name == "input_ids" else ():
                    before = before.masked_fill(before == one, pad_id)
                out[name] = torch.cat([before, short[name]], 1)
        return out


def memory_of(model: str, prompt: ShortPrompt, positions: Tensor, turn: Turn | None = None) -> CachedPrompt:
    """What a cache remembers once a short prompt is read.

    Args:
        model: The key of the model.
        prompt: The short prompt.
        positions: Of the tokens of the prompt before it was shortened, [batch, length] or [axes, batch, length], from 0 on.
        turn: The turn that the prompt is the new tokens of. None for an empty cache.

    Returns:
        What it remembers of all turns.
    """
    index, is_token, length = prompt.index, prompt.valid, positions.shape[-1]
    if turn is not None:
        index, is_token = torch.cat([turn.held, turn.begin + index], 1), torch.cat([turn.is_token, is_token], 1)
        length += turn.begin
    if positions.dim() == 3:
        # the first of four are of the text alone, for masks
        positions = positions[-3:].amax(0)
    return CachedPrompt(model, PromptIndex(index, length), is_token, positions.amax(-1) + 1)
