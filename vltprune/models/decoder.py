"""BLIP's text decoder: the causal MED text tower with a language-modeling head.

One function decodes, in training and in generation alike: it takes new tokens and a `DecoderCache` of what came before them.
The architecture is the image-grounded text decoder of Li et al., BLIP, arXiv 2201.12086, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..core import segments
from ..core.tokens import PackedTokens
from .generation import DecodingStrategy, GenerationConfig
from .med import EPS, MedEncoder, MedLayer, initialize

KeysValues = tuple[Tensor, Tensor]  # each [rows, heads, tokens, head_dim]


@dataclass(frozen=True)
class DecoderCache:
    """Keys and values of a decoder, layer by layer: of the memory that it cross-attends to, and of its tokens so far.

    Consecutive rows of tokens, equally many a group, attend to one group of the memory.

    Args:
        memory: Keys and values of the memory, each [groups, heads, m, head_dim].
        memory_mask: Bool [groups, 1, 1, m], true where the memory is real; or float, added to the attention logits; None if
            all of it is real.
        past: Keys and values of the tokens so far, each [rows, heads, n, head_dim]; empty before the first token.
    """

    memory: tuple[KeysValues, ...]
    memory_mask: Tensor | None
    past: tuple[KeysValues, ...] = ()

    @property
    def groups(self) -> int:
        """How many groups the memory has."""
        return len(self.memory[0][0])

    @property
    def length(self) -> int:
        """How many tokens of each row have been decoded."""
        return self.past[0][0].shape[2] if self.past else 0

    def select_groups(self, groups: Tensor) -> DecoderCache:
        """The cache with the groups [new groups] int64 of the memory, in that order."""
        memory_mask = None if self.memory_mask is None else self.memory_mask[groups]
        return replace(self, memory=_select(self.memory, groups), memory_mask=memory_mask)

    def reorder(self, rows: Tensor) -> DecoderCache:
        """The cache whose row i continues what row rows[i] began: rows [rows] int64, each of its own group."""
        return replace(self, past=_select(self.past, rows))


class MedDecoder(nn.Module):
    """A causal text decoder that cross-attends to a memory. Its output weights are the word embedding's.

    It is never pruned: it attends to what a pruned tower keeps.

    Args:
        body: The layers, with cross-attention to one memory: image tokens, or the hidden states of a question.
    """

    def __init__(self, body: MedEncoder):
        super().__init__()
        vocab_size, width = body.vocab_size, body.width
        self.body = body
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        initialize(self.transform)

    def start(self, memory: Tensor | PackedTokens, mask: Tensor | None = None) -> DecoderCache:
        """Compute keys and values of the memory.

        Args:
            memory: Image tokens or hidden states [groups, m, memory_width], or packed ones.
            mask: [groups, m], nonzero where the memory is real; None for everywhere. Packed tokens need none.

        Returns:
            The cache before the first token.
        """
        memory_mask = None if mask is None else rearrange(mask.bool(), "groups m -> groups 1 1 m")
        if isinstance(memory, PackedTokens):
            memory_mask = _packed_mask(memory)
            memory = memory.unpack()[0]
        return DecoderCache(tuple(_cross_keys_values(layer, memory) for layer in self.body.layers), memory_mask)

    def forward(
        self, input_ids: Tensor, cache: DecoderCache, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, DecoderCache]:
        """Decode new tokens.

        Args:
            input_ids: New tokens [rows, n], which follow the cache's.
            cache: What came before them.
            attention_mask: [rows, n], nonzero where a token is real; None for everywhere.

        Returns:
            Logits of each next token [rows, n, vocab_size], and the cache with the new tokens in it.

        Raises:
            ValueError: For sentences past `max_positions`, rows that do not fit the memory, or padding on the left.
        """
        self.body.check_memory(len(input_ids), cache.groups)
        x = self.body.embed(input_ids, cache.length)
        mask = _causal_mask(x, cache.length, attention_mask)
        past = []
        for depth, layer in enumerate(self.body.layers):
            before = cache.past[depth] if cache.past else None
            x, keys_values = _decode_layer(layer, x, before, mask, cache.memory[depth], cache.memory_mask)
            past.append(keys_values)

        hidden = self.norm(F.gelu(self.transform(x)))
        return F.linear(hidden, self.body.word.weight, self.bias), replace(cache, past=tuple(past))

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, cache: DecoderCache, strategy: DecodingStrategy, config: GenerationConfig
    ) -> Tensor:
        """Generate sentences that continue a prompt.

        Args:
            prompt: Token ids [rows, prompt length].
            cache: The memory, from `start`.
            strategy: `GreedySearch()`, `BeamSearch(num_beams)` or `NucleusSampling(top_p)`.
            config: Limits of the sentences.

        Returns:
            Token ids [rows, n], prompt and end token included, padded behind the end.

        Raises:
            ValueError: If `max_length` is past `max_positions`, or the prompt fills it.
            FloatingPointError: For logits that are NaN or infinite.
        """
        longest = self.body.max_positions
        if config.max_length > longest:
            raise ValueError(f"max_length={config.max_length} is past the decoder's max_positions={longest}: lower it")

        def step(ids: Tensor, cache: DecoderCache) -> tuple[Tensor, DecoderCache]:
            logits, cache = self(ids, cache)
            return logits[:, -1], cache

        return strategy(step, cache, prompt, config)


def next_token_losses(
    logits: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_length: int = 1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each sentence under a decoder's logits.

    Args:
        logits: The decoder's, [rows, n, vocab_size], for the same `input_ids`.
        input_ids: Token ids [rows, n].
        attention_mask: [rows, n], nonzero where a token is real; None for everywhere.
        prompt_length: How many first tokens (the start token, a prompt) are no targets.
        label_smoothing: Share of the target's probability that all tokens get, 0 .. 1.

    Returns:
        The cross-entropy summed over each sentence's tokens [rows], and how many tokens that were [rows].
    """
    is_target = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    is_target = is_target & (torch.arange(input_ids.shape[1], device=input_ids.device) >= prompt_length)
    targets = input_ids.masked_fill(~is_target, -100)[:, 1:]
    # classes last, which is also how they lie in memory
    flat = rearrange(logits[:, :-1], "rows n vocab -> (rows n) vocab")
    losses = F.cross_entropy(flat, targets.flatten(), reduction="none", label_smoothing=label_smoothing)
    return losses.view_as(targets).sum(1), is_target[:, 1:].sum(1)


