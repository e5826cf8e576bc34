"""Hosts of timm's VisionTransformer and Eva families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from ..core import segments
from ..core.checks import check_images
from ..core.tokens import PackedTokens
from ..layers.block_spec import BlockSpec
from ..registry import hosts
from .base import Host
from .ops import by_tiles, check_blocks, drop_path, is_affine, weighted_mean
from .pruned_timm import PrunedTimm
from .soft import padded_bias, refuse_parts

_POOLS = ("", "token", "avg", "max", "avgmax", "map")


class _TimmHost(Host):
    """What the two families have in common: blocks with `attn`, `mlp` and two norms, prefix tokens, pooling, head."""

    encoder = PrunedTimm
    known: ClassVar[Mapping[type, Sequence[type]]] = {}

    def check(self, tower: Any) -> None:
        check_blocks(tower, tower.blocks, self.known)
        if tower.global_pool not in _POOLS:
            raise ValueError(f"cannot prune a tower with global_pool={tower.global_pool!r}: supported are {_POOLS}")

    def blocks(self, tower: Any) -> Sequence[nn.Module]:
        return tower.blocks

    def spec(self, tower: Any, depth: int, name: str) -> BlockSpec:
        has_summary = tower.cls_token is not None
        return BlockSpec(
            name, depth, len(tower.blocks), tower.embed_dim, tower.blocks[depth].attn.num_heads, has_summary
        )

    def scale(self, block: Any) -> float:
        return block.attn.scale

    def attention_dropout(self, block: Any) -> float:
        return block.attn.attn_drop.p if block.training else 0.0

    def projects_affinely(self, block: Any) -> bool:
        attn = block.attn
        pre_norm = type(block) in (Block, EvaBlock)
        return pre_norm and attn.gate is None and is_affine(attn.norm) and is_affine(attn.proj)

    def head(self, tower: Any, tokens: PackedTokens, block_inputs: tuple[Any, ...]) -> Tensor:
        tokens = tokens.with_x(tower.norm(tokens.x))
        if tower.global_pool == "" and tower.attn_pool is None:
            return tokens.with_x(tower.head(tower.head_drop(tower.fc_norm(tokens.x)))).unpack()[0]
        return tower.head(tower.head_drop(tower.fc_norm(_pool(tower, tokens))))

    def pools_free(self, tower: Any) -> bool:
        unpooled = tower.attn_pool is None and tower.global_pool in ("", "token")
        return not unpooled and not _pools_prefix(tower)

    def _pack(self, tower: Any, x: Tensor) -> PackedTokens:
        place = torch.arange(x.shape[1], device=x.device)
        summary = place == 0 if tower.cls_token is not None else None
        return PackedTokens.pack(x, protected=place < tower.num_prefix_tokens, summary=summary)

    def _check_images(self, tower: Any, images: Tensor) -> None:
        embed = tower.patch_embed
        check_images(images, tower.in_chans, embed.img_size if getattr(embed, "strict_img_size", False) else None)


@hosts.register("timm.models.vision_transformer.VisionTransformer")
class Vit(_TimmHost):
    """VisionTransformer of `Block` or `ResPostBlock`: qk-norm, LayerScale, registers, any pooling, DINOv2, SigLIP, CLIP."""

    known: ClassVar = {Block: (Attention,), ResPostBlock: (Attention,)}

    def embed(self, tower: Any, images: Tensor) -> tuple[PackedTokens, tuple[Any, ...]]:
        self._check_images(tower, images)
        x = tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(images))))
        return self._pack(tower, x), (None,) * len(tower.blocks)

    def qkv(self, block: Any, tokens: PackedTokens, block_input: None) -> tuple[Tensor, Tensor, Tensor]:
        attn = block.attn
        x = block.norm1(tokens.x) if type(block) is Block else tokens.x
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(1)
        return attn.q_norm(q), attn.k_norm(k), v

    def project(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        attn = block.attn
        context = attn.norm(context.flatten(1))
        if attn.gate is not None:
            context = context * attn.gate(block.norm1(tokens.x) if type(block) is Block else tokens.x).sigmoid()
        branch = attn.proj_drop(attn.proj(context))
        branch = block.ls1(branch) if type(block) is Block else block.norm1(branch)
        return tokens.with_x(tokens.x + drop_path(block.drop_path1, branch, tokens.layout))

    def feed_forward(self, block: Any, tokens: PackedTokens, block_input: None) -> PackedTokens:
        if type(block) is Block:
            branch = by_tiles(lambda x: block.ls2(block.mlp(block.norm2(x))), tokens.x)
        else:
            branch = by_tiles(lambda x: block.norm2(block.mlp(x)), tokens.x)
        return tokens.with_x(tokens.x + drop_path(block.drop_path2, branch, tokens.layout))


@hosts.register("timm.models.eva.Eva")
class EvaVit(_TimmHost):
    """Eva: EVA-02, RoPE ViTs, Perception Encoder, DINOv3. Rotary tables are looked up by a token's original position."""

    known: ClassVar = {EvaBlock: (EvaAttention, AttentionRope), EvaBlockPostNorm: (EvaAttention, AttentionRope)}

    def embed(self, tower: Any, images: Tensor) -> tuple[PackedTokens, tuple[Any, ...]]:
        self._check_images(tower, images)
        if tower.patch_drop is not None and tower.training:
            raise ValueError(
                "cannot prune while patch_drop_rate drops patches too: build the tower with patch_drop_rate=0"
            )
        x, rope = tower._pos_embed(tower.patch_embed(images))
        tables = (
            tuple(rope) if getattr(tower, "rope_mixed", False) and rope is not None else (rope,) * len(tower.blocks)
        )
        return self._pack(tower, tower.norm_pre(x)), tables

    def qkv(self, block: Any, tokens: PackedTokens, block_input: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        attn = block.attn
        x = block.norm1(tokens.x) if type(block) is EvaBlock else tokens.x
        q, k, v = self._project(attn, x)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if block_input is None:
            return q, k, v
        return _rotate(attn, q, tokens, block_input).type_as(v), _rotate(attn, k, tokens, block_input).type_as(v), v

    def _project(self, attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (attn.num_heads, attn.head_dim)
        if attn.qkv is None:
            groups = getattr(attn, "num_kv_groups", 1)
            k, v = (
                p(x).unflatten(-1, (-1, attn.head_dim)).repeat_interleave(groups, 1) for p in (attn.k_proj, attn.v_proj)
            )
            return attn.q_proj(x).unflatten(-1, heads), k, v
        q, k, v = _fused(attn, x).unflatten(-1, (3, *heads)).unbind(1)
        return q, k, v

    def project(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        attn, pre_norm = block.attn, type(block) is EvaBlock
        context = attn.norm(context.flatten(1))
        if attn.gate is not None:
            context = context * attn.gate(block.norm1(tokens.x) if pre_norm else tokens.x).sigmoid()
        branch = attn.proj_drop(attn.proj(context))
        if not pre_norm:
            branch = block.norm1(branch)
        elif block.gamma_1 is not None:
            branch = block.gamma_1 * branch
        return tokens.with_x(tokens.x + drop_path(block.drop_path1, branch, tokens.layout))

    def feed_forward(self, block: Any, tokens: PackedTokens, block_input: Tensor | None) -> PackedTokens:
        if type(block) is not EvaBlock:
            branch = by_tiles(lambda x: block.norm2(block.mlp(x)), tokens.x)
        elif block.gamma_2 is None:
            branch = by_tiles(lambda x: block.mlp(block.norm2(x)), tokens.x)
        else:
            branch = by_tiles(lambda x: block.gamma_2 * block.mlp(block.norm2(x)), tokens.x)
        return tokens.with_x(tokens.x + drop_path(block.drop_path2, branch, tokens.layout))


def _fused(attn: Any, x: Tensor) -> Tensor:
    """Query, key and value as one projection of x [total, dim]: [total, 3 * heads * head_dim].

    With biases of its own, EvaAttention reads the weight of `qkv` and never calls it, so that what is hooked or adapted to
    `qkv` is without effect in timm. It is here too, for a pruned tower to be its host; a `qkv` that has no weight to read,
    at which timm fails, is called.
    """
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    weight = getattr(attn.qkv, "weight", None)
    if attn.qkv_bias_separate or not isinstance(weight, Tensor):
        return attn.qkv(x) + bias
    return F.linear(x, weight, bias)


def _rotate(attn: Any, x: Tensor, tokens: PackedTokens, table: Tensor) -> Tensor:
    """Rotary embedding of x [total, heads, head_dim] by original position; prefix tokens stay unturned.

    table [patches, 2 * head_dim], or [heads, patches, ...] where heads have tables of their own.
    """
    prefix = tokens.position < attn.num_prefix_tokens
    row = (tokens.position - attn.num_prefix_tokens).clamp(min=0)
    here = table.index_select(-2, row)
    here = here[:, None] if here.dim() == 2 else here.transpose(0, 1)
    turned = apply_rot_embed_cat(x, here, half=getattr(attn, "rotate_half", False))
    return torch.where(prefix[:, None, None], x, turned)


def _pools_prefix(tower: Any) -> bool:
    """Whether the pooling sees prefix tokens: as the tower says, and, where it does not, in Eva's attention pool alone."""
    return getattr(tower, "pool_include_prefix", tower.attn_pool is not None)


def _pool(tower: Any, tokens: PackedTokens) -> Tensor:
    """The tower's pooling over what is left: [batch, dim].

    Averages weigh a merged token by how many tokens it stands for. ValueError for a maximum over tokens that are there in
    part.
    """
    kind = tower.global_pool
    if tower.attn_pool is not None:
        pooled = tokens if _pools_prefix(tower) else tokens.select(tokens.free)
        bias = padded_bias(pooled)
        pool: AttentionPoolLatent = tower.attn_pool
        return pool(pooled.unpack()[0], attn_mask=None if bias is None else bias[:, None, None])
    if kind == "token":
        assert tokens.summary is not None
        return tokens.first_where(tokens.summary)

    counted = torch.ones_like(tokens.protected) if _pools_prefix(tower) else tokens.free
    average = weighted_mean(tokens, counted)
    if kind == "avg":
        return average
    refuse_parts(tokens, f"global_pool={kind!r}", "pool by 'avg', 'token' or 'map'")
    hidden = tokens.x.masked_fill(~counted[:, None], float("-inf"))
    largest = segments.pad(hidden, tokens.layout, float("-inf")).amax(1)
    return largest if kind == "max" else (average + largest) / 2
