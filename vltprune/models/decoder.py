"""BLIP's text decoder: the causal MED text tower, and a head for the next token.

One function decodes, for training and for generation alike: new tokens, and a `Cache` of what came before them. The
architecture is the image-grounded text decoder of Li et al., BLIP, arXiv 2201.12086, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import segments
from ..core.tokens import PackedTokens
from .generation import Rules, Strategy
from .med import EPS, MedEncoder, initialize

KeysValues = tuple[Tensor, Tensor]  # each [rows, heads, tokens, head_dim]


@dataclass(frozen=True)
class Cache:
    """What a decoder has read: keys and values of the memory, and of the tokens so far, layer by layer.

    memory  [groups, heads, m, head_dim] each; consecutive rows of tokens, equally many a group, are about one group
    seen    [groups, 1, 1, m] bool, where the memory is real; or what is added to the logits; or None: it is real everywhere
    own     [rows, heads, n, head_dim] each; empty before the first token
    """

    memory: tuple[KeysValues, ...]
    seen: Tensor | None
    own: tuple[KeysValues, ...] = ()

    @property
    def groups(self) -> int:
        return len(self.memory[0][0])

    @property
    def length(self) -> int:
        """How many tokens of each row have been decoded."""
        return self.own[0][0].shape[2] if self.own else 0

    def about(self, group: Tensor) -> Cache:
        """The memory dealt out anew: group [new groups] int64 says which of the old ones each is."""
        seen = None if self.seen is None else self.seen[group]
        return replace(self, memory=_rows(self.memory, group), seen=seen)

    def reorder(self, rows: Tensor) -> Cache:
        """Row i continues what row rows[i] began: rows [rows] int64, each of its own group."""
        return replace(self, own=_rows(self.own, rows))


class MedDecoder(nn.Module):
    """Token ids and a memory to the logits of each next token. The output weights are the word embedding's.

    body: the layers, with cross-attention to one memory: image tokens, or the states of a question. It is never pruned: it
    looks at what a pruned tower left.
    """

    def __init__(self, body: MedEncoder):
        super().__init__()
        vocab_size, width = body.vocab_size, body.width
        self.body = body
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        initialize(self.transform)

    def read(self, memory: Tensor | PackedTokens, mask: Tensor | None = None) -> Cache:
        """The memory, ready to be looked at, before the first token.

        memory [groups, m, memory_width], and mask [groups, m], nonzero where it is real (None: everywhere); or packed
        tokens, which know themselves where they end.
        """
        seen = None if mask is None else mask.bool()[:, None, None]
        if isinstance(memory, PackedTokens):
            seen = _seen(memory)
            memory = memory.unpack()[0]
        layers: Any = self.body.layers
        return Cache(tuple(layer.cross.streams[0].keys_values(memory) for layer in layers), seen)

    def forward(self, input_ids: Tensor, cache: Cache, attention_mask: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Logits of each next token, [rows, n, vocab_size], and the cache with these tokens in it.

        input_ids [rows, n], which follow the cache's; attention_mask [rows, n], nonzero where a token is real. Raises
        ValueError for sentences past `max_positions`, for rows that do not fit the memory, for padding on the left.
        """
        self.body.check_memory(len(input_ids), cache.groups)
        x = self.body.embed(input_ids, cache.length)
        mask = _backwards(x, cache.length, attention_mask)
        own = []
        for depth, layer in enumerate(self.body.layers):
            before = cache.own[depth] if cache.own else None
            x, kept = _decode(layer, x, before, mask, cache.memory[depth], cache.seen)
            own.append(kept)

        hidden = self.norm(F.gelu(self.transform(x)))
        return F.linear(hidden, self.body.word.weight, self.bias), replace(cache, own=tuple(own))

    @torch.no_grad()
    def generate(self, prompt: Tensor, cache: Cache, strategy: Strategy, rules: Rules) -> Tensor:
        """Sentences [rows, n] that continue prompt [rows, prompt length], end token and padding included.

        ValueError where the rules allow sentences past `max_positions`, or leave no room behind the prompt.
        """
        longest = self.body.max_positions
        if rules.max_length > longest:
            raise ValueError(f"max_length={rules.max_length} is past the decoder's max_positions={longest}: lower it")

        def step(ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
            logits, cache = self(ids, cache)
            return logits[:, -1], cache

        return strategy(step, cache, prompt, rules)


def next_token_costs(
    logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, given: int = 1, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each sentence, summed over its tokens, [rows]; and how many tokens that were, [rows].

    logits [rows, n, vocab_size] are the decoder's for the same input_ids [rows, n]; attention_mask [rows, n]. The first
    `given` tokens (the start token, a prompt) and padding are not asked for. smoothing: of the labels.
    """
    asked = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    asked = asked & (torch.arange(input_ids.shape[1], device=input_ids.device) >= given)
    targets = input_ids.masked_fill(~asked, -100)[:, 1:]
    flat = logits[:, :-1].flatten(0, 1)  # classes last, which is also how they lie in memory
    costs = F.cross_entropy(flat, targets.flatten(), reduction="none", label_smoothing=smoothing)
    return costs.view_as(targets).sum(1), asked[:, 1:].sum(1)


def _seen(memory: PackedTokens) -> Tensor | None:
    """How a decoder sees packed tokens, as `Cache.seen`: those that are there in part, in part."""
    if memory.bias is not None:
        bias = segments.pad(memory.bias, memory.layout, float("-inf"))
        return bias[:, None, None]
    real = memory.unpack()[1]
    return None if real is None else real[:, None, None]


def _decode(
    layer: Any, x: Tensor, before: KeysValues | None, mask: Tensor, memory: KeysValues, seen: Tensor | None
) -> tuple[Tensor, KeysValues]:
    """One layer on new tokens x [rows, n, width]. Returns them, and the keys and values of all tokens so far."""
    keys, values = layer.attention.keys_values(x)
    if before is not None:
        keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
    x = layer.attention_norm(x + layer.dropout(layer.attention.look(x, keys, values, mask)))

    (stream,) = layer.cross.streams
    together = x.reshape(len(memory[0]), -1, x.shape[-1])  # the rows about one group share its keys and values
    looked = stream.look(together, *memory, seen).reshape(x.shape)
    x = layer.cross.norm(x + layer.dropout(looked))
    return layer.feed_forward(x), (keys, values)


def _backwards(x: Tensor, past: int, attention_mask: Tensor | None) -> Tensor:
    """Whom each new token sees: [rows or 1, 1, n, past + n] bool, true for what is real and not behind it."""
    n = x.shape[1]
    mask = torch.ones(n, past + n, dtype=torch.bool, device=x.device).tril(past)[None, None]
    if attention_mask is None:
        return mask
    real = attention_mask.bool()
    if not real[:, 0].all():
        raise ValueError("attention_mask hides the first token of a sentence, which all others see: pad on the right")
    return mask & F.pad(real, (past, 0), value=True)[:, None, None]


def _rows(layers: tuple[KeysValues, ...], rows: Tensor) -> tuple[KeysValues, ...]:
    return tuple((keys[rows], values[rows]) for keys, values in layers)
