"""Hosts of timm's VisionTransformer and Eva."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ..core import segments
from ..core.checks import check_images
from ..core.tokens import PackedTokens
from ..layers.block_spec import BlockSpec
from ..registry import hosts
from .base import Host
from .ops import by_tiles, check_blocks, drop_path, is_affine, weighted_mean
from .pruned_timm import PrunedTimm
from .soft import padded_bias, refuse_soft_tokens

_POOLS = ("", "token", "avg", "max", "avgmax", "map")
_Tower: TypeAlias = VisionTransformer | Eva
_VitBlock: TypeAlias = Block | ResPostBlock
_EvaBlock: TypeAlias = EvaBlock | EvaBlockPostNorm
_Block: TypeAlias = _VitBlock | _EvaBlock


class _TimmHost(Host):
    """What both have: blocks with `attn`, `mlp` and two norms, prefix tokens, pooling, head."""

    pruned_class = PrunedTimm
    known: ClassVar[Mapping[type, Sequence[type]]] = {}

    def check(self, tower: _Tower) -> None:
        check_blocks(tower, tower.blocks, self.known)
        if tower.global_pool not in _POOLS:
            raise ValueError(f"cannot prune a tower with global_pool={tower.global_pool!r}: supported are {_POOLS}")

    def blocks(self, tower: Any) -> Sequence[nn.Module]:
        return tower.blocks

    def spec(self, tower: _Tower, depth: int, name: str) -> BlockSpec:
        attn: Any = tower.blocks[depth].attn
        has_summary = tower.cls_token is not None
        return BlockSpec(name, depth, len(tower.blocks), tower.embed_dim, attn.num_heads, has_summary)

    def scale(self, block: _Block) -> float:
        attn: Any = block.attn
        return attn.scale

    def attention_dropout(self, block: _Block) -> float:
        attn: Any = block.attn
        return attn.attn_drop.p if block.training else 0.0

    def projects_affinely(self, block: _Block) -> bool:
        attn: Any = block.attn
        pre_norm = type(block) in (Block, EvaBlock)
        return pre_norm and attn.gate is None and is_affine(attn.norm) and is_affine(attn.proj)

    def head(self, tower: _Tower, tokens: PackedTokens, block_inputs: tuple[object, ...]) -> Tensor:
        tokens = tokens.with_x(tower.norm(tokens.x))
        if tower.global_pool == "" and tower.attn_pool is None:
            return tokens.with_x(tower.head(tower.head_drop(tower.fc_norm(tokens.x)))).unpack()[0]
        return tower.head(tower.head_drop(tower.fc_norm(_pool(tower, tokens))))

    def pools_unprotected(self, tower: _Tower) -> bool:
        unpooled = tower.attn_pool is None and tower.global_pool in ("", "token")
        return not unpooled and not _pools_prefix(tower)

    def _pack(self, tower: _Tower, x: Tensor) -> PackedTokens:
        return PackedTokens.pack(x, protected=tower.num_prefix_tokens, summary=tower.cls_token is not None)

    def _check_images(self, tower: _Tower, images: Tensor) -> None:
        embed = tower.patch_embed
        check_images(images, tower.in_chans, embed.img_size if getattr(embed, "strict_img_size", False) else None)


@hosts.register("timm.models.vision_transformer.VisionTransformer")
class VisionTransformerHost(_TimmHost):
    """Host of VisionTransformer with `Block` or `ResPostBlock`: ViT, DeiT III, DINOv2, SigLIP, CLIP, with any pooling."""

    known: ClassVar = {Block: (Attention,), ResPostBlock: (Attention,)}

    def embed(self, tower: VisionTransformer, images: Tensor) -> tuple[PackedTokens, tuple[Any, ...]]:
        self._check_images(tower, images)
        x = tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(images))))
        return self._pack(tower, x), (None,) * len(tower.blocks)

    def qkv(self, block: _VitBlock, tokens: PackedTokens, block_input: None) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = block.attn
        x = block.norm1(tokens.x) if type(block) is Block else tokens.x
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(1)
        return attn.q_norm(q), attn.k_norm(k), v

    def project(self, block: _VitBlock, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        attn: Any = block.attn
        context = attn.norm(context.flatten(1))
        if attn.gate is not None:
            context = context * attn.gate(block.norm1(tokens.x) if type(block) is Block else tokens.x).sigmoid()
        branch = attn.proj_drop(attn.proj(context))
        branch = block.ls1(branch) if type(block) is Block else block.norm1(branch)
        return tokens.with_x(tokens.x + drop_path(block.drop_path1, branch, tokens.layout))

    def feed_forward(self, block: _VitBlock, tokens: PackedTokens, block_input: None) -> PackedTokens:
        if type(block) is Block:
            branch = by_tiles(lambda x: block.ls2(block.mlp(block.norm2(x))), tokens.x)
        else:
            branch = by_tiles(lambda x: block.norm2(block.mlp(x)), tokens.x)
        return tokens.with_x(tokens.x + drop_path(block.drop_path2, branch, tokens.layout))


@hosts.register("timm.models.eva.Eva")
class EvaHost(_TimmHost):
    """Host of Eva: EVA-02, RoPE ViTs, Perception Encoder, DINOv3. Rotary tables are indexed by original positions."""

    known: ClassVar = {EvaBlock: (EvaAttention, AttentionRope), EvaBlockPostNorm: (EvaAttention, AttentionRope)}

    def embed(self, tower: Eva, images: Tensor) -> tuple[PackedTokens, tuple[Any, ...]]:
        self._check_images(tower, images)
        if tower.patch_drop is not None and tower.training:
            raise ValueError(
                "cannot prune while patch_drop_rate drops patches too: build the tower with patch_drop_rate=0"
            )
        x, rope = tower._pos_embed(tower.patch_embed(images))
        # with mixed rotary embeddings each block has a table of its own
        is_mixed = getattr(tower, "rope_mixed", False) and rope is not None
        tables = tuple(rope) if is_mixed else (rope,) * len(tower.blocks)
        return self._pack(tower, tower.norm_pre(x)), tables

    def qkv(self, block: _EvaBlock, tokens: PackedTokens, block_input: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = block.attn
        x = block.norm1(tokens.x) if type(block) is EvaBlock else tokens.x
        q, k, v = self._project(attn, x)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if block_input is None:
            return q, k, v
        return _rotate(attn, q, tokens, block_input).type_as(v), _rotate(attn, k, tokens, block_input).type_as(v), v

    def _project(self, attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of x [total, dim], each [total, heads, head_dim]."""
        heads = (attn.num_heads, attn.head_dim)
        if attn.qkv is None:
            groups = getattr(attn, "num_kv_groups", 1)
            k, v = (proj(x).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.k_proj, attn.v_proj))
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            return attn.q_proj(x).unflatten(-1, heads), k, v
        q, k, v = _fused(attn, x).unflatten(-1, (3, *heads)).unbind(1)
        return q, k, v

    def project(self, block: _EvaBlock, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        attn: Any = block.attn
        pre_norm = type(block) is EvaBlock
        context = attn.norm(context.flatten(1))
        if attn.gate is not None:
            context = context * attn.gate(block.norm1(tokens.x) if pre_norm else tokens.x).sigmoid()
        branch = attn.proj_drop(attn.proj(context))
        if not pre_norm:
            branch = block.norm1(branch)
        elif block.gamma_1 is not None:
            branch = block.gamma_1 * branch
        return tokens.with_x(tokens.x + drop_path(block.drop_path1, branch, tokens.layout))

    def feed_forward(self, block: _EvaBlock, tokens: PackedTokens, block_input: Tensor | None) -> PackedTokens:
        if type(block) is not EvaBlock:
            branch = by_tiles(lambda x: block.norm2(block.mlp(x)), tokens.x)
        elif block.gamma_2 is None:
            branch = by_tiles(lambda x: block.mlp(block.norm2(x)), tokens.x)
        else:
            branch = by_tiles(lambda x: block.gamma_2 * block.mlp(block.norm2(x)), tokens.x)
        return tokens.with_x(tokens.x + drop_path(block.drop_path2, branch, tokens.layout))


def _fused(attn: Any, x: Tensor) -> Tensor:
    """Query, key and value as one projection of x [total, dim]: [total, 3 * heads * head_dim].

    With biases of its own, EvaAttention uses the weight of `qkv` and never calls it: hooks and adapters on `qkv` have no effect
    in timm, and so none here. A `qkv` without a weight, at which timm fails, is called.
    """
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    weight = getattr(attn.qkv, "weight", None)
    if attn.qkv_bias_separate or not isinstance(weight, Tensor):
        return attn.qkv(x) + bias
    return F.linear(x, weight, bias)


def _rotate(attn: EvaAttention | AttentionRope, x: Tensor, tokens: PackedTokens, table: Tensor) -> Tensor:
    """Rotary embedding of x [total, heads, head_dim] by original position; prefix tokens are not rotated.

    table [patches, 2 * head_dim], or [heads, patches, ...] where heads have tables of their own.
    """
    prefix = tokens.position < attn.num_prefix_tokens
    row = (tokens.position - attn.num_prefix_tokens).clamp(min=0)
    angles = table.index_select(-2, row)
    angles = angles[:, None] if angles.dim() == 2 else angles.transpose(0, 1)
    rotated = apply_rot_embed_cat(x, angles, half=getattr(attn, "rotate_half", False))
    return torch.where(prefix[:, None, None], x, rotated)


def _pools_prefix(tower: _Tower) -> bool:
    """Whether the pooling includes prefix tokens: as the tower says; where it does not, only in Eva's attention pool."""
    return getattr(tower, "pool_include_prefix", tower.attn_pool is not None)


def _pool(tower: _Tower, tokens: PackedTokens) -> Tensor:
    """The tower's pooling over the kept tokens: [batch, dim].

    Averages weigh a merged token by how many tokens it stands for. ValueError for a maximum over tokens that are kept in part.
    """
    kind = tower.global_pool
    if tower.attn_pool is not None:
        pooled = tokens if _pools_prefix(tower) else tokens.select(tokens.free)
        bias = padded_bias(pooled)
        return tower.attn_pool(pooled.unpack()[0], attn_mask=None if bias is None else bias[:, None, None])
    if kind == "token":
        return tokens.summaries()

    counted = torch.ones_like(tokens.protected) if _pools_prefix(tower) else tokens.free
    average = weighted_mean(tokens, counted)
    if kind == "avg":
        return average
    refuse_soft_tokens(tokens, f"global_pool={kind!r}", "pool by 'avg', 'token' or 'map'")
    hidden = tokens.x.masked_fill(~counted[:, None], float("-inf"))
    largest = segments.pad(hidden, tokens.layout, float("-inf")).amax(1)
    return largest if kind == "max" else (average + largest) / 2
