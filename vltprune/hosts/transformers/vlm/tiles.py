"""Composites of LLaVA-NeXT and LLaVA-OneVision, whose images are cut into tiles: pruned inside the tower, or behind it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ....core.tokens import PackedTokens
from ....layers import set_query
from ....registry import hosts
from .llava import LlavaComposite
from .rows import RowsComposite
from .tower_rows import TiledRowsHost
from .visual_rows import VisualRows, split_by_image

# what stands for a newline and for a patch that is gone, where patches that stay are numbered on from there
_NEWLINE, _GONE = 0.0, 1.0


@hosts.register("transformers.models.llava_next.modeling_llava_next.LlavaNextForConditionalGeneration")
@hosts.register("transformers.models.llava_onevision.modeling_llava_onevision.LlavaOnevisionForConditionalGeneration")
class TiledComposite(RowsComposite):
    """Composite of LLaVA-NeXT and LLaVA-OneVision, pruned behind the projector. An instance is an image."""

    host = TiledRowsHost

    def inside(self, model: nn.Module) -> TiledTowerComposite:
        return TiledTowerComposite()


class TiledTowerComposite(LlavaComposite):
    """Composite of the same models, pruned inside the image tower. An instance is a tile."""

    def look(self, model: Any, given: dict[str, Any]) -> dict[str, VisualRows]:
        if "pixel_values_videos" in given:
            raise ValueError(
                "pixel_values_videos: a visual token of a video is an average of patches, of which blocks of the image tower "
                "may keep some; prune videos behind the projector, place='output' with at=None"
            )
        options = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")
        self.check_options(model, given, tuple(name for name in options if hasattr(model.config, name)))
        if "image_sizes" not in given:
            raise ValueError(
                "pixel_values is given without image_sizes: give both, as this model's processor makes them"
            )
        names = ("pixel_values", "image_sizes", "batch_num_images")
        inputs = {name: given.pop(name) for name in names if name in given}
        host = TiledRowsHost()
        host.check_pixels(model, "image", inputs)
        tiles, pixels = host.tiles(model, inputs), inputs["pixel_values"]
        if pixels.dim() == 5:
            # images with fewer tiles than others are padded
            pixels = torch.cat([image[:number] for image, number in zip(pixels, tiles, strict=True)])
        encoder = model.model.vision_tower
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        per_tile = side**2 + encoder.adapter.prefix(encoder.host) - self.first(model)

        def place(values: Tensor) -> list[Tensor]:
            # in double precision, which holds each number and its square
            columns = torch.stack([values, values.square()], -1).unflatten(0, (-1, per_tile))
            return host.packed(model, columns, inputs, columns.new_full((2,), _NEWLINE))

        number = torch.full((len(pixels) * per_tile,), _GONE, dtype=torch.float64, device=pixels.device)
        texts, query = self.texts(model, given, "image"), nullcontext()
        if texts is not None:
            text = texts.of([len(one) for one in place(number)])
            each = torch.tensor(tiles, device=text.device)
            query = set_query(text.repeat_interleave(each, 0), model.model.multi_modal_projector)
        tokens, features = self.patches(model, pixels, query)
        row = tokens.layout.instance * per_tile + tokens.position
        number[row] = torch.arange(len(row)).to(number) + _GONE + 1
        # a class token that is no row stands before the patches of a tile
        first = self.first(model)
        origin = tokens.layout.instance * (per_tile + first) + tokens.position + first
        return {"image": _rows(model, place(number), tokens, features, origin)}


def _rows(model: Any, numbers: list[Tensor], tokens: PackedTokens, features: Tensor, place: Tensor) -> VisualRows:
    """The rows of images, of numbers of their tokens and these squared [rows, 2], and of where tokens stood in the tower.

    ValueError for rows of several tokens.
    """
    number, square = torch.cat(numbers).unbind(-1)
    if not torch.equal(number.square(), square):
        raise ValueError(
            f"an image has more patches than vision_aspect_ratio={model.config.vision_aspect_ratio!r} allows, so that its "
            "visual tokens are interpolated, and blocks of the image tower may keep some of what one is made of: give a "
            "smaller image, or prune behind the projector, place='output' with at=None"
        )
    kept, protected = number != _GONE, number == _NEWLINE
    # a newline is the first of what rows are taken from
    index = (number - _GONE).clamp(min=0).long()
    source = index[kept]
    newline = model.base_model.image_newline.to(features)[None]
    output = split_by_image(
        BaseModelOutputWithPooling,
        torch.cat([newline, features])[source],
        [int((one[:, 0] != _GONE).sum()) for one in numbers],
    )
    weights = (
        None if one is None else torch.cat([one.new_ones(1), one])[source]
        for one in (tokens.keep_prob, tokens.counted_prob)
    )
    origin = torch.cat([place.new_full((1,), -1), place])[index]
    return VisualRows(output, kept, protected, *weights, source=origin)
