"""Composites whose visual tokens are made of an image tower's patches, and have the attention of these."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ....core.checks import check_images
from ....core.statistics import AttentionStats, Stat
from ....layers import BlockSpec
from ...find import find_host
from ...graft import with_descendant
from ..base import ImageHost
from .call_inputs import PIXELS
from .observed import Observer, observed
from .rows import RowsHost


@dataclass(frozen=True)
class VisionTower:
    """Where a model has its image tower, and that its attention.

    Attributes:
        name: Name of the tower in the base model.
        blocks: Dotted name of the blocks in the tower.
        attention: Dotted name of the attention in a block.
        prefix: How many tokens of an image stand before its patches; the first of them is its summary.
    """

    name: str
    blocks: str
    attention: str
    prefix: int


class TowerRowsHost(RowsHost):
    """Host of visual tokens, each with the attention of its patch in the last block that the projector reads."""

    has_attention = True
    is_square = True

    def spec(self, tower: Any, depth: int, name: str) -> BlockSpec:
        text, vision = tower.config.get_text_config(), tower.config.vision_config
        has_summary = self.vision(tower).prefix > 0
        return BlockSpec(name, depth, 1, text.hidden_size, vision.num_attention_heads, has_summary)

    def check_pixels(self, tower: Any, modality: str, inputs: Mapping[str, Any]) -> None:
        config, name = tower.config.vision_config, PIXELS[modality]
        side, unit = config.image_size, self.unit(tower)
        size = (side, side) if isinstance(side, int) else tuple(side)
        pixels = inputs[name]
        leading = self.leading(pixels.dim()) if modality == "image" else ("videos", "frames")
        check_images(pixels, getattr(config, "num_channels", 3), None if unit else size, name, leading)
        height, width = pixels.shape[-2:]
        if unit and (height != width or height % unit):
            raise ValueError(
                f"{name} must be squares with sides of a multiple of {unit} pixels, got {height} x {width}: prepare them "
                "with this model's processor"
            )

    def leading(self, dims: int) -> tuple[str, ...]:
        """The names of the dimensions of images before the channels, where pixels have so many in all."""
        return ("images",)

    def unit(self, tower: Any) -> int | None:
        """What sides of images are multiples of, in pixels; None for a model of one size."""
        return None

    def vision(self, tower: Any) -> VisionTower:
        """Where the image tower is, and its attention. TypeError for a tower that is not known."""
        vision = tower.base_model.vision_tower
        host = find_host(vision)
        if not isinstance(host, ImageHost):
            raise TypeError(f"cannot prune a {type(tower).__name__} whose image tower is a {type(vision).__name__}")
        return VisionTower("vision_tower", host.layers, host.attention, host.prefix(vision))

    def attention(self, tower: Any, modality: str, needs: Stat, **inputs: Any) -> tuple[Any, AttentionStats]:
        where, base = self.vision(tower), tower.base_model
        vision = base.get_submodule(where.name)
        observer = Observer(needs, where.prefix)
        depth = _last_block(tower, len(vision.get_submodule(where.blocks)), inputs)
        copied = with_descendant(base, where.name, observed(vision, where.blocks, where.attention, depth, observer))
        output = self.features(copied, modality, **inputs)

        def of_rows(values: Tensor) -> Tensor:
            patches = values.unflatten(0, (observer.images, -1))[:, where.prefix :]
            channels = patches.flatten(2) if patches.dim() > 2 else patches[..., None]
            return self.rows(tower, modality, channels, inputs).reshape(-1, *values.shape[1:])

        return output, observer.stats.mapped(of_rows)

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

    is_square = False

    def leading(self, dims: int) -> tuple[str, ...]:
        # those of all images may be in a row
        return ("tiles",) if dims == 4 else ("images", "tiles")

    def check_pixels(self, tower: Any, modality: str, inputs: Mapping[str, Any]) -> None:
        super().check_pixels(tower, modality, inputs)
        if modality == "image":
            tiles, shape = self.tiles(tower, inputs), inputs["pixel_values"].shape
            # images with fewer tiles than others are padded
            fits = shape[0] == sum(tiles) if len(shape) == 4 else shape[0] == len(tiles) and shape[1] >= max(tiles)
            if not fits:
                raise ValueError(
                    f"images of image_sizes have {tiles} tiles, and pixel_values are {list(shape)}: prepare both in one call "
                    "of this model's processor"
                )

    def rows(self, tower: Any, modality: str, patches: Tensor, inputs: dict[str, Any]) -> Tensor:
        newline = patches.new_zeros(patches.shape[-1])
        if modality == "video":
            videos = (
                tower.base_model.apply_pooling(patches)
                .unflatten(0, (len(inputs["pixel_values_videos"]), -1))
                .flatten(1, 2)
            )
            return torch.cat([videos, newline.expand(len(videos), 1, -1)], 1).flatten(0, 1)
        return torch.cat(self.packed(tower, patches, inputs, newline))

    def packed(self, tower: Any, patches: Tensor, inputs: Mapping[str, Any], newline: Tensor) -> list[Tensor]:
        """Place values of the patches of images as the dense model places their features.

        Args:
            tower: The dense model.
            patches: [tiles, patches, channels].
            inputs: What tower and projector read.
            newline: [channels], the values of newlines.

        Returns:
            Of each image [rows, channels].
        """
        base, tiles = tower.base_model, patches.split(self.tiles(tower, inputs))
        options = {"image_sizes": inputs["image_sizes"], "image_newline": newline}
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
            if name in inspect.signature(base.pack_image_features).parameters:
                options[name] = inputs.get(name) or getattr(tower.config, name)
        return base.pack_image_features(tiles, **options)[0]

    def tiles(self, tower: Any, inputs: Mapping[str, Any]) -> list[int]:
        """How many tiles each image has.

        Args:
            tower: The dense model.
            inputs: What tower and projector read.
        """
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


class ShuffledRowsHost(TowerRowsHost):
    """Host of the visual tokens of InternVL, squares of patches side by side."""

    def unit(self, tower: Any) -> int:
        patch = tower.config.vision_config.patch_size
        return round((patch if isinstance(patch, int) else patch[0]) / tower.config.downsample_ratio)

    def vision(self, tower: Any) -> VisionTower:
        return VisionTower("vision_tower", "encoder.layer", "attention", 1)

    def rows(self, tower: Any, modality: str, patches: Tensor, inputs: dict[str, Any]) -> Tensor:
        side = int(patches.shape[1] ** 0.5)
        grid = patches.contiguous().unflatten(1, (side, side))
        shuffled = tower.base_model.pixel_shuffle(grid, scale_factor=tower.config.downsample_ratio)
        return _mean_of_joined(shuffled.flatten(0, 2), patches.shape[2])


def _mean_of_joined(joined: Tensor, channels: int) -> Tensor:
    """[rows, channels]: means over the patches that are joined side by side, [rows, patches * channels]."""
    return joined.unflatten(1, (-1, channels)).mean(1)


def _last_block(tower: Any, depths: int, inputs: Mapping[str, Any]) -> int:
    """The index of the last block of the image tower that the projector reads. ValueError for several."""
    layer = inputs.get("vision_feature_layer")
    layer = getattr(tower.config, "vision_feature_layer", -1) if layer is None else layer
    # hidden states begin with the embeddings
    depth = (layer if layer >= 0 else depths + 1 + layer) - 1 if isinstance(layer, int) else -1
    if not 0 <= depth < depths:
        raise ValueError(
            f"vision_feature_layer={layer}: parts read the attention of the block behind which the projector reads, and this "
            f"is none of the {depths}, or several: choose parts that read contents, as the preset divprune does"
        )
    return depth
