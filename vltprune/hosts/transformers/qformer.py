"""Hosts of BLIP-2 and InstructBLIP of transformers: the image tower, and composites whose Q-Former attends to it.

The kept tokens of an image go to the Q-Former padded, as in BLIP, and a row of zeros is padding. The Q-Former makes as many
queries of them as of all tokens. So the language model runs as it is, and `forward` and `generate` are the dense model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention, Blip2EncoderLayer
from transformers.models.instructblip.modeling_instructblip import InstructBlipAttention, InstructBlipEncoderLayer
from transformers.models.instructblipvideo.modeling_instructblipvideo import (
    InstructBlipVideoAttention,
    InstructBlipVideoEncoderLayer,
)

from ...core.checks import is_recorded
from ...core.tokens import PackedTokens
from ...pruning.decode_stats import DecodeStats
from ...registry import hosts
from ..base import Host
from ..graft import copy_modules, with_submodule
from ..soft import refuse_soft_tokens
from .base import TransformersComposite
from .blip import BlipVisionHost, occupied
from .qformer_cost import PartCost, PartStats, add_hooks, measure_parts
from .vlm.visual_rows import check_count

# what stands behind the image tower
_BEHIND = ("qformer", "language_projection", "language_model", "vision_projection", "text_projection", "itm_head")
# those that can hide padding from cross-attention
_KERNELS = ("eager", "sdpa", "flex_attention")


@hosts.register("transformers.models.blip_2.modeling_blip_2.Blip2VisionModel")
@hosts.register("transformers.models.instructblip.modeling_instructblip.InstructBlipVisionModel")
@hosts.register("transformers.models.instructblipvideo.modeling_instructblipvideo.InstructBlipVideoVisionModel")
class QFormerVisionHost(BlipVisionHost):
    """Host of the image tower of BLIP-2, InstructBLIP and InstructBlipVideo, which is BLIP's."""

    dropout = "attention_dropout"
    known: ClassVar = {
        Blip2EncoderLayer: (Blip2Attention,),
        InstructBlipEncoderLayer: (InstructBlipAttention,),
        InstructBlipVideoEncoderLayer: (InstructBlipVideoAttention,),
    }

    def head(self, tower: Any, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> BaseModelOutputWithPooling:
        refuse_soft_tokens(tokens, "a Q-Former", "train with temperature=0")
        return super().head(tower, tokens, block_inputs)


@hosts.register("transformers.models.blip_2.modeling_blip_2.Blip2ForConditionalGeneration")
@hosts.register("transformers.models.blip_2.modeling_blip_2.Blip2ForImageTextRetrieval")
@hosts.register("transformers.models.blip_2.modeling_blip_2.Blip2Model")
@hosts.register("transformers.models.blip_2.modeling_blip_2.Blip2VisionModelWithProjection")
@hosts.register("transformers.models.instructblip.modeling_instructblip.InstructBlipForConditionalGeneration")
@hosts.register("transformers.models.instructblip.modeling_instructblip.InstructBlipModel")
@hosts.register(
    "transformers.models.instructblipvideo.modeling_instructblipvideo.InstructBlipVideoForConditionalGeneration"
)
@hosts.register("transformers.models.instructblipvideo.modeling_instructblipvideo.InstructBlipVideoModel")
class QFormerComposite(TransformersComposite):
    """Composite of the image tower alone; the Q-Former attends to its kept tokens."""

    names: ClassVar = {"image": "vision_model"}

    def __init__(self) -> None:
        self._costs: dict[str, PartCost] = {}

    def towers(self, model: Any) -> dict[str, tuple[nn.Module, Host]]:
        kernel = model.qformer.config._attn_implementation
        if kernel not in _KERNELS:
            raise TypeError(
                f"cannot prune this {type(model).__name__}: its Q-Former's attention implementation is {kernel!r}, which does "
                "not hide the padding of images that keep fewer tokens than others. Write "
                "model.set_attn_implementation({'qformer_config': 'sdpa'})"
            )
        return super().towers(model)

    def why_without(self, model: Any, tower: str) -> str:
        if tower != "language" or not hasattr(model, "language_model"):
            return ""
        number = model.config.num_query_tokens
        return f". Its language model reads the {number} queries of the Q-Former, whatever an image keeps"

    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        for name in _BEHIND:
            if hasattr(model, name):
                model = with_submodule(model, name, copy_modules(model.get_submodule(name)))
        model.get_submodule("qformer").register_forward_pre_hook(_hide_padding, with_kwargs=True)
        add_hooks(model)
        model = super().assemble(model, towers)
        if hasattr(model, "language_model"):
            model.register_forward_pre_hook(_check_forward, with_kwargs=True)
            # it calls no `forward`
            object.__setattr__(model, "generate", partial(_generate, model))
        return model

    def decoder_macs(self, model: nn.Module, decoded: Iterable[DecodeStats], memory: int) -> float:
        self._costs = self._costs or measure_parts(model)
        return sum(self._costs[call.part].macs(call, memory) for call in decoded if isinstance(call, PartStats))


def _check_forward(model: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Hook before a model with a language model: ValueError for placeholders that do not fit the images."""
    _check_prompts(model, **inspect.signature(model.forward).bind_partial(*args, **named).arguments)


def _generate(model: Any, *args: Any, **named: Any) -> Any:
    """The dense class' `generate`. ValueError for placeholders that do not fit the images."""
    generate = partial(type(model).generate, model)
    _check_prompts(model, **inspect.signature(generate).bind_partial(*args, **named).arguments)
    return generate(*args, **named)


def _check_prompts(
    model: Any, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, **rest: Any
) -> None:
    config, modality = model.config, "video" if hasattr(model.config, "video_token_id") else "image"
    if pixel_values is not None and input_ids is not None and not is_recorded():
        places = int((input_ids == getattr(config, f"{modality}_token_id")).sum())
        check_count(places, config.num_query_tokens * pixel_values.shape[:-3].numel(), modality)


def _hide_padding(qformer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hook before a Q-Former: hide the rows of padding in the images that its queries attend to."""
    memory, queries = named.get("encoder_hidden_states"), named["query_embeds"]
    if memory is None:
        return args, named
    # not as [batch, tokens]: BLIP-2 would take the text behind the queries for queries
    mask = create_bidirectional_mask(
        config=qformer.config,
        inputs_embeds=queries[:, : named.get("query_length")],
        attention_mask=occupied(memory),
        encoder_hidden_states=memory,
    )
    return args, {**named, "encoder_attention_mask": mask}