def _packed_mask(memory: PackedTokens) -> Tensor | None:
    """The `memory_mask` of packed tokens; in soft training, the bias of tokens that are kept in part."""
    if memory.bias is not None:
        bias = segments.pad(memory.bias, memory.layout, float("-inf"))
        return bias[:, None, None]
    real = memory.unpack()[1]
    return None if real is None else real[:, None, None]


def _cross_keys_values(layer: MedLayer, memory: Tensor) -> KeysValues:
    assert layer.cross is not None
    return layer.cross.streams[0].keys_values(memory)


def _decode_layer(
    layer: MedLayer,
    x: Tensor,
    before: KeysValues | None,
    mask: Tensor,
    memory: KeysValues,
    memory_mask: Tensor | None,
) -> tuple[Tensor, KeysValues]:
    """One layer on new tokens x [rows, n, width]. Returns them, and the keys and values of all tokens so far."""
    keys, values = layer.attention.keys_values(x)
    if before is not None:
        keys = torch.cat([before[0], keys], 2)
        values = torch.cat([before[1], values], 2)
    x = layer.attention_norm(x + layer.dropout(layer.attention.attend(x, keys, values, mask)))

    assert layer.cross is not None
    (stream,) = layer.cross.streams
    # the rows that attend to one group share its keys and values
    grouped = x.reshape(len(memory[0]), -1, x.shape[-1])
    branch = stream.attend(grouped, *memory, memory_mask).reshape(x.shape)
    x = layer.cross.norm(x + layer.dropout(branch))
    return layer.feed_forward(x), (keys, values)


def _causal_mask(x: Tensor, past: int, attention_mask: Tensor | None) -> Tensor:
    """What each new token of x [rows, n, width] attends to: [rows or 1, 1, n, past + n] bool, the real tokens up to itself."""
    n = x.shape[1]
    mask = torch.ones(n, past + n, dtype=torch.bool, device=x.device).tril(past)[None, None]
    if attention_mask is None:
        return mask
    real = attention_mask.bool()
    if not real[:, 0].all():
        raise ValueError(
            "attention_mask hides the first token of a sentence, which all others attend to: pad on the right"
        )
    return mask & F.pad(real, (past, 0), value=True)[:, None, None]


def _select(layers: tuple[KeysValues, ...], rows: Tensor) -> tuple[KeysValues, ...]:
    return tuple((keys[rows], values[rows]) for keys, values in layers)
