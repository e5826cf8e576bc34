"""Hosts of language models of transformers, whose visual tokens are pruned while they read the prompt.

They run in place of `language_model` in a vision-language model, or alone on `inputs_embeds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaDecoderLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3DecoderLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention, Qwen2_5_VLDecoderLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention, Qwen2VLDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextAttention, Qwen3VLTextDecoderLayer

from ...core import segments
from ...core.attention import PairBias, PairMask, Pairs, attend_by_head, by_head
from ...core.modality import with_modality
from ...core.tokens import PackedTokens
from ...layers.block_spec import BlockSpec
from ...registry import hosts
from ..ops import by_tiles
from .base import PreNormHost, PrunedTransformer
from .language_cache import adopt
from .language_masks import given_mask, real_tokens, visible_keys, visual_rows, with_prompt_values
from .modernbert import window_bias


@dataclass(frozen=True)
class LanguageInput:
    """What one call of a language model gives to one layer.

    Attributes:
        tables: Cosine and sine of the call's tokens, [2, 1 or batch, length, head_dim].
        length: Tokens of each row of the batch in this call, padding included.
        seen: Tokens of each row in the cache before this call, padding included.
        cache: The key-value cache; None for none.
        window: How many tokens back a query sees, itself included; None for all.
        visible: [1 or batch, length, seen + length] bool, which keys each query sees, where causality and window do not say it.
        features: What is added behind the layer (DeepStack, arXiv 2406.04334): [visual tokens, dim] of the batch.
        feature_row: [batch * length] int64, the row of `features` of each token; -1 for none.
    """

    tables: Tensor
    length: int
    seen: int
    cache: Cache | None
    window: int | None
    visible: Tensor | None
    features: Tensor | None = None
    feature_row: Tensor | None = None

    def row(self, tokens: PackedTokens) -> Tensor:
        """[total] int64: the place of each token in the call's padded batch."""
        return tokens.layout.instance * self.length + tokens.position


class PrunedLanguageModel(PrunedTransformer):
    """A language model that prunes visual tokens while it reads a prompt, and generates from what is left.

    A call with an empty cache, or with none, reads a prompt; it prunes. Later calls on the same cache bring text, or further
    images, and prune nothing: each layer attends to those tokens of the prompt that entered it.

    Args:
        host, adapter, config, guide, tower, composite: As in `PrunedEncoder`.
    """

    adapter: LanguageHost

    def encode(self, *inputs: Any, **named: Any) -> tuple[PackedTokens, tuple[object, ...]]:
        bound = self.adapter.bind_arguments(self.host, *inputs, **named)
        if self.adapter.is_prompt(*bound):
            return super().encode(*inputs, **named)
        if self.decides_softly:
            raise ValueError(
                "a cache cannot hold tokens that soft training keeps in part: call model.eval() to generate"
            )
        tokens, calls = self.adapter.embed(self.host, *bound)
        for block, call in zip(self.adapter.blocks(self.host), calls, strict=True):
            tokens = self.adapter.decode(block, tokens, call)
        return tokens, calls


