"""Composites of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: visual tokens with the attention that their patches have in the tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from ....core.attention_stats import attend_with_stats
from ....core.layout import Layout
from ....core.statistics import AttentionStats, Stat
from ....core.tokens import PackedTokens
from ....registry import hosts
from .rows import RowsComposite, RowsHost


class QwenRowsHost(RowsHost):
    """Host of the visual tokens of Qwen-VL. Statistics are means over the patches of each, of the tower's last whole block.

    That block's attention is computed once more, from the tokens that entered it.
    """

    has_attention = True

    def attention(self, tower: Any, modality: str, needs: Stat, **inputs: Any) -> tuple[Any, AttentionStats]:
        visual = tower.base_model.visual
        # blocks attend in windows elsewhere
        depth = max(getattr(visual, "fullatt_block_indexes", None) or (len(visual.blocks) - 1,))
        output = super().features(tower, modality, output_hidden_states=[depth], **inputs)
        x, block = output.hidden_states[depth], visual.blocks[depth]
        grid = next(inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs)
        merged, order = visual.spatial_merge_size**2, _window_order(visual, grid)
        angles = visual.rotary_pos_emb(x, get_vision_position_ids(grid, visual.spatial_merge_size))
        if order is not None:
            angles = tuple(angle.unflatten(0, (-1, merged))[order].flatten(0, 1) for angle in angles)
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *angles)
        layout = Layout(get_vision_cu_seqlens(grid).diff().tolist(), x.device)
        tokens = PackedTokens(
            x, layout, layout.slot, torch.zeros_like(layout.slot, dtype=torch.bool), number_protected=0
        )
        stats = attend_with_stats(q, k, v, tokens, block.attn.scaling, needs)[1]

        def of_rows(values: Tensor) -> Tensor:
            mean = values.unflatten(0, (-1, merged)).mean(1)
            return mean if order is None else mean[order.argsort()]

        return output, stats.mapped(of_rows)


def _window_order(visual: Any, grid: Tensor) -> Tensor | None:
    """The order in which Qwen2.5-VL's tower has the visual tokens, by windows; None for another tower."""
    window = getattr(visual, "window_size", None)
    if window is None:
        return None
    options = {"window_size": window, "patch_size": visual.patch_size}
    return get_vision_window_index(grid, spatial_merge_size=visual.spatial_merge_size, **options)[0].to(grid.device)


@hosts.register("transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLForConditionalGeneration")
@hosts.register("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLForConditionalGeneration")
@hosts.register("transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLForConditionalGeneration")
class QwenComposite(RowsComposite):
    """Composite of Qwen-VL."""

    host = QwenRowsHost
