"""Hosts of BLIP of transformers: the image tower, the text tower that cross-attends to it, and composites of its models.

The kept tokens of an image go from tower to tower padded, as transformers' models pass them. The mask that goes with them
calls all of them real, and version 5.24 even drops it before BLIP's cross-attention. So a row of zeros is padding here, and
nothing attends to it: a token behind a norm is never all zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip.modeling_blip import BlipAttention, BlipEncoderLayer, BlipVisionModel
from transformers.models.blip.modeling_blip_text import (
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextModel,
    BlipTextSelfAttention,
)

from ...core.attention import attend
from ...core.tokens import PackedTokens
from ...layers.guides.base import TokenProjection
from ...pruning.decode_stats import DecodeStats
from ...pruning.trace import report_decode_stats
from ...registry import hosts
from ..base import Host
from ..decoder import WithDecoder
from ..linear_maps import linear_macs
from ..ops import image_projection
from ..soft import refuse_soft_tokens
from .base import ImageHost, PreNormHost, TransformersComposite
from .text import PostNormHost

_READER = "what attends to an image or a question in transformers' BLIP"
_INSTEAD = "use this library's Blip models"
# the tokens that sentences cross-attend to: one instance a sentence, or one for all
Memory = tuple[PackedTokens]


@hosts.register("transformers.models.blip.modeling_blip.BlipVisionModel")
class BlipVisionHost(PreNormHost, ImageHost):
    """Host of BLIP's image tower. As in transformers, the pooled class token goes through the final norm twice."""

    layers = "encoder.layers"
    attention = "self_attn"
    norms = ("layer_norm1", "layer_norm2")
    output = "projection"
    known: ClassVar = {BlipEncoderLayer: (BlipAttention,)}

    def project_qkv(self, attn: BlipAttention, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(1)
        return q, k, v

    def scale(self, block: BlipEncoderLayer) -> float:
        return block.self_attn.scale

    def head(
        self, tower: BlipVisionModel, tokens: PackedTokens, block_inputs: tuple[object, ...]
    ) -> BaseModelOutputWithPooling:
        refuse_soft_tokens(tokens, _READER, _INSTEAD)
        x = tokens.with_x(tower.post_layernorm(tokens.x)).unpack()[0]
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=tower.post_layernorm(x[:, 0]))


