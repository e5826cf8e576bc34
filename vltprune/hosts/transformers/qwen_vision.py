"""Hosts of the image towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed patches, of which 2 x 2 become one visual token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention, Qwen2_5_VLVisionBlock
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLVisionBlock,
    VisionAttention,
    apply_rotary_pos_emb_vision,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    BaseModelOutputWithDeepstackFeatures,
    Qwen3VLVisionAttention,
    Qwen3VLVisionBlock,
)
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from ...core.checks import check_finite
from ...core.layout import Layout
from ...core.regions import Regions
from ...core.tokens import PackedTokens
from ...layers.block_spec import BlockSpec
from ...layers.grid import COLUMN as GRID
from ...registry import hosts
from ..ops import by_tiles, is_affine
from .base import TransformersHost
from .patch_groups import PatchAttention, PatchInput, PrunedPatchGroups


class QwenVisionHost(TransformersHost):
    """Host of an image tower of Qwen-VL.

    A token is a visual token of the language model: its patches side by side, which stay or go together. Statistics of
    attention are means over its patches. An instance is an image or a video. Attention is within a frame, or a window of it.

    Features of earlier blocks that the language model adds (DeepStack) travel with their tokens. What goes at a later block
    loses them too, and a merged token has those of the token where it stands.
    """

    pruned_class = PrunedPatchGroups
    layers = "blocks"
    attention = "attn"
    dropout = "attention_dropout"
    has_summary = False
    known: ClassVar = {
        Qwen2VLVisionBlock: (VisionAttention,),
        Qwen2_5_VLVisionBlock: (Qwen2_5_VLVisionAttention,),
        Qwen3VLVisionBlock: (Qwen3VLVisionAttention,),
    }

    def group_size(self, tower: Any) -> int:
        """How many patches a token is."""
        return tower.spatial_merge_size**2

    def spec(self, tower: Any, depth: int, name: str) -> BlockSpec:
        blocks, patches = self.blocks(tower), self.group_size(tower)
        attn = self.attn(blocks[depth])
        return BlockSpec(name, depth, len(blocks), patches * attn.dim, attn.num_heads, has_summary=False)

    def embed(self, tower: Any, hidden_states: Tensor, grid_thw: Tensor) -> tuple[PackedTokens, tuple[PatchInput, ...]]:
        merge = tower.spatial_merge_size
        patches = merge**2
        _check_patches(tower, hidden_states, grid_thw)
        x = self.embed_patches(tower, hidden_states, grid_thw)
        layout = Layout((grid_thw.prod(-1) // patches).tolist(), x.device)
        place = get_vision_position_ids(grid_thw, merge)
        tables = torch.stack(tower.rotary_pos_emb(x, place)).unflatten(1, (-1, patches))

        grid = place[::patches] // merge
        # frames of a video stand below each other
        height, width = (layout.spread(sides // merge) for sides in grid_thw[:, 1:].unbind(1))
        grid = torch.stack([grid[:, 0] + layout.slot // (height * width) * height, grid[:, 1]], 1)
        nothing = torch.zeros(layout.total, dtype=torch.bool, device=x.device)
        tokens = PackedTokens(x.reshape(layout.total, -1), layout, layout.slot, nothing, number_protected=0)

        frames = _numbered(get_vision_cu_seqlens(grid_thw), patches) if bool((grid_thw[:, 0] > 1).any()) else None
        whole = PatchAttention(patches, layout.starts, frames, tables=tables)
        attention = self.attention_of_blocks(tower, grid_thw, whole)
        levels = getattr(tower, "deepstack_visual_indexes", ())
        calls = (
            PatchInput(one, grid, levels.index(depth) if depth in levels else None)
            for depth, one in enumerate(attention)
        )
        return tokens.with_column(GRID, grid), tuple(calls)

    def embed_patches(self, tower: Any, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """Embed patches.

        Args:
            tower: The dense tower.
            patches: [patches, pixels], as `embed` takes them.
            grid_thw: [images, 3] int64: frames, rows and columns of patches of each image or video.

        Returns:
            [patches, dim].
        """
        return tower.patch_embed(patches)

    def attention_of_blocks(self, tower: Any, grid_thw: Tensor, whole: PatchAttention) -> Sequence[PatchAttention]:
        """What attention needs in each block.

        Args:
            tower: The dense tower.
            grid_thw: As in `embed_patches`.
            whole: Attention within whole frames.

        Returns:
            One for each block.
        """
        return [whole] * len(self.blocks(tower))

    def regions(self, block: Any, tokens: PackedTokens, block_input: PatchInput) -> Regions:
        return block_input.attention.of(tokens)[0]

    def qkv(self, block: Any, tokens: PackedTokens, block_input: PatchInput) -> tuple[Tensor, Tensor, Tensor]:
        attn, (regions, tables) = self.attn(block), block_input.attention.of(tokens)
        assert tables is not None
        x = tokens.x if regions.order is None else tokens.x.index_select(0, regions.order)
        x = attn.qkv(block.norm1(x.reshape(-1, attn.dim)))
        q, k, v = x.unflatten(-1, (3, attn.num_heads, -1)).unbind(1)
        return *apply_rotary_pos_emb_vision(q, k, *tables), v

    def scale(self, block: Any) -> float:
        return self.attn(block).scaling

    def project(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        attn = self.attn(block)
        return tokens.with_x(tokens.x + attn.proj(context.reshape(-1, attn.dim)).view_as(tokens.x))

    def projects_affinely(self, block: Any) -> bool:
        return is_affine(self.attn(block).proj)

    def feed_forward(self, block: Any, tokens: PackedTokens, block_input: PatchInput) -> PackedTokens:
        x = tokens.x.reshape(-1, self.attn(block).dim)
        x = x + by_tiles(lambda rows: block.mlp(block.norm2(rows)), x)
        tokens = tokens.with_x(x.view_as(tokens.x))
        # joined in `head`, where the fewest are left
        return tokens if block_input.level is None else tokens.with_column(_level(block_input.level), tokens.x)

    def merge(self, tower: Any, x: Tensor) -> Tensor:
        """Join the patches of visual tokens, as the language model reads them.

        Args:
            tower: The dense tower.
            x: Contents of visual tokens, their patches side by side.

        Returns:
            [visual tokens, dim of the language model].
        """
        return tower.merger(x.reshape(-1, self.attn(self.blocks(tower)[0]).dim))

    def head(
        self, tower: Any, tokens: PackedTokens, block_inputs: tuple[PatchInput, ...]
    ) -> BaseModelOutputWithPooling:
        width = self.attn(self.blocks(tower)[0]).dim
        x = tokens.x.reshape(-1, width)
        found = {"last_hidden_state": x, "pooler_output": tower.merger(x)}
        mergers = getattr(tower, "deepstack_merger_list", None)
        if mergers is None:
            return BaseModelOutputWithPooling(**found)
        # tokens that ran through no block, whose cost is measured, have no levels
        levels = [tokens.columns.get(_level(number), tokens.x).reshape(-1, width) for number in range(len(mergers))]
        features = [merger(level) for merger, level in zip(mergers, levels, strict=True)]
        return BaseModelOutputWithDeepstackFeatures(**found, deepstack_features=features)


@hosts.register("transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel")
class Qwen2VisionHost(QwenVisionHost):
    """Host of Qwen2-VL's image tower."""


