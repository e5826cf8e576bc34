"""Hosts of this library's BLIP, whose text tower cross-attends to the packed tokens of the image tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.attention import attend
from ..core.checks import is_recorded
from ..core.layout import Layout
from ..core.tokens import PackedTokens
from ..layers.block_spec import BlockSpec
from ..layers.guides.base import TokenProjection
from ..models.blip import BlipVision
from ..models.caption import BlipCaption
from ..models.decoder import DecoderCache, MedDecoder
from ..models.med import Attention, MedEncoder, MedLayer
from ..pruning.decode_stats import DecodeStats
from ..pruning.trace import report_decode_stats
from ..registry import hosts
from .base import Host
from .caption_alignment import CaptionAlignment
from .composites import ImageAndText
from .decoder import WithDecoder
from .linear_maps import linear_macs
from .ops import image_projection
from .timm import VisionTransformerHost

# for each image of a sentence its tokens, one instance a group
Memory = tuple[PackedTokens, ...]


@hosts.register("vltprune.models.blip.BlipVision")
class BlipVisionHost(VisionTransformerHost):
    """Host of BLIP's image tower. It returns normed tokens packed, for cross-attention."""

    def head(self, tower: BlipVision, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> PackedTokens:
        return tokens.with_x(tower.norm(tokens.x))


@hosts.register("vltprune.models.med.MedEncoder")
class MedHost(Host):
    """Host of BLIP's text tower. The first token (CLS or ENC) is protected; padding never enters.

    It returns hidden states of the kept tokens [batch, longest, width], in their order, and zeros behind them.
    """

    tower = "text"

    def blocks(self, tower: MedEncoder) -> Sequence[nn.Module]:
        return tower.layers

    def spec(self, tower: MedEncoder, depth: int, name: str) -> BlockSpec:
        heads = tower.layers[depth].attention.heads
        return BlockSpec(name, depth, len(tower.layers), tower.width, heads, has_summary=True)

    def embed(
        self,
        tower: MedEncoder,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: Tensor | PackedTokens | None = None,
    ) -> tuple[PackedTokens, tuple[Memory | None, ...]]:
        x = tower.embed(input_ids)
        valid = None if attention_mask is None else attention_mask.bool()
        if valid is not None and not is_recorded() and not valid[:, 0].all():
            raise ValueError(
                "attention_mask hides the first token of a sentence, which summarizes it: pad on the right"
            )
        tokens = PackedTokens.pack(x, valid, protected=1, summary=True)

        if memory is None:
            return tokens, (None,) * len(tower.layers)
        packed = memory if isinstance(memory, PackedTokens) else PackedTokens.pack(memory)
        tower.check_memory(input_ids.shape[0], packed.layout.batch)
        return tokens, (_by_image(packed, tower.images),) * len(tower.layers)

    def padded_length(self, tokens: PackedTokens, *inputs: Any) -> int:
        return inputs[0].shape[1]

    def qkv(self, block: MedLayer, tokens: PackedTokens, block_input: Memory | None) -> tuple[Tensor, Tensor, Tensor]:
        return _project(block.attention, tokens.x, tokens.x)

    def scale(self, block: MedLayer) -> float:
        return _scale(block.attention)

    def project(self, block: MedLayer, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        branch = block.dropout(block.attention.output(context.flatten(1)))
        return tokens.with_x(block.attention_norm(tokens.x + branch))

    def feed_forward(self, block: MedLayer, tokens: PackedTokens, block_input: Memory | None) -> PackedTokens:
        if block_input is not None and block.cross is not None:
            outputs = [
                _cross_attend(stream, tokens, view)
                for stream, view in zip(block.cross.streams, block_input, strict=True)
            ]
            branch = block.dropout(block.cross.combine(outputs))
            tokens = tokens.with_x(block.cross.norm(tokens.x + branch))
        return tokens.with_x(block.feed_forward(tokens.x))

    def head(self, tower: MedEncoder, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> Tensor:
        return tokens.unpack()[0]


@hosts.register("vltprune.models.med.QuestionEncoder")
class QuestionHost(MedHost):
    """Host of the encoder of a question. It returns its tokens packed, for a decoder to attend to."""

    def head(self, tower: MedEncoder, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> PackedTokens:
        return tokens


@hosts.register("vltprune.models.blip.Blip")
@hosts.register("vltprune.models.blip.BlipNlvr")
@hosts.register("vltprune.models.retrieval.BlipRetrieval")
class BlipComposite(ImageAndText):
    """Composite of BLIP's image and text tower."""

    def head_macs(self, model: nn.Module) -> float:
        return linear_macs(model.get_submodule("head"))

    def projections(self, model: Any) -> dict[str, TokenProjection]:
        return image_projection(model.visual.norm, getattr(model, "image_projection", None))


class _DecoderComposite(WithDecoder):
    """Composite with a `MedDecoder`."""

    decoder = "decoder"

    def cross_attentions(self, decoder: MedDecoder) -> Sequence[Attention]:
        return [layer.cross.streams[0] for layer in decoder.body.layers if layer.cross is not None]

    def cross_width(self, cross: Attention) -> int:
        return cross.heads * cross.head_dim

    def lm_head_macs(self, decoder: MedDecoder) -> float:
        return linear_macs(decoder.transform) + decoder.body.vocab_size * decoder.body.width

    def body(self, decoder: MedDecoder) -> MedEncoder:
        return decoder.body

    def add_hooks(self, decoder: MedDecoder) -> None:
        decoder.register_forward_hook(_record_tokens)


@hosts.register("vltprune.models.vqa.BlipVqa")
class VqaComposite(_DecoderComposite, ImageAndText):
    """Composite of image and question. The decoder of answers attends to the kept tokens of the question."""


@hosts.register("vltprune.models.caption.BlipCaption")
class CaptionComposite(_DecoderComposite):
    """Composite of the image tower alone. The decoder of captions attends to its kept tokens; a guide aligns it in training."""

    names: ClassVar = {"image": "visual"}

    def guide_specs(self, model: BlipCaption) -> dict[str, BlockSpec]:
        body = model.decoder.body
        heads = body.layers[0].attention.heads
        return {"text": BlockSpec("text", 0, len(body.layers), body.width, heads, has_summary=True, causal=True)}

    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        assembled: Any = super().assemble(model, towers)
        guide: Any = towers["image"].guide
        if guide is not None:
            CaptionAlignment(assembled.decoder, guide)
        return assembled


def _record_tokens(decoder: MedDecoder, args: tuple[Any, ...], out: tuple[Tensor, DecoderCache]) -> None:
    """Hook of a `MedDecoder`, after logits [rows, n, vocab_size] of all its new tokens."""
    logits, cache = out
    tokens = logits.shape[0] * logits.shape[1]
    report_decode_stats(DecodeStats(tokens, words=tokens, pairs=tokens * cache.length))


def _by_image(memory: PackedTokens, images: int) -> Memory:
    """Split packed memory, image after image of each group, into one PackedTokens per image of a sentence."""
    if images == 1:
        return (memory,)
    which = memory.layout.instance % images
    views = []
    for image in range(images):
        layout = Layout(memory.layout.lengths[image::images], memory.layout.device)
        rows = (which == image).nonzero().squeeze(1)
        views.append(memory.take(rows, layout))
    return tuple(views)


def _cross_attend(stream: Attention, tokens: PackedTokens, view: PackedTokens) -> Tensor:
    """Cross-attention of the sentences to one image of their group: [total, width]."""
    q, k, v = _project(stream, tokens.x, view.x)
    # consecutive sentences of one group share its keys
    grouped = tokens.layout.grouped(view.layout.batch)
    context = attend(q, k, v, grouped, _scale(stream), key_layout=view.layout, key_bias=view.bias)
    return stream.output(context.flatten(1))


def _project(attention: Attention, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query of x, key and value of memory, each [total, heads, head_dim]."""
    heads = (attention.heads, -1)
    q, k, v = attention.query(x), attention.key(memory), attention.value(memory)
    return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)


def _scale(attention: Attention) -> float:
    return attention.head_dim**-0.5