@hosts.register("transformers.models.blip.modeling_blip_text.BlipTextModel")
class BlipTextHost(PostNormHost):
    """Host of BLIP's text tower as an encoder, with or without images; encoder_attention_mask may hide parts of them."""

    known: ClassVar = {BlipTextLayer: (BlipTextSelfAttention,)}

    def embed(
        self,
        tower: BlipTextModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> tuple[PackedTokens, tuple[Memory | None, ...]]:
        tokens, no_memory = self.embed_ids(tower, input_ids, attention_mask, position_ids=position_ids)
        if encoder_hidden_states is None:
            return tokens, no_memory
        if not tower.config.is_decoder:
            raise ValueError("encoder_hidden_states need cross-attention: build the text tower with is_decoder=True")
        if encoder_hidden_states.shape[0] not in (1, input_ids.shape[0]):
            raise ValueError(
                f"{input_ids.shape[0]} sentences cannot attend to {encoder_hidden_states.shape[0]} images: give one each, or "
                "one for all"
            )
        real = occupied(encoder_hidden_states)
        if encoder_attention_mask is not None:
            real = real & encoder_attention_mask.to(real.device).bool()
        return tokens, ((PackedTokens.pack(encoder_hidden_states, real),),) * len(no_memory)

    def feed_forward(self, block: BlipTextLayer, tokens: PackedTokens, block_input: Memory | None) -> PackedTokens:
        if block_input is not None:
            context = self._cross_attend(block.crossattention.self, tokens, block_input[0])
            tokens = tokens.with_x(block.crossattention.output(context.flatten(1), tokens.x))
        return super().feed_forward(block, tokens, block_input)

    def _cross_attend(self, attn: Any, tokens: PackedTokens, memory: PackedTokens) -> Tensor:
        """Cross-attention of each sentence to its image: [total, heads, head_dim]."""
        q, k, v = self.project_qkv(attn, tokens.x, memory.x)
        # sentences that attend to one image share its keys
        grouped = tokens.layout.grouped(memory.layout.batch)
        dropout = attn.dropout.p if attn.training else 0.0
        return attend(q, k, v, grouped, q.shape[-1] ** -0.5, key_layout=memory.layout, dropout=dropout)


class BlipQuestionHost(BlipTextHost):
    """Host of BLIP's text tower where a decoder attends to all of its output."""

    def head(
        self, tower: BlipTextModel, tokens: PackedTokens, block_inputs: tuple[object, ...]
    ) -> BaseModelOutputWithPooling:
        refuse_soft_tokens(tokens, _READER, _INSTEAD)
        return super().head(tower, tokens, block_inputs)


@hosts.register("transformers.models.blip.modeling_blip.BlipForImageTextRetrieval")
class BlipRetrievalComposite(TransformersComposite):
    """Composite of both towers, with the matching head."""

    names: ClassVar = {"image": "vision_model", "text": "text_encoder"}

    def head_macs(self, model: nn.Module) -> float:
        return linear_macs(model.get_submodule("itm_head"))

    def projections(self, model: Any) -> dict[str, TokenProjection]:
        return image_projection(model.vision_model.post_layernorm, model.vision_proj)


class _DecoderComposite(TransformersComposite, WithDecoder):
    """Composite with a decoder that attends to the kept tokens. It stays dense; the zeros behind them are hidden from it."""

    decoder = "text_decoder"

    def cross_attentions(self, decoder: Any) -> Sequence[Any]:
        return [layer.crossattention.self for layer in decoder.bert.encoder.layer]

    def cross_width(self, cross: BlipTextSelfAttention) -> int:
        return cross.all_head_size

    def lm_head_macs(self, decoder: BlipTextLMHeadModel) -> float:
        return linear_macs(decoder.cls)

    def body(self, decoder: BlipTextLMHeadModel) -> Any:
        return decoder.bert

    def add_hooks(self, decoder: BlipTextLMHeadModel) -> None:
        for cross in self.cross_attentions(decoder):
            cross.register_forward_pre_hook(_hide_padding, with_kwargs=True)
        self.body(decoder).encoder.layer[0].attention.self.register_forward_hook(_record_tokens)
        decoder.cls.register_forward_hook(_record_words)


@hosts.register("transformers.models.blip.modeling_blip.BlipForQuestionAnswering")
class BlipVqaComposite(_DecoderComposite):
    """Composite of image and question; the decoder of answers attends to the question."""

    names: ClassVar = {"image": "vision_model", "text": "text_encoder"}

    def towers(self, model: nn.Module) -> dict[str, tuple[nn.Module, Host]]:
        found = super().towers(model)
        return {**found, "text": (found["text"][0], BlipQuestionHost())}


@hosts.register("transformers.models.blip.modeling_blip.BlipForConditionalGeneration")
class BlipCaptionComposite(_DecoderComposite):
    """Composite of the image tower alone; the decoder of captions attends to it."""

    names: ClassVar = {"image": "vision_model"}


def occupied(x: Tensor) -> Tensor:
    """Which rows of padded tokens [batch, n, dim] are tokens: [batch, n] bool."""
    return (x != 0).any(-1)


def _hide_padding(attn: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hook before a decoder's cross-attention: add the bias that hides padding from all queries."""
    memory = named["encoder_hidden_states"]
    bias = torch.zeros(memory.shape[:2], dtype=memory.dtype, device=memory.device)
    bias = bias.masked_fill(~occupied(memory), torch.finfo(memory.dtype).min)
    return args, {**named, "encoder_attention_mask": bias[:, None, None]}


def _record_tokens(attn: nn.Module, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> None:
    """Hook after the first layer's self-attention, probabilities [rows, heads, new tokens, seen]: the others are alike."""
    rows, _, new, seen = out[1].shape
    report_decode_stats(DecodeStats(rows * new, pairs=rows * new * seen))


def _record_words(head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
    """Hook after logits [rows, words, vocab_size]; in `generate` those of each row's last token alone."""
    report_decode_stats(DecodeStats(words=logits.shape[0] * logits.shape[1]))
