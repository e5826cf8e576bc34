"""BERT, RoBERTa and DistilBERT of transformers, taken apart."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention, TransformerBlock
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaSelfAttention

from ...registry import hosts
from ...tokens import PackedTokens
from ..base import by_tiles
from .base import Sentences


class PostNorm(Sentences):
    """Blocks that are norm(x + attention(x)), then norm(x + mlp(x)), as BERT lays them out."""

    layers = "encoder.layer"
    attention = "attention.self"
    projections = ("query", "key", "value")

    def qkv(self, block: Any, tokens: PackedTokens, beside: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.project(self.attn(block), tokens.x, tokens.x)

    def mix(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        return tokens.with_x(block.attention.output(context.flatten(1), tokens.x))

    def feed(self, block: Any, tokens: PackedTokens, beside: Any) -> PackedTokens:
        return tokens.with_x(by_tiles(lambda x: block.output(block.intermediate(x), x), tokens.x))

    def close(self, tower: Any, tokens: PackedTokens, beside: tuple[Any, ...]) -> Any:
        x = tokens.unpack()[0]
        pooled = None if tower.pooler is None else tower.pooler(x)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=x, pooler_output=pooled)


@hosts.register("transformers.models.bert.modeling_bert.BertModel")
@hosts.register("transformers.models.roberta.modeling_roberta.RobertaModel")
class Bert(PostNorm):
    """BERT and RoBERTa as encoders."""

    known: ClassVar = {BertLayer: (BertSelfAttention,), RobertaLayer: (RobertaSelfAttention,)}

    def check(self, tower: Any) -> None:
        super().check(tower)
        if tower.config.is_decoder:
            raise TypeError(f"cannot prune a {type(tower).__name__} that decodes: build it with is_decoder=False")

    def open(
        self,
        tower: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[PackedTokens, tuple[None, ...]]:
        return self.enter(tower, input_ids, attention_mask, token_type_ids=token_type_ids, position_ids=position_ids)


@hosts.register("transformers.models.distilbert.modeling_distilbert.DistilBertModel")
class DistilBert(Sentences):
    """DistilBERT: BERT's blocks under other names."""

    layers = "transformer.layer"
    attention = "attention"
    projections = ("q_lin", "k_lin", "v_lin")
    known: ClassVar = {TransformerBlock: (DistilBertSelfAttention,)}

    def qkv(self, block: Any, tokens: PackedTokens, beside: None) -> tuple[Tensor, Tensor, Tensor]:
        return self.project(block.attention, tokens.x, tokens.x)

    def mix(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        return tokens.with_x(block.sa_layer_norm(block.attention.out_lin(context.flatten(1)) + tokens.x))

    def feed(self, block: Any, tokens: PackedTokens, beside: None) -> PackedTokens:
        return tokens.with_x(by_tiles(lambda x: block.output_layer_norm(block.ffn.ff_chunk(x) + x), tokens.x))

    def close(self, tower: Any, tokens: PackedTokens, beside: tuple[Any, ...]) -> Any:
        return BaseModelOutput(last_hidden_state=tokens.unpack()[0])