@hosts.register("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel")
class Qwen2_5VisionHost(QwenVisionHost):
    """Host of Qwen2.5-VL's image tower, most of whose blocks attend in windows.

    A window keeps what its image keeps of it. Where statistics of such a block are read, they are of windows.
    """

    def attention_of_blocks(self, tower: Any, grid_thw: Tensor, whole: PatchAttention) -> Sequence[PatchAttention]:
        merge = tower.spatial_merge_size
        order, ends = get_vision_window_index(
            grid_thw, spatial_merge_size=merge, window_size=tower.window_size, patch_size=tower.patch_size
        )
        order = order.to(whole.starts.device)
        region = torch.empty_like(order).index_copy_(0, order, _numbered(ends.to(order.device), merge**2))
        windowed = PatchAttention(merge**2, whole.starts, region, False, whole.tables)
        return [whole if depth in tower.fullatt_block_indexes else windowed for depth in range(len(self.blocks(tower)))]


@hosts.register("transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel")
class Qwen3VisionHost(QwenVisionHost):
    """Host of Qwen3-VL's image tower, which adds position embeddings, and whose earlier blocks give features too."""

    def embed_patches(self, tower: Any, patches: Tensor, grid_thw: Tensor) -> Tensor:
        x = tower.patch_embed(patches)
        index, weight = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.spatial_merge_size,
        )
        return x + (tower.pos_embed(index) * weight[:, :, None]).sum(1).to(x.dtype)


def _level(number: int) -> str:
    """The name of the column of a level of deeper features."""
    return f"deepstack{number}"


def _numbered(ends: Tensor, patches: int) -> Tensor:
    """[visual tokens] int64: the number of the part that each token is of; parts end at the patches `ends` [1 + parts]."""
    sizes = ends.diff() // patches
    return torch.arange(sizes.shape[0], device=ends.device).repeat_interleave(sizes)


def _check_patches(tower: Any, patches: Tensor, grid_thw: Tensor) -> None:
    """ValueError for patches that are not those of a grid, or not finite."""
    if grid_thw.dim() != 2 or grid_thw.shape[-1] != 3 or len(grid_thw) == 0:
        raise ValueError(f"grid_thw must be [images, 3], frames, rows and columns, got {list(grid_thw.shape)}")
    number = int(grid_thw.prod(-1).sum())
    if patches.dim() != 2 or patches.shape[0] != number:
        raise ValueError(
            f"the grids of these images have {number} patches, and the pixels are {list(patches.shape)}: prepare both in one "
            "call of this model's processor"
        )
    if bool((grid_thw[:, 1:] % tower.spatial_merge_size).any()):
        raise ValueError(
            f"rows and columns of grid_thw must be multiples of {tower.spatial_merge_size}, got {grid_thw.tolist()}"
        )
    check_finite(patches, "pixels")
