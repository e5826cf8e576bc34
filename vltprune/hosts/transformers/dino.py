"""Hosts of DINOv2, with registers or without, and DINOv3 of transformers."""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention, Dinov2Layer, Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersAttention,
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersModel,
)
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTAttention,
    DINOv3ViTLayer,
    DINOv3ViTModel,
    rotate_half,
)

from ...core.tokens import PackedTokens
from ...registry import hosts
from ..ops import drop_path
from .base import ImageHost, PreNormHost

_Tower: TypeAlias = Dinov2Model | Dinov2WithRegistersModel | DINOv3ViTModel
_Layer: TypeAlias = Dinov2Layer | Dinov2WithRegistersLayer | DINOv3ViTLayer


@hosts.register("transformers.models.dinov2.modeling_dinov2.Dinov2Model")
@hosts.register("transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel")
class Dinov2Host(PreNormHost, ImageHost):
    """Host of DINOv2: LayerScale, stochastic depth, MLP or SwiGLU, registers behind the class token; images of any size."""

    layers = "encoder.layer"
    attention = "attention"
    dropout = "attention_dropout"
    norms = ("norm1", "norm2")
    # the final norm
    norm: ClassVar[str] = "layernorm"
    known: ClassVar = {
        Dinov2Layer: (Dinov2Attention,),
        Dinov2WithRegistersLayer: (Dinov2WithRegistersAttention,),
        DINOv3ViTLayer: (DINOv3ViTAttention,),
    }

    def prefix(self, tower: _Tower) -> int:
        return 1 + getattr(tower.config, "num_register_tokens", 0)

    def embed(self, tower: _Tower, pixel_values: Tensor) -> tuple[PackedTokens, tuple[Any, ...]]:
        x = tower.embeddings(self.check_pixels(tower, pixel_values, any_size=True))
        return self.pack(tower, x), (None,) * len(self.blocks(tower))

    def branch(self, block: _Layer, index: int, x: Tensor, tokens: PackedTokens) -> Tensor:
        scaled = (block.layer_scale1, block.layer_scale2)[index](x)
        return drop_path(block.drop_path, scaled, tokens.layout)

    def head(self, tower: _Tower, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> BaseModelOutputWithPooling:
        x = tokens.with_x(getattr(tower, self.norm)(tokens.x)).unpack()[0]
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x[:, 0])


@hosts.register("transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel")
class Dinov3Host(Dinov2Host):
    """Host of DINOv3, whose rotary tables are indexed by original positions."""

    layers = "model.layer"
    dropout = "dropout"
    norm = "norm"

    def embed(self, tower: DINOv3ViTModel, pixel_values: Tensor) -> tuple[PackedTokens, tuple[Any, ...]]:
        tokens, _ = super().embed(tower, pixel_values)
        # cosine and sine, [2, patches, head_dim]; prefix tokens are not rotated
        tables = torch.stack(tower.rope_embeddings(pixel_values.to(tower.dtype)))
        unrotated = tables.new_tensor((1.0, 0.0)).view(2, 1, 1).expand(2, self.prefix(tower), tables.shape[-1])
        return tokens, (torch.cat((unrotated, tables), 1),) * len(self.blocks(tower))

    def qkv(self, block: DINOv3ViTLayer, tokens: PackedTokens, block_input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(block, tokens, block_input)
        cos, sin = block_input.index_select(1, tokens.position)[:, :, None]
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v
