"""Hosts of open_clip's towers, and composites of its CLIP models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
)
from torch import Tensor, nn

from ..core.checks import check_ids, check_images, is_recorded
from ..core.tokens import PackedTokens
from ..layers.block_spec import BlockSpec
from ..layers.guides.base import TokenProjection
from ..registry import hosts
from .base import Composite, Host
from .composites import ImageAndText
from .find import find_host
from .graft import with_submodule
from .ops import by_tiles, check_blocks, is_affine, token_projection, weighted_mean
from .pruned_open_clip import PrunedClip, PrunedClipOwnText, PrunedClipText, PrunedClipVision, PrunedTimmModel
from .refusals import dotted
from .soft import refuse_soft_tokens
from .wrapper import WrapperHost

_KNOWN = {ResidualAttentionBlock: (nn.MultiheadAttention,), CustomResidualAttentionBlock: (Attention,)}
_ATTENTIONS = (nn.MultiheadAttention, Attention)
_Block: TypeAlias = ResidualAttentionBlock | CustomResidualAttentionBlock
_TextTower: TypeAlias = TextTransformer | CLIP
_Tower: TypeAlias = VisionTransformer | _TextTower


class _ClipHost(Host):
    """What image and text towers have in common: residual attention blocks, with either of open_clip's attention modules."""

    def check(self, tower: _Tower) -> None:
        check_blocks(tower, self.blocks(tower), _KNOWN)
        if any(getattr(block.attn, "scaled_cosine", False) for block in tower.transformer.resblocks):
            raise TypeError(f"cannot prune this {type(tower).__name__}: scaled cosine attention is not supported")

    def blocks(self, tower: Any) -> Sequence[nn.Module]:
        return tower.transformer.resblocks

    def scale(self, block: _Block) -> float:
        return block.attn.head_dim**-0.5

    def qkv(self, block: Any, tokens: PackedTokens, block_input: None) -> tuple[Tensor, Tensor, Tensor]:
        attn = block.attn
        if type(attn) not in _ATTENTIONS:
            raise TypeError(
                f"cannot prune with a {dotted(type(attn))} around attention: torch's attention uses its weights and calls no "
                "projection, so that an adapter would have no effect here. Merge it, or adapt the MLPs (c_fc, c_proj)"
            )
        x = F.linear(block.ln_1(tokens.x), attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = x.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(1)
        return (q, k, v) if type(attn) is nn.MultiheadAttention else (attn.ln_q(q), attn.ln_k(k), v)

    def project(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        attn = block.attn
        if type(attn) is nn.MultiheadAttention:
            branch = _out_projection(attn.out_proj, context.flatten(1))
        else:
            context = context if attn.head_scale is None else context * attn.head_scale[..., 0]
            branch = block.ln_attn(attn.out_drop(attn.out_proj(attn.ln_inner(context.flatten(1)))))
        return tokens.with_x(tokens.x + block.ls_1(branch))

    def feed_forward(self, block: _Block, tokens: PackedTokens, block_input: None) -> PackedTokens:
        return tokens.with_x(tokens.x + by_tiles(lambda x: block.ls_2(block.mlp(block.ln_2(x))), tokens.x))

    def projects_affinely(self, block: Any) -> bool:
        attn = block.attn
        if type(attn) is nn.MultiheadAttention:
            # then only its weight is used, whatever is hooked to it
            return isinstance(getattr(attn.out_proj, "weight", None), Tensor)
        return all(map(is_affine, (attn.ln_inner, attn.out_proj, block.ln_attn)))

    def gradient_checkpointing(self, tower: _Tower) -> bool:
        return tower.transformer.grad_checkpointing

    def attention_dropout(self, block: Any) -> float:
        dropout = block.attn.dropout if type(block.attn) is nn.MultiheadAttention else block.attn.attn_drop.p
        return dropout if block.training else 0.0


@hosts.register("open_clip.transformer.VisionTransformer")
class VisionTransformerHost(_ClipHost):
    """Host of open_clip's VisionTransformer. Its class token is protected."""

    pruned_class = PrunedClipVision

    def spec(self, tower: VisionTransformer, depth: int, name: str) -> BlockSpec:
        blocks = self.blocks(tower)
        block: Any = blocks[depth]
        return BlockSpec(name, depth, len(blocks), tower.transformer.width, block.attn.num_heads, has_summary=True)

    def embed(self, tower: Any, images: Tensor) -> tuple[PackedTokens, tuple[None, ...]]:
        # None where an adapter wraps it
        channels = getattr(tower.conv1, "in_channels", None)
        check_images(images, channels, tower.image_size)
        x = tower._embeds(images)
        return PackedTokens.pack(x, protected=1, summary=True), (None,) * len(tower.transformer.resblocks)

    def projection(self, tower: VisionTransformer) -> TokenProjection | None:
        return token_projection(tower.ln_post, tower.proj) if tower.attn_pool is None else None

    def pools_unprotected(self, tower: VisionTransformer) -> bool:
        return tower.attn_pool is None and tower.pool_type == "avg"

    def head(
        self, tower: VisionTransformer, tokens: PackedTokens, block_inputs: tuple[object, ...]
    ) -> Tensor | tuple[Tensor, Tensor]:
        pooled, rest = _pool(tower, tokens)
        if tower.proj is not None:
            pooled = pooled @ tower.proj
        return (pooled, rest) if tower.output_tokens else pooled


class _TextHost(_ClipHost):
    """What text towers have in common, causal or not. The pooled token is protected: it is the sentence's summary.

    In a causal tower tokens behind the pooled one cannot reach it, so the padding there never enters. A tower without a causal
    mask treats padding as its weights were trained: as tokens, or, with `use_pad_mask`, not at all.
    """

    tower = "text"

    def causal(self, tower: _TextTower) -> bool:
        return tower.attn_mask is not None

    def spec(self, tower: _TextTower, depth: int, name: str) -> BlockSpec:
        blocks, width = self.blocks(tower), tower.transformer.width
        block: Any = blocks[depth]
        return BlockSpec(
            name, depth, len(blocks), width, block.attn.num_heads, has_summary=True, causal=self.causal(tower)
        )

    def embed(self, tower: Any, text: Tensor) -> tuple[PackedTokens, tuple[None, ...]]:
        check_ids(text, tower.vocab_size, len(tower.positional_embedding), "text")
        first: Any = self.blocks(tower)[0]
        # open_clip asks the MLP, which may be quantized or adapted
        dtype = first.attn.in_proj_weight.dtype
        x = tower.token_embedding(text).to(dtype) + tower.positional_embedding[: text.shape[1]].to(dtype)
        position = torch.arange(text.shape[1], device=text.device)
        pooled = self.pooled_position(tower, text)[:, None]

        valid = self.valid(tower, text, position, pooled)
        is_pooled = position == pooled
        tokens = PackedTokens.pack(x, valid, protected=is_pooled, summary=is_pooled, number_protected=1)
        return tokens, (None,) * len(tower.transformer.resblocks)

    def valid(self, tower: Any, text: Tensor, position: Tensor, pooled: Tensor) -> Tensor | None:
        """Which tokens enter the blocks.

        Args:
            tower: The dense tower.
            text: Token ids [batch, length].
            position: Positions [length] int64.
            pooled: Position of the pooled token [batch, 1].

        Returns:
            [batch, length] bool; None for all.

        Raises:
            ValueError: With `use_pad_mask`, for a sentence whose pooled token is padding.
        """
        if self.causal(tower):
            return None if getattr(tower, "output_tokens", False) else position <= pooled
        if not getattr(tower, "use_pad_mask", False):
            return None
        real = text != tower.pad_id
        if not is_recorded() and not real.gather(1, pooled).all():
            raise ValueError(
                f"text: the pooled token ({tower.pool_type!r}) of a sentence is padding (id {tower.pad_id})"
            )
        return real

    def padded_length(self, tokens: PackedTokens, *inputs: Any) -> int:
        return inputs[0].shape[1]

    def head(
        self, tower: Any, tokens: PackedTokens, block_inputs: tuple[object, ...]
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens = tokens.with_x(tower.ln_final(tokens.x))
        pooled = tokens.summaries()
        projection = tower.text_projection
        if projection is not None:
            pooled = pooled @ projection if isinstance(projection, Tensor) else projection(pooled)
        return (pooled, tokens.unpack()[0]) if getattr(tower, "output_tokens", False) else pooled

    def pooled_position(self, tower: _TextTower, text: Tensor) -> Tensor:
        """The position of each sentence's pooled token.

        Args:
            tower: The dense tower.
            text: Token ids [batch, length].

        Returns:
            [batch] int64.
        """
        kind, eos = self.pooling(tower)
        if kind == "argmax":
            return text.argmax(1)
        if kind == "eos":
            return (text == eos).int().argmax(1)
        return text.new_full((text.shape[0],), 0 if kind == "first" else text.shape[1] - 1)

    def pooling(self, tower: Any) -> tuple[str, int]:
        """The kind of pooling, and the id of the end of text."""
        return tower.pool_type, tower.eos_id


@hosts.register("open_clip.transformer.TextTransformer")
class TextTransformerHost(_TextHost):
    """Host of open_clip's TextTransformer."""

    pruned_class = PrunedClipText

    def check(self, tower: TextTransformer) -> None:
        super().check(tower)
        if tower.cls_emb is not None or tower.pool_type == "none":
            raise TypeError(
                "cannot prune a TextTransformer with embed_cls (CoCa) or pool_type='none': they are not supported"
            )


class ClipTextHost(_TextHost):
    """Host of the text tower of open_clip's CLIP, which is the model itself."""

    pruned_class = PrunedClipOwnText

    def pooling(self, tower: Any) -> tuple[str, int]:
        return tower.text_pool_type, tower.text_eos_id


@hosts.register("open_clip.timm_model.TimmModel")
class TimmModelHost(WrapperHost):
    """Host of open_clip's TimmModel: a trunk of timm, run by its own host, and a projection."""

    name: ClassVar = "trunk"
    pruned_class = PrunedTimmModel

    def head(self, tower: TimmModel, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> Tensor:
        return tower.head(self.inner.head(tower.trunk, tokens, block_inputs))


@hosts.register("open_clip.model.CustomTextCLIP")
class CustomTextClipComposite(ImageAndText):
    """Composite of open_clip's CustomTextCLIP."""


@hosts.register("open_clip.model.CLIP")
class ClipComposite(Composite):
    """Composite of open_clip's CLIP, whose text tower is the model itself."""

    def towers(self, model: CLIP) -> dict[str, tuple[nn.Module, Host]]:
        text = ClipTextHost()
        text.check(model)
        return {"image": (model.visual, find_host(model.visual)), "text": (model, text)}

    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        pruned = PrunedClip.__new__(PrunedClip)
        pruned.__dict__.update(with_submodule(model, "visual", towers["image"]).__dict__)
        pruned._modules["text"] = towers["text"]
        return pruned


def _out_projection(projection: Any, x: Tensor) -> Tensor:
    """The output projection of torch's MultiheadAttention, x [total, dim].

    torch uses its weight and does not call it: hooks and adapters on it have no effect there, and so none here. A projection
    without a weight, at which torch fails, is called.
    """
    weight = getattr(projection, "weight", None)
    return F.linear(x, weight, projection.bias) if isinstance(weight, Tensor) else projection(x)


def _pool(tower: VisionTransformer, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    """The tower's own pooling: pooled [batch, dim], and its other tokens, padded with zeros.

    Averages weigh a merged token by how many tokens it stands for; the rest is the tower's, instance by instance. ValueError
    for an attention pool over tokens that are kept in part.
    """
    if tower.attn_pool is not None:
        refuse_soft_tokens(tokens, "open_clip's attention pool", "build the tower with attentional_pool=False")
    if tokens.layout.is_uniform:
        pooled, rest = tower._pool(tokens.unpack()[0])
    else:
        each = [tower._pool(x.unsqueeze(0)) for x in tokens.x.split(tokens.layout.lengths)]
        pooled = torch.cat([one for one, _ in each]) if tower.pool_type != "none" else _padded([p for p, _ in each])
        rest = _padded([rest for _, rest in each])
    if tower.attn_pool is None and tower.pool_type == "avg" and (tokens.size, tokens.keep_prob) != (None, None):
        after = tower.final_ln_after_pool
        normed = tokens if after else tokens.with_x(tower.ln_post(tokens.x))
        pooled = weighted_mean(normed, normed.free)
        pooled = tower.ln_post(pooled) if after else pooled
    return pooled, rest


def _padded(rows: list[Tensor]) -> Tensor:
    """[1, n, dim] each -> [batch, longest, dim]."""
    return nn.utils.rnn.pad_sequence([row.squeeze(0) for row in rows], batch_first=True)
