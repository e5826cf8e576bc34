"""Hosts of BERT, RoBERTa, XLM-RoBERTa, MPNet and DistilBERT of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert.modeling_bert import BertLayer, BertModel, BertSelfAttention
from transformers.models.distilbert.modeling_distilbert import (
    DistilBertModel,
    DistilBertSelfAttention,
    TransformerBlock,
)
from transformers.models.mpnet.modeling_mpnet import MPNetLayer, MPNetModel, MPNetSelfAttention
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaModel, RobertaSelfAttention
from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaLayer,
    XLMRobertaModel,
    XLMRobertaSelfAttention,
)

from ...core.attention import PairBias
from ...core.tokens import PackedTokens
from ...registry import hosts
from ..ops import by_tiles
from .base import TextHost


class PostNormHost(TextHost):
    """Host of post-norm blocks, norm(x + attention(x)), then norm(x + mlp(x)), with BERT's submodules.

    Attributes:
        output_class: The output class of transformers that the tower returns.
    """

    layers = "encoder.layer"
    attention = "attention.self"
    head_size = "attention_head_size"
    projections = ("query", "key", "value")
    output_class: ClassVar[Any] = BaseModelOutputWithPoolingAndCrossAttentions

    def qkv(self, block: Any, tokens: PackedTokens, block_input: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.project_qkv(self.attn(block), tokens.x, tokens.x)

    def project(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        return tokens.with_x(block.attention.output(context.flatten(1), tokens.x))

    def feed_forward(self, block: Any, tokens: PackedTokens, block_input: Any) -> PackedTokens:
        return tokens.with_x(by_tiles(lambda x: block.output(block.intermediate(x), x), tokens.x))

    def head(self, tower: Any, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> Any:
        x = tokens.unpack()[0]
        pooled = None if tower.pooler is None else tower.pooler(x)
        return self.output_class(last_hidden_state=x, pooler_output=pooled)


@hosts.register("transformers.models.bert.modeling_bert.BertModel")
@hosts.register("transformers.models.roberta.modeling_roberta.RobertaModel")
@hosts.register("transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaModel")
class BertHost(PostNormHost):
    """Host of BERT, RoBERTa and XLM-RoBERTa as encoders."""

    known: ClassVar = {
        BertLayer: (BertSelfAttention,),
        RobertaLayer: (RobertaSelfAttention,),
        XLMRobertaLayer: (XLMRobertaSelfAttention,),
    }

    def check(self, tower: BertModel | RobertaModel | XLMRobertaModel) -> None:
        super().check(tower)
        if tower.config.is_decoder:
            raise TypeError(f"cannot prune a {type(tower).__name__} that decodes: build it with is_decoder=False")

    def embed(
        self,
        tower: BertModel | RobertaModel | XLMRobertaModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[PackedTokens, tuple[None, ...]]:
        return self.embed_ids(
            tower, input_ids, attention_mask, token_type_ids=token_type_ids, position_ids=position_ids
        )


@hosts.register("transformers.models.mpnet.modeling_mpnet.MPNetModel")
class MPNetHost(PostNormHost):
    """Host of MPNet: BERT's blocks, and a bias of each head for the distance of two tokens, which all blocks share.

    A block input is that bias for the distances 1 - length .. length - 1, [heads, 2 * length - 1].
    """

    attention = "attention.attn"
    projections = ("q", "k", "v")
    output_class = BaseModelOutputWithPooling
    known: ClassVar = {MPNetLayer: (MPNetSelfAttention,)}

    def heads(self, attn: MPNetSelfAttention) -> int:
        return attn.num_attention_heads

    def embed(
        self,
        tower: MPNetModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[PackedTokens, tuple[Tensor, ...]]:
        tokens, _ = self.embed_ids(tower, input_ids, attention_mask, position_ids=position_ids)
        # distances are of places in the sentence, whatever position_ids are
        encoder, length = tower.encoder, input_ids.shape[1]
        buckets = encoder.relative_position_bucket(torch.arange(1 - length, length, device=input_ids.device))
        return tokens, (encoder.relative_attention_bias(buckets).t(),) * len(self.blocks(tower))

    def pair_bias(self, block: MPNetLayer, tokens: PackedTokens, block_input: Tensor) -> PairBias:
        zero = block_input.shape[1] // 2
        return PairBias(tokens.position, lambda distance: block_input[:, distance + zero].movedim(0, -3))

    def project(self, block: MPNetLayer, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        attention = block.attention
        branch = attention.dropout(attention.attn.o(context.flatten(1)))
        return tokens.with_x(attention.LayerNorm(branch + tokens.x))

    def format_output(self, tower: MPNetModel, out: Any, **named: Any) -> Any:
        out = super().format_output(tower, out, **named)
        return (
            (*out, None)[:2] if isinstance(out, tuple) else out
        )  # its tuple holds the place of a pooler that is not there

    def gradient_checkpointing(self, tower: nn.Module) -> bool:
        return False


@hosts.register("transformers.models.distilbert.modeling_distilbert.DistilBertModel")
class DistilBertHost(TextHost):
    """Host of DistilBERT: BERT's blocks under other names."""

    layers = "transformer.layer"
    attention = "attention"
    head_size = "attention_head_size"
    projections = ("q_lin", "k_lin", "v_lin")
    known: ClassVar = {TransformerBlock: (DistilBertSelfAttention,)}

    def qkv(self, block: TransformerBlock, tokens: PackedTokens, block_input: None) -> tuple[Tensor, Tensor, Tensor]:
        return self.project_qkv(block.attention, tokens.x, tokens.x)

    def project(self, block: TransformerBlock, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        return tokens.with_x(block.sa_layer_norm(block.attention.out_lin(context.flatten(1)) + tokens.x))

    def feed_forward(self, block: TransformerBlock, tokens: PackedTokens, block_input: None) -> PackedTokens:
        return tokens.with_x(by_tiles(lambda x: block.output_layer_norm(block.ffn.ff_chunk(x) + x), tokens.x))

    def head(self, tower: DistilBertModel, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> Any:
        return BaseModelOutput(last_hidden_state=tokens.unpack()[0])
