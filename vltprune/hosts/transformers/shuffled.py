"""Host of InternVL's image tower, of which squares of patches become visual tokens."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.internvl.modeling_internvl import InternVLVisionAttention, InternVLVisionLayer

from ...core.checks import check_images
from ...core.tokens import PackedTokens
from ...layers.grid import COLUMN as GRID
from .patch_groups import PatchAttention, PatchGroupsHost, PatchInput, side_by_side


class ShuffledHost(PatchGroupsHost):
    """Host of InternVL's image tower. The class token is a group of copies of itself, of which one is attended to.

    It is protected. As no token is the summary of one row of attention, parts that read class attention are refused. In means
    over all queries (`Stat.COLUMN`, `Stat.PAGERANK`) it counts once a copy: at 448 px 4 of 1,028 times, not 1 of 1,025.
    """

    layers = "encoder.layer"
    attention = "attention"
    norms = ("layernorm_before", "layernorm_after")
    output = "projection_layer"
    dropout = "attention_dropout"
    norm = "layernorm"
    known: ClassVar = {InternVLVisionLayer: (InternVLVisionAttention,)}

    def __init__(self, side: int):
        super().__init__(side)
        self.copies = side**2 - 1

    def prefix(self, tower: Any) -> int:
        return 1

    def check_pixels(self, tower: Any, pixel_values: Tensor, any_size: bool | None) -> Tensor:
        patch = tower.config.patch_size
        unit = (patch if isinstance(patch, int) else patch[0]) * self.side
        check_images(pixel_values, tower.config.num_channels, None, "pixel_values")
        height, width = pixel_values.shape[-2:]
        if height != width or height % unit:
            raise ValueError(
                f"pixel_values must be squares with sides of a multiple of {unit} pixels, got {height} x {width}: prepare them "
                "with this model's processor"
            )
        return pixel_values.to(tower.dtype)

    def embed(self, tower: Any, pixel_values: Tensor) -> tuple[PackedTokens, tuple[PatchInput, ...]]:
        x = tower.embeddings(self.check_pixels(tower, pixel_values, True))
        patches = self.group_size(tower)
        rows = torch.cat([x[:, :1].repeat(1, 1, patches), side_by_side(x[:, 1:], self.side)], 1)
        tokens = PackedTokens.pack(rows, None, protected=1, summary=False)
        line = torch.arange(math.isqrt(rows.shape[1] - 1), device=x.device)
        # the class token has the place of the first square
        grid = torch.cat([line.new_zeros(1, 2), torch.cartesian_prod(line, line)]).repeat(len(x), 1)
        hidden = torch.zeros(tokens.layout.total, patches, dtype=torch.bool, device=x.device)
        hidden[tokens.layout.starts, 1:] = True
        attention = PatchAttention(patches, tokens.layout.starts, hidden=hidden)
        return tokens.with_column(GRID, grid), (PatchInput(attention, grid),) * len(self.blocks(tower))

    def project_qkv(self, attn: Any, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (self.heads(attn), -1)
        # normed before they are split into heads
        q, k = attn.q_norm(attn.q_proj(x)), attn.k_norm(attn.k_proj(memory))
        return q.unflatten(-1, heads), k.unflatten(-1, heads), attn.v_proj(memory).unflatten(-1, heads)

    def branch(self, block: Any, index: int, x: Tensor, tokens: PackedTokens) -> Tensor:
        dropout, scale = ((block.attention.projection_dropout, block.lambda_1), (block.dropout, block.lambda_2))[index]
        return dropout(x) * scale
