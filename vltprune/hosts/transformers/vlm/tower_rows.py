"""Composites whose image tower has a host and whose visual tokens are its patches, placed anew: statistics go along."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ....core.attention_stats import attend_with_stats
from ....core.statistics import AttentionStats, Stat
from ....layers import BlockSpec
from ....registry import hosts
from ...find import find_host
from ..base import ImageHost
from .rows import RowsComposite, RowsHost


class TowerRowsHost(RowsHost):
    """Host of visual tokens, each with the attention of its patch in the last block that the projector reads.

    That block's attention is computed once more, from the tokens that entered it.
    """

    has_attention = True

    def spec(self, tower: Any, depth: int, name: str) -> BlockSpec:
        text, vision = tower.config.get_text_config(), tower.config.vision_config
        has_summary = self.vision(tower)[1].has_summary
        return BlockSpec(name, depth, 1, text.hidden_size, vision.num_attention_heads, has_summary)

    def vision(self, tower: Any) -> tuple[Any, ImageHost]:
        """The image tower and its host. TypeError for one that has none."""
        vision = tower.base_model.vision_tower
        host = find_host(vision)
        if not isinstance(host, ImageHost):
            raise TypeError(f"cannot prune a {type(tower).__name__} whose image tower is a {type(vision).__name__}")
        return vision, host

    def attention(self, tower: Any, modality: str, needs: Stat, **inputs: Any) -> tuple[Any, AttentionStats]:
        vision, host = self.vision(tower)
        blocks = host.blocks(vision)
        layer = getattr(tower.config, "vision_feature_layer", -1)
        # hidden states begin with the embeddings
        read = layer if layer >= 0 else len(blocks) + 1 + layer
        output = self.features(tower, modality, output_hidden_states=[read - 1, read], **inputs)
        tokens, block = host.pack(vision, output.hidden_states[read - 1]), blocks[read - 1]
        q, k, v = host.qkv(block, tokens, None)
        stats = attend_with_stats(q, k, v, tokens, host.scale(block), needs)[1]
        prefix, images = host.prefix(vision), tokens.layout.batch

        def of_rows(values: Tensor) -> Tensor:
            patches = values.unflatten(0, (images, -1))[:, prefix:]
            channels = patches.flatten(2) if patches.dim() > 2 else patches[..., None]
            return self.rows(tower, modality, channels, inputs).reshape(-1, *values.shape[1:])

        return output, stats.mapped(of_rows)

    def rows(self, tower: Any, modality: str, patches: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Place values of patches as the dense model places their features.

        Args:
            tower: The dense model.
            modality: "image" or "video".
            patches: [images or tiles, patches, channels].
            inputs: What tower and projector read.

        Returns:
            [rows, channels].
        """
        return patches.flatten(0, 1)


class TiledRowsHost(TowerRowsHost):
    """Host of the visual tokens of LLaVA-NeXT and LLaVA-OneVision: tiles of an image in rows that end with a newline."""

    def rows(self, tower: Any, modality: str, patches: Tensor, inputs: dict[str, Any]) -> Tensor:
        base, newline = tower.base_model, patches.new_zeros(patches.shape[-1])
        if modality == "video":
            videos = base.apply_pooling(patches).unflatten(0, (len(inputs["pixel_values_videos"]), -1)).flatten(1, 2)
            return torch.cat([videos, newline.expand(len(videos), 1, -1)], 1).flatten(0, 1)
        tiles = patches.split(self._tiles(tower, inputs))
        options = {"image_sizes": inputs["image_sizes"], "image_newline": newline}
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
            if name in inspect.signature(base.pack_image_features).parameters:
                options[name] = inputs.get(name) or getattr(tower.config, name)
        return torch.cat(base.pack_image_features(tiles, **options)[0])

    def _tiles(self, tower: Any, inputs: dict[str, Any]) -> list[int]:
        """How many tiles each image has."""
        options = {
            "grid_pinpoints": tower.config.image_grid_pinpoints,
            "patch_size": tower.config.vision_config.image_size,
        }
        sizes, numbers = inputs["image_sizes"], inputs.get("batch_num_images")
        # one of several images in a prompt of LLaVA-OneVision is a single tile
        alone = [True] * len(sizes) if numbers is None else [n == 1 for n in numbers for _ in range(n)]
        return [
            image_size_to_num_patches(size, **options) if one else 1 for size, one in zip(sizes, alone, strict=True)
        ]


class PooledRowsHost(TowerRowsHost):
    """Host of the visual tokens of Gemma 3, means of square windows of patches."""

    def rows(self, tower: Any, modality: str, patches: Tensor, inputs: dict[str, Any]) -> Tensor:
        projector = tower.base_model.multi_modal_projector
        side = projector.patches_per_image
        pooled: Tensor = projector.avg_pool(patches.mT.unflatten(2, (side, side)))
        return pooled.flatten(2).mT.flatten(0, 1)


@hosts.register("transformers.models.llava_next.modeling_llava_next.LlavaNextForConditionalGeneration")
@hosts.register("transformers.models.llava_onevision.modeling_llava_onevision.LlavaOnevisionForConditionalGeneration")
class TiledComposite(RowsComposite):
    """Composite of LLaVA-NeXT and LLaVA-OneVision."""

    host = TiledRowsHost


@hosts.register("transformers.models.gemma3.modeling_gemma3.Gemma3ForConditionalGeneration")
class PooledComposite(RowsComposite):
    """Composite of Gemma 3."""

    host = PooledRowsHost


@hosts.register("transformers.models.paligemma.modeling_paligemma.PaliGemmaForConditionalGeneration")
class PaliGemmaComposite(RowsComposite):
    """Composite of PaliGemma, whose positions begin with 1."""

    host = TowerRowsHost

    def positions(self, model: Any, given: Mapping[str, Any], mask: Tensor, generating: bool) -> Tensor:
        # in `generate` it adds the one by itself
        return super().positions(model, given, mask, generating) + int(not generating)
