"""Hosts of ViT and DeiT of transformers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.deit.modeling_deit import DeiTAttention, DeiTLayer, DeiTModel
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTModel

from ...core.tokens import PackedTokens
from ...registry import hosts
from .base import ImageHost, PreNormHost


@hosts.register("transformers.models.vit.modeling_vit.ViTModel")
class VitHost(PreNormHost, ImageHost):
    """Host of ViT, with a pooler or without, at its own image size or with interpolated positions."""

    layers = "layers"
    attention = "attention"
    dropout = "attention_dropout"
    norms = ("layernorm_before", "layernorm_after")
    known: ClassVar = {ViTLayer: (ViTAttention,), DeiTLayer: (DeiTAttention,)}

    def branch(self, block: ViTLayer | DeiTLayer, index: int, x: Tensor, tokens: PackedTokens) -> Tensor:
        return block.dropout(x)

    def head(
        self, tower: ViTModel | DeiTModel, tokens: PackedTokens, block_inputs: tuple[object, ...]
    ) -> BaseModelOutputWithPooling:
        x = tokens.with_x(tower.layernorm(tokens.x)).unpack()[0]
        pooled = None if tower.pooler is None else tower.pooler(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)


@hosts.register("transformers.models.deit.modeling_deit.DeiTModel")
class DeitHost(VitHost):
    """Host of DeiT, a ViT with a distillation token behind the class token."""

    def prefix(self, tower: DeiTModel) -> int:
        return 2
