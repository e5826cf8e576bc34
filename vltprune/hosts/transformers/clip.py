"""Hosts of the towers of CLIP, SigLIP and SigLIP 2 of transformers, and composites of their models."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, CLIPTextModel, CLIPVisionModel
from transformers.models.siglip.modeling_siglip import (
    SiglipAttention,
    SiglipEncoderLayer,
    SiglipTextModel,
    SiglipVisionModel,
)
from transformers.models.siglip2.modeling_siglip2 import (
    Siglip2Attention,
    Siglip2EncoderLayer,
    Siglip2TextModel,
    Siglip2VisionModel,
)

from ...core.tokens import PackedTokens
from ...layers.guides.base import TokenProjection
from ...registry import hosts
from ..linear_maps import linear_macs
from ..ops import image_projection
from ..soft import padded_bias
from .base import ImageHost, PreNormHost, TextHost, TransformersComposite


class ClipBlocksHost(PreNormHost):
    """The pre-norm blocks that all these towers have."""

    layers = "encoder.layers"
    attention = "self_attn"
    norms = ("layer_norm1", "layer_norm2")
    output = "out_proj"
    known: ClassVar = {
        CLIPEncoderLayer: (CLIPAttention,),
        SiglipEncoderLayer: (SiglipAttention,),
        Siglip2EncoderLayer: (Siglip2Attention,),
    }


@hosts.register("transformers.models.clip.modeling_clip.CLIPVisionModel")
class ClipVisionHost(ClipBlocksHost, ImageHost):
    """Host of CLIP's image tower. As in transformers, the last hidden state is not normed, and the pooled class token is."""

    def embed(
        self, tower: CLIPVisionModel, pixel_values: Tensor, interpolate_pos_encoding: bool | None = False
    ) -> tuple[PackedTokens, tuple[Any, ...]]:
        tokens, block_inputs = super().embed(tower, pixel_values, interpolate_pos_encoding)
        return tokens.with_x(tower.pre_layrnorm(tokens.x)), block_inputs

    def head(
        self, tower: CLIPVisionModel, tokens: PackedTokens, block_inputs: tuple[object, ...]
    ) -> BaseModelOutputWithPooling:
        x = tokens.unpack()[0]
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=tower.post_layernorm(x[:, 0]))


@hosts.register("transformers.models.siglip.modeling_siglip.SiglipVisionModel")
class SiglipVisionHost(ClipBlocksHost, ImageHost):
    """Host of SigLIP's image tower, which has no class token and pools the kept tokens by attention."""

    has_summary = False

    def head(
        self, tower: SiglipVisionModel | Siglip2VisionModel, tokens: PackedTokens, block_inputs: tuple[object, ...]
    ) -> BaseModelOutputWithPooling:
        tokens = tokens.with_x(tower.post_layernorm(tokens.x))
        x = tokens.unpack()[0]
        pooled = _pool(tower.head, tokens) if tower.use_head else None
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)


@hosts.register("transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel")
class Siglip2VisionHost(SiglipVisionHost):
    """Host of SigLIP 2's image tower for images of any shape, given as patches; padding never enters."""

    def embed(
        self, tower: Any, pixel_values: Tensor, pixel_attention_mask: Tensor | None, spatial_shapes: Tensor
    ) -> tuple[PackedTokens, tuple[None, ...]]:
        width = tower.config.num_channels * tower.config.patch_size**2
        if pixel_values.dim() != 3 or pixel_values.shape[-1] != width or pixel_values.shape[0] == 0:
            raise ValueError(
                f"pixel_values must be patches [batch, patches, {width}], got {list(pixel_values.shape)}: prepare them with "
                "the model's image processor"
            )
        valid = None if pixel_attention_mask is None else pixel_attention_mask.bool()
        tokens = self.pack(tower, tower.embeddings(pixel_values, spatial_shapes), valid)
        return tokens, (None,) * len(self.blocks(tower))

    def padded_length(self, tokens: PackedTokens, *inputs: Any) -> int:
        return inputs[0].shape[1]


class _ClipLikeTextHost(ClipBlocksHost, TextHost):
    """Host of a text tower. All tokens that the mask shows enter, those behind the pooled one too."""

    def head(self, tower: Any, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> BaseModelOutputWithPooling:
        tokens = tokens.with_x(tower.final_layer_norm(tokens.x))
        pooled = self.pooled(tower, tokens.summaries())
        return BaseModelOutputWithPooling(last_hidden_state=tokens.unpack()[0], pooler_output=pooled)

    def pooled(self, tower: Any, pooled: Tensor) -> Tensor:
        """The pooled output, from the summary tokens [batch, dim]."""
        return pooled


@hosts.register("transformers.models.clip.modeling_clip.CLIPTextModel")
class ClipTextHost(_ClipLikeTextHost):
    """Host of CLIP's text tower, which is causal and pools the end of the text."""

    def causal(self, tower: CLIPTextModel) -> bool:
        return True

    def summary_position(self, tower: Any, input_ids: Tensor) -> Tensor:
        # configurations from before the end of text had its right id say 2, and mean the largest id of the sentence
        ends = input_ids if tower.eos_token_id == 2 else (input_ids == tower.eos_token_id).int()
        return ends.argmax(-1, keepdim=True)


@hosts.register("transformers.models.siglip.modeling_siglip.SiglipTextModel")
@hosts.register("transformers.models.siglip2.modeling_siglip2.Siglip2TextModel")
class SiglipTextHost(_ClipLikeTextHost):
    """Host of SigLIP's text tower, which pools its last token: mostly padding, which was trained to be attended to."""

    def summary_position(self, tower: SiglipTextModel | Siglip2TextModel, input_ids: Tensor) -> int:
        return input_ids.shape[1] - 1

    def pooled(self, tower: SiglipTextModel | Siglip2TextModel, pooled: Tensor) -> Tensor:
        return tower.head(pooled)


@hosts.register("transformers.models.clip.modeling_clip.CLIPModel")
@hosts.register("transformers.models.siglip.modeling_siglip.SiglipModel")
@hosts.register("transformers.models.siglip2.modeling_siglip2.Siglip2Model")
class TwoTowersComposite(TransformersComposite):
    """Composite of CLIP's and SigLIP's models."""

    names: ClassVar = {"image": "vision_model", "text": "text_model"}

    def head_macs(self, model: nn.Module) -> float:
        projections = [getattr(model, name, nn.Identity()) for name in ("visual_projection", "text_projection")]
        return sum(map(linear_macs, projections))

    def projections(self, model: Any) -> dict[str, TokenProjection]:
        return image_projection(
            getattr(model.vision_model, "post_layernorm", None), getattr(model, "visual_projection", None)
        )


def _pool(head: Any, tokens: PackedTokens) -> Tensor:
    """The head over the tokens of each instance, [batch, dim]."""
    if tokens.keep_prob is not None:
        return _pool_soft(head, tokens)
    if tokens.layout.is_uniform:
        return head(tokens.unpack()[0])
    return torch.cat([head(x.unsqueeze(0)) for x in tokens.x.split(tokens.layout.lengths)])


def _pool_soft(head: Any, tokens: PackedTokens) -> Tensor:
    """The head, step by step, on tokens that are kept in part: [batch, dim]. It has no argument for their bias."""
    x, bias = tokens.unpack()[0], padded_bias(tokens)
    assert bias is not None
    # [batch * heads, 1, longest]
    biases = bias[:, None].repeat_interleave(head.attention.num_heads, 0)
    pooled = head.attention(head.probe.repeat(x.shape[0], 1, 1), x, x, attn_mask=biases)[0]
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
