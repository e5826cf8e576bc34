"""Composites of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: visual tokens pruned inside the image tower or behind its last block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....registry import hosts
from ...base import Host
from ...find import find_host
from .call_inputs import PIXELS
from .rows import RowsComposite
from .texts import PromptTexts, compared
from .visual_rows import VisualRows, split_by_image


@hosts.register("transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLForConditionalGeneration")
@hosts.register("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLForConditionalGeneration")
@hosts.register("transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLForConditionalGeneration")
class QwenComposite(RowsComposite):
    """Composite of Qwen-VL. What is pruned are the patches of a visual token, before the tower joins them."""

    image: ClassVar[str] = "visual"

    def image_tower(self, model: Any) -> tuple[nn.Module, Host]:
        return model.base_model.visual, find_host(model.base_model.visual)

    def positions(self, model: Any, given: Mapping[str, Any], mask: Tensor, generating: bool) -> Tensor:
        for modality in PIXELS:
            grid = given.get(f"{modality}_grid_thw")
            if grid is not None:
                sizes = grid.prod(-1) // model.config.vision_config.spatial_merge_size**2
                places = (given["input_ids"] == self.placeholders(model)[modality]) & (mask != 0)
                _check_runs(places, sizes.tolist(), modality)
        return super().positions(model, given, mask, generating)

    def _prune(
        self, model: Any, modality: str, texts: PromptTexts | None, names: tuple[str, ...], *inputs: Any
    ) -> VisualRows:
        encoder = model.base_model.visual
        tower, host = encoder.host, encoder.adapter
        sizes = inputs[1].prod(-1) // tower.spatial_merge_size**2
        with compared(texts, sizes, partial(host.merge, tower)):
            tokens, calls = encoder.encode(*inputs)
        self.check_weighs(model, tokens)
        output = host.head(tower, tokens, calls)
        levels = getattr(output, "deepstack_features", None)
        short = split_by_image(type(output), output.pooler_output, tokens.layout.lengths, levels)
        attention = calls[0].attention
        kept = torch.zeros(len(calls[0].grid), dtype=torch.bool, device=tokens.x.device)
        kept[attention.row(tokens)] = True
        # images below each other
        heights = inputs[1][:, 0] * inputs[1][:, 1] // tower.spatial_merge_size
        above = torch.zeros_like(calls[0].grid)
        above[:, 0] = (heights.cumsum(0) - heights).repeat_interleave(sizes)
        return VisualRows(short, kept, None, tokens.keep_prob, tokens.counted_prob, calls[0].grid + above)


def _check_runs(places: Tensor, sizes: list[int], modality: str) -> None:
    """ValueError where an image does not have its placeholders in a row; frames of a video may stand apart.

    `places` [batch, length] bool, true at placeholders; `sizes`, the visual tokens of each image.
    """
    # where it changes, once at each end of a row
    ends = nn.functional.pad(places, (1, 1)).int().flatten().diff().nonzero().flatten()
    runs = (ends[1::2] - ends[::2]).tolist()
    if runs != sizes and (modality == "image" or not {*accumulate(sizes)} <= {*accumulate(runs)}):
        raise ValueError(
            f"the prompts have rows of {runs} placeholders of {modality}s, and the {modality}s give {sizes} visual tokens: "
            "prepare both in one call of this model's processor"
        )