class LanguageHost(PreNormHost):
    """Host of a language model of pre-norm layers with rotary positions and grouped-query attention.

    Visual tokens can be pruned; all others are protected. Tokens keep their original positions, and see what they would see in
    the dense model with the pruned tokens masked. The output has the length of the input: where a token is gone stands the
    last one that is left before it, so that the loss is that of the tokens that stay. In soft training visual tokens that are
    there in part are attended to in part.
    """

    tower = "language"
    pruned_class = PrunedLanguageModel
    layers = "layers"
    attention = "self_attn"
    norms = ("input_layernorm", "post_attention_layernorm")
    dropout = "attention_dropout"
    has_summary = False
    known: ClassVar[Mapping[type, tuple[type, ...]]] = {
        LlamaDecoderLayer: (LlamaAttention,),
        MistralDecoderLayer: (MistralAttention,),
        Qwen2DecoderLayer: (Qwen2Attention,),
        Qwen2VLDecoderLayer: (Qwen2VLAttention,),
        Qwen2_5_VLDecoderLayer: (Qwen2_5_VLAttention,),
        Qwen3DecoderLayer: (Qwen3Attention,),
        Qwen3VLTextDecoderLayer: (Qwen3VLTextAttention,),
        GemmaDecoderLayer: (GemmaAttention,),
    }

    def check(self, tower: PreTrainedModel) -> None:
        super().check(tower)
        if getattr(tower.config, "use_bidirectional_attention", None):
            raise TypeError(f"cannot prune a {type(tower).__name__} with use_bidirectional_attention: it is no decoder")

    def spec(self, tower: PreTrainedModel, depth: int, name: str) -> BlockSpec:
        return replace(super().spec(tower, depth, name), modalities=("text", "image"))

    def causal(self, tower: PreTrainedModel) -> bool:
        return True

    def bind_arguments(self, tower: Any, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        if named.get("use_cache") is None:
            named["use_cache"] = getattr(tower.config, "use_cache", False)
        if "past_key_values" in named:
            named["cache"] = named.pop("past_key_values")
        named.pop("logits_to_keep", None)  # is of the head behind; some models hand it on
        return super().bind_arguments(tower, *inputs, **named)

    def is_prompt(
        self, input_ids: Tensor | None, attention_mask: object, position_ids: object, cache: Cache | None, *rest: object
    ) -> bool:
        """Whether a call reads a prompt: its cache is empty, or there is none.

        Args:
            input_ids: As `embed` takes it, and so are all others.
            attention_mask: Not read.
            position_ids: Not read.
            cache: The key-value cache.
            *rest: Not read.
        """
        return cache is None or cache.get_seq_length() == 0

    def embed(
        self,
        tower: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        visual_pos_masks: Tensor | None = None,
        deepstack_visual_embeds: list[Tensor] | None = None,
    ) -> tuple[PackedTokens, tuple[LanguageInput, ...]]:
        x = _embedded(tower, input_ids, inputs_embeds)
        blocks, (batch, length) = self.blocks(tower), x.shape[:2]
        if use_cache and cache is None and not (tower.training and self.gradient_checkpointing(tower)):
            cache = DynamicCache(config=tower.config)
        if cache is not None:
            adopt(cache, len(blocks))
        seen = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=x.device)[None]
        if position_ids.ndim == 3 and len(position_ids) == 4:
            position_ids = position_ids[1:]  # the first are of the text alone, for masks

        windows = [self.window(tower, depth) for depth in range(len(blocks))]
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        tables = {kind: torch.stack(self.rotary(tower, x, position_ids, kind)) for kind in set(kinds)}
        masks = {kind: given_mask(attention_mask, kind, batch, length, seen) for kind in set(kinds)}
        visual = visual_rows(visual_pos_masks, batch, length, seen, x.device)
        if seen:
            tokens = PackedTokens.pack(x, protected=~visual)
            masks = {
                kind: visible_keys(masks[kind], windows[kinds.index(kind)], seen, length, x.device) for kind in masks
            }
        else:
            tokens = PackedTokens.pack(x, real_tokens(masks), protected=~visual)
            masks = {kind: mask if mask is not None and mask.ndim == 3 else None for kind, mask in masks.items()}
        tokens = with_prompt_values(with_modality(tokens, ~tokens.protected), length, seen)
        calls = [
            LanguageInput(tables[kind], length, seen, cache, window, masks[kind])
            for kind, window in zip(kinds, windows, strict=True)
        ]
        if deepstack_visual_embeds and visual_pos_masks is not None:
            flat = visual_pos_masks.to(x.device).flatten()
            row = torch.where(flat, flat.cumsum(0) - 1, -1)
            for depth, features in enumerate(deepstack_visual_embeds):
                calls[depth] = replace(calls[depth], features=features.to(x), feature_row=row)
        return tokens, tuple(calls)

    def window(self, tower: Any, depth: int) -> int | None:
        """How many tokens back a layer sees, itself included; None for all.

        Args:
            tower: The dense tower.
            depth: Index of the layer.
        """
        config = tower.config
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return getattr(config, "sliding_window", None)
        return config.sliding_window if kinds[depth] == "sliding_attention" else None

    def rotary(self, tower: Any, x: Tensor, position_ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions, [1 or batch, length, head_dim] each.

        Args:
            tower: The dense tower.
            x: Embeddings, for the dtype.
            position_ids: [1 or batch, length], or [3, batch, length] of time, height and width.
            kind: "full_attention" or "sliding_attention".
        """
        return tower.rotary_emb(x, position_ids)

    def qkv(self, block: Any, tokens: PackedTokens, block_input: LanguageInput) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._rotated_qkv(block, tokens, block_input)
        groups = q.shape[1] // k.shape[1]
        return (q, k, v) if groups == 1 else (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))

    def store(self, block: Any, tokens: PackedTokens, k: Tensor, v: Tensor, block_input: LanguageInput) -> None:
        cache, attn = block_input.cache, self.attn(block)
        if cache is not None and cache.get_seq_length(attn.layer_idx) == 0:
            # one of each group of equal heads
            k, v = (heads[:, :: attn.num_key_value_groups] for heads in (k, v))
            _store(cache, attn.layer_idx, k, v, tokens, block_input)

    def _rotated_qkv(
        self, block: Any, tokens: PackedTokens, block_input: LanguageInput
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [total, heads, head_dim], key and value [total, key heads, head_dim], with norms and positions."""
        attn, x = self.attn(block), getattr(block, self.norms[0])(tokens.x)
        q, k, v = (getattr(attn, name)(x).unflatten(-1, (-1, attn.head_dim)) for name in self.projections)
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        tables = block_input.tables
        row = tokens.position if tables.shape[1] == 1 else block_input.row(tokens)
        cos, sin = tables.flatten(1, 2).index_select(1, row)
        return *apply_rotary_pos_emb(q, k, cos, sin), v

    def scale(self, block: Any) -> float:
        return self.attn(block).scaling

    def softcap(self, block: Any) -> float | None:
        return getattr(self.attn(block), "attn_logit_softcapping", None)

    def pair_bias(self, block: Any, tokens: PackedTokens, block_input: LanguageInput) -> Pairs | None:
        if block_input.visible is not None:
            return PairMask(block_input.row(tokens), block_input.visible)
        if block_input.window is None or block_input.window >= block_input.length:
            return None
        return PairBias(tokens.position, window_bias(block_input.window - 1))

    def decode(self, block: Any, tokens: PackedTokens, block_input: LanguageInput) -> PackedTokens:
        """Run a layer on tokens behind a prompt, which attend to the tokens that the layer's cache holds.

        Args:
            block: The layer.
            tokens: The tokens of the call, equally many of each instance, x [total, dim].
            block_input: What `embed` returned for this layer.

        Returns:
            The tokens behind the layer.
        """
        q, k, v = self._rotated_qkv(block, tokens, block_input)
        cache, depth = block_input.cache, self.attn(block).layer_idx
        assert cache is not None
        keys, values = _store(cache, depth, k, v, tokens, block_input)
        visible = cache.layers[depth].visible(block_input.visible)
        bias = None if visible is None else q.new_zeros(visible.shape).masked_fill(~visible, float("-inf"))
        context = attend_by_head(
            by_head(q, tokens.layout),
            keys,
            values,
            self.scale(block),
            bias=bias,
            dropout=self.attention_dropout(block),
            softcap=self.softcap(block),
        )
        tokens = self.project(block, tokens, segments.unpad(context.transpose(1, 2), tokens.layout))
        return self.feed_forward(block, tokens, block_input)

    def feed_forward(self, block: Any, tokens: PackedTokens, block_input: LanguageInput) -> PackedTokens:
        tokens = super().feed_forward(block, tokens, block_input)
        features, rows = block_input.features, block_input.feature_row
        if features is None or rows is None:
            return tokens
        row = rows[block_input.row(tokens)]
        added = features.index_select(0, row.clamp(min=0)).masked_fill((row < 0)[:, None], 0.0)
        return tokens.with_x(tokens.x + added)

    def head(
        self, tower: Any, tokens: PackedTokens, block_inputs: tuple[LanguageInput, ...]
    ) -> BaseModelOutputWithPast:
        call, x = block_inputs[0], tower.norm(tokens.x)
        batch, total = tokens.layout.batch, tokens.layout.total
        if total < batch * call.length:
            row = torch.full((batch * call.length,), -1, device=x.device)
            row = row.index_copy(0, call.row(tokens), torch.arange(total, device=x.device))
            # of a token that is gone, the one that is left before it
            row = row.view(batch, -1).cummax(1).values.flatten()
            x = x.index_select(0, row.clamp(min=0)).masked_fill((row < 0)[:, None], 0.0)
        return BaseModelOutputWithPast(last_hidden_state=x.view(batch, call.length, -1), cache=call.cache)


class SandwichNormHost(LanguageHost):
    """Host of Gemma 2 and 3, which have a norm before and behind attention and MLP."""

    known: ClassVar = {Gemma2DecoderLayer: (Gemma2Attention,), Gemma3DecoderLayer: (Gemma3Attention,)}

    def rotary(self, tower: Any, x: Tensor, position_ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        by_kind = (kind,) if hasattr(tower.rotary_emb, "layer_types") else ()
        return tower.rotary_emb(x, position_ids, *by_kind)

    def project(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        branch = block.post_attention_layernorm(block.self_attn.o_proj(context.flatten(1)))
        return tokens.with_x(tokens.x + branch)

    def feed_forward(self, block: Any, tokens: PackedTokens, block_input: LanguageInput) -> PackedTokens:
        def function(x: Tensor) -> Tensor:
            return block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))

        return tokens.with_x(tokens.x + by_tiles(function, tokens.x))

    def projects_affinely(self, block: Any) -> bool:
        return False


for _name in (
    "llama.modeling_llama.LlamaModel",
    "mistral.modeling_mistral.MistralModel",
    "qwen2.modeling_qwen2.Qwen2Model",
    "qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel",
    "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLTextModel",
    "qwen3.modeling_qwen3.Qwen3Model",
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextModel",
    "gemma.modeling_gemma.GemmaModel",
):
    hosts.register(f"transformers.models.{_name}")(LanguageHost)
for _name in ("gemma2.modeling_gemma2.Gemma2Model", "gemma3.modeling_gemma3.Gemma3TextModel"):
    hosts.register(f"transformers.models.{_name}")(SandwichNormHost)


def _embedded(tower: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Token embeddings [batch, length, dim]."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds to a language model, not both")
    return tower.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds


def _store(
    cache: Cache, depth: int, k: Tensor, v: Tensor, tokens: PackedTokens, block_input: LanguageInput
) -> tuple[Tensor, Tensor]:
    """Put keys and values [total, key heads, head_dim] into a layer of the cache.

    Returns:
        All that it holds, [batch, key heads, n, head_dim] each.
    """
    layout, seen = tokens.layout, block_input.seen
    index = segments.pad(tokens.position + seen, layout, -1)
    known = (index, seen + block_input.length, not layout.is_uniform)
    return cache.update(by_head(k, layout), by_head(v, layout), depth, *known)
