"""Composite of LLaVA of transformers: an image tower whose patches become visual tokens one by one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ....core.tokens import PackedTokens
from ....registry import hosts
from ...base import Host
from ...find import find_host
from ...linear_maps import measure_macs
from ..base import ImageHost
from .composite import VlmComposite
from .texts import compared
from .visual_rows import VisualRows, split_by_image, square_grid


@hosts.register("transformers.models.llava.modeling_llava.LlavaForConditionalGeneration")
class LlavaComposite(VlmComposite):
    """Composite of LLaVA. The image tower runs up to the block whose output the projector reads, and no further."""

    def __init__(self) -> None:
        super().__init__({"image": "model.vision_tower", "language": "model.language_model"})

    def image_tower(self, model: Any) -> tuple[nn.Module, Host]:
        tower, layer = model.model.vision_tower, model.config.vision_feature_layer
        host = find_host(tower)
        if not isinstance(layer, int):
            raise ValueError(
                f"vision_feature_layer={layer} reads several blocks, of which one may have tokens that another lost: prune "
                "models that read one"
            )
        if not isinstance(host, ImageHost):
            raise TypeError(f"cannot prune a {type(model).__name__} whose image tower is a {type(tower).__name__}")
        # hidden states begin with the embeddings
        depths = len(host.blocks(tower))
        host.runs = layer if layer >= 0 else depths + 1 + layer
        if not 0 < host.runs <= depths:
            raise ValueError(f"vision_feature_layer={layer}: the image tower has {depths} blocks, and one must run")
        return tower, host

    def exported_alone(self, model: nn.Module) -> dict[str, str]:
        return {"image": self.places["image"]}

    def projector_macs(self, model: Any) -> float:
        weight = next(model.model.multi_modal_projector.parameters())
        row = torch.zeros(1, model.config.vision_config.hidden_size, dtype=weight.dtype, device=weight.device)
        return measure_macs(model.model.multi_modal_projector, row)

    def patches(self, model: Any, pixels: Tensor, query: AbstractContextManager[None]) -> tuple[PackedTokens, Tensor]:
        """Run the pruned image tower and the projector.

        Args:
            model: The pruned model.
            pixels: [images, channels, H, W].
            query: The context of the texts of images.

        Returns:
            The tokens of the tower that the projector reads, with positions from 0 on, and what it makes of them [tokens, dim].
        """
        encoder = model.model.vision_tower
        with query:
            tokens, _ = encoder.encode(pixel_values=pixels)
        self.check_weighs(model, tokens)
        first = self.first(model)
        if first:
            tokens = tokens.select(tokens.position >= first)
            tokens = replace(tokens, position=tokens.position - first)
        return tokens, model.model.multi_modal_projector(tokens.x)

    def first(self, model: Any) -> int:
        """How many tokens of the tower before the first patch the projector does not read."""
        # positions count the class token, which the projector reads under the strategy "full" alone
        return int(model.config.vision_feature_select_strategy == "default")

    def check_options(self, model: Any, given: dict[str, Any], names: tuple[str, ...]) -> None:
        """Take options out of a call, which a pruned model has of its configuration alone.

        Args:
            model: The pruned model.
            given: All inputs of the call.
            names: The names of the options.

        Raises:
            ValueError: For other values than the configuration's.
        """
        for name in names:
            if given.get(name, getattr(model.config, name)) != getattr(model.config, name):
                raise ValueError(f"{name}={given[name]!r}: a pruned model runs with its configuration's, set it there")
            given.pop(name, None)

    def look(self, model: Any, given: dict[str, Any]) -> dict[str, VisualRows]:
        self.check_options(model, given, ("vision_feature_layer", "vision_feature_select_strategy"))
        pixels = given.pop("pixel_values")
        encoder, projector = model.model.vision_tower, model.model.multi_modal_projector
        side = model.config.vision_config.patch_size
        height, width = (pixels.shape[axis] // side for axis in (-2, -1))
        per_image = height * width + encoder.adapter.prefix(encoder.host) - self.first(model)
        query = compared(self.texts(model, given, "image"), [per_image] * len(pixels), projector)
        tokens, features = self.patches(model, pixels, query)
        kept = torch.zeros(pixels.shape[0] * per_image, dtype=torch.bool, device=tokens.x.device)
        kept[tokens.layout.instance * per_image + tokens.position] = True
        output = split_by_image(BaseModelOutputWithPooling, features, tokens.layout.lengths)
        # a class token is no patch
        grid = square_grid(len(pixels), height, width, kept.device) if per_image == height * width else None
        return {"image": VisualRows(output, kept, None, tokens.keep_prob, tokens.counted_prob, grid)}
