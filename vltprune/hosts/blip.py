"""Hosts of our own BLIP: the image tower's packed tokens are the memory of the text tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.attention import attend
from ..core.tokens import Layout, PackedTokens
from ..layers.block_spec import BlockSpec
from ..models.decoder import DecoderCache
from ..models.med import Attention, MedEncoder, MedLayer
from ..pruning.decode_stats import DecodeStats
from ..pruning.trace import report_decode_stats
from ..registry import hosts
from .base import Host
from .composites import ImageAndText
from .decoder import WithDecoder
from .linear_maps import linear_macs
from .listening import Listener
from .timm import Vit

Memory = tuple[PackedTokens, ...]  # per image of a sentence: the tokens of that image, one instance a group


@hosts.register("vltprune.models.blip.BlipVision")
class BlipVisionHost(Vit):
    """BLIP's image tower. Its tokens go to cross-attention, and so it returns them packed, normed, however many are left."""

    def head(self, tower: Any, tokens: PackedTokens, block_inputs: tuple[Any, ...]) -> PackedTokens:
        return tokens.with_x(tower.norm(tokens.x))


@hosts.register("vltprune.models.med.MedEncoder")
class MedHost(Host):
    """BLIP's text tower. The first token (CLS or ENC) is protected; padding never enters."""

    tower = "text"

    def blocks(self, tower: Any) -> Sequence[nn.Module]:
        return tower.layers

    def spec(self, tower: Any, depth: int, name: str) -> BlockSpec:
        layer: MedLayer = tower.layers[depth]
        return BlockSpec(name, depth, len(tower.layers), tower.width, layer.attention.heads, has_summary=True)

    def embed(
        self,
        tower: MedEncoder,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: Tensor | PackedTokens | None = None,
    ) -> tuple[PackedTokens, tuple[Memory | None, ...]]:
        x = tower.embed(input_ids)
        valid = None if attention_mask is None else attention_mask.bool()
        if valid is not None and not valid[:, 0].all():
            raise ValueError(
                "attention_mask hides the first token of a sentence, which speaks for it: pad on the right"
            )
        first = torch.arange(x.shape[1], device=x.device) == 0
        tokens = PackedTokens.pack(x, valid, protected=first, summary=first)

        if memory is None:
            return tokens, (None,) * len(tower.layers)
        packed = memory if isinstance(memory, PackedTokens) else PackedTokens.pack(memory)
        tower.check_memory(len(input_ids), packed.layout.batch)
        return tokens, (_by_image(packed, tower.images),) * len(tower.layers)

    def padded_length(self, *inputs: Any) -> int:
        return inputs[0].shape[1]

    def qkv(self, block: Any, tokens: PackedTokens, block_input: Memory | None) -> tuple[Tensor, Tensor, Tensor]:
        return _project(block.attention, tokens.x, tokens.x)

    def scale(self, block: Any) -> float:
        return _scale(block.attention)

    def project(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        branch = block.dropout(block.attention.output(context.flatten(1)))
        return tokens.with_x(block.attention_norm(tokens.x + branch))

    def feed_forward(self, block: Any, tokens: PackedTokens, block_input: Memory | None) -> PackedTokens:
        if block_input is not None and block.cross is not None:
            outputs = [
                _cross_attend(stream, tokens, view)
                for stream, view in zip(block.cross.streams, block_input, strict=True)
            ]
            branch = block.dropout(block.cross.combine(outputs))
            tokens = tokens.with_x(block.cross.norm(tokens.x + branch))
        return tokens.with_x(block.feed_forward(tokens.x))

    def head(self, tower: Any, tokens: PackedTokens, block_inputs: tuple[Any, ...]) -> Tensor:
        """Hidden states of the tokens that are left, padded with zeros: [batch, longest, width], the first token first."""
        return tokens.unpack()[0]


@hosts.register("vltprune.models.med.QuestionEncoder")
class QuestionHost(MedHost):
    """The encoder of a question. A decoder looks at its tokens, and so it returns them packed, however many are left."""

    def head(self, tower: Any, tokens: PackedTokens, block_inputs: tuple[Any, ...]) -> PackedTokens:
        return tokens


@hosts.register("vltprune.models.blip.Blip")
@hosts.register("vltprune.models.blip.BlipNlvr")
@hosts.register("vltprune.models.retrieval.BlipRetrieval")
class BlipComposite(ImageAndText):
    """Both towers of BLIP under one guide."""

    def head_macs(self, model: Any) -> float:
        return linear_macs(getattr(model, "head", nn.Identity()))


class _Speaking(WithDecoder):
    """A model with a `MedDecoder`."""

    decoder = "decoder"

    def crosses(self, decoder: Any) -> Sequence[Any]:
        return [layer.cross.streams[0] for layer in self.body(decoder).layers]

    def width(self, cross: Any) -> int:
        return cross.heads * cross.head_dim

    def word_macs(self, decoder: Any) -> float:
        return linear_macs(decoder.transform) + decoder.body.vocab_size * decoder.body.width

    def body(self, decoder: Any) -> Any:
        return decoder.body

    def watch(self, decoder: nn.Module) -> None:
        decoder.register_forward_hook(_tell_tokens)


@hosts.register("vltprune.models.vqa.BlipVqa")
class VqaComposite(_Speaking, ImageAndText):
    """Image and question under one guide. The decoder of the answer looks at what is left of the question."""


@hosts.register("vltprune.models.caption.BlipCaption")
class CaptionComposite(_Speaking):
    """One tower: the decoder is not pruned, and looks at what is left of the image. The guide listens to it in training."""

    names: ClassVar = {"image": "visual"}

    def listeners(self, model: Any) -> dict[str, BlockSpec]:
        body = model.decoder.body
        heads = body.layers[0].attention.heads
        return {"text": BlockSpec("text", 0, len(body.layers), body.width, heads, has_summary=True, causal=True)}

    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        assembled: Any = super().assemble(model, towers)
        guide: Any = towers["image"].guide
        if guide is not None:
            Listener(assembled.decoder, guide)
        return assembled


def _tell_tokens(decoder: nn.Module, args: tuple[Any, ...], out: tuple[Tensor, DecoderCache]) -> None:
    """After a `MedDecoder` made logits [rows, n, vocab_size]: all its new tokens have theirs."""
    logits, cache = out
    tokens = logits.shape[0] * logits.shape[1]
    report_decode_stats(DecodeStats(tokens, words=tokens, pairs=tokens * cache.length))


def _by_image(memory: PackedTokens, images: int) -> Memory:
    """Packed memory, image after image of each group, as one PackedTokens per image of a sentence."""
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
    together = tokens.layout.grouped(view.layout.batch)  # consecutive sentences of one group share its keys
    context = attend(q, k, v, together, _scale(stream), key_layout=view.layout, key_bias=view.bias)
    return stream.output(context.flatten(1))


def _project(attention: Any, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = (attention.heads, -1)
    q, k, v = attention.query(x), attention.key(memory), attention.value(memory)
    return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)


def _scale(attention: Any) -> float:
    return attention.head_dim**-0.5
