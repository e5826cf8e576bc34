"""Host of ViLT of transformers: a single-stream transformer, where a text and an image are one sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.vilt.modeling_vilt import ViltLayer, ViltModel, ViltSelfAttention

from ...core.checks import check_ids, check_images, is_recorded
from ...core.modality import COLUMN, text_counts, with_modality
from ...core.tokens import PackedTokens
from ...layers.block_spec import BlockSpec
from ...layers.grid import COLUMN as GRID
from ...registry import hosts
from ..ops import by_tiles, is_affine
from .base import PreNormHost

# the column of the first word, where no image has patches
_FAR = 2**32


@hosts.register("transformers.models.vilt.modeling_vilt.ViltModel")
class ViltHost(PreNormHost):
    """Host of ViLT. Both class tokens are protected, and that of the text is the summary, which ViLT pools.

    Tokens are those of the text, then the image's class token and patches. transformers shuffles the patches, also where it
    draws no part of them. Here they are in the order of the image, so that what is pruned depends on no draw. The patches that
    `config.max_image_length` draws are those of transformers under the same seed.

    Positions of a text are below `config.max_position_embeddings`. That is the position of the image's class token, and
    patches follow. So positions do not depend on padding.
    """

    tower = "fusion"
    layers = "encoder.layer"
    attention = "attention.attention"
    head_size = "attention_head_size"
    projections = ("query", "key", "value")
    norms = ("layernorm_before", "layernorm_after")
    known: ClassVar = {ViltLayer: (ViltSelfAttention,)}

    def spec(self, tower: ViltModel, depth: int, name: str) -> BlockSpec:
        return replace(super().spec(tower, depth, name), modalities=("text", "image"))

    def heads(self, attn: ViltSelfAttention) -> int:
        return attn.num_attention_heads

    def embed(
        self,
        tower: ViltModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        image_token_type_idx: int | None = None,
    ) -> tuple[PackedTokens, tuple[None, ...]]:
        self._check(tower, input_ids, attention_mask, pixel_values, pixel_mask)
        embeddings: Any = tower.embeddings
        length, kinds = input_ids.shape[1], embeddings.token_type_embeddings
        text = embeddings.text_embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        image, real, place = self._embed_image(tower, pixel_values, pixel_mask)
        text = text + kinds(torch.zeros_like(input_ids))
        number = 1 if image_token_type_idx is None else image_token_type_idx
        image = image + kinds(torch.full_like(real, number, dtype=torch.int64))

        valid = None
        if attention_mask is not None or pixel_mask is not None:
            shown = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            valid = torch.cat([shown.bool(), real], 1)
        slot = torch.arange(length + image.shape[1], device=text.device)
        tokens = PackedTokens.pack(
            torch.cat([text, image], 1), valid, (slot == 0) | (slot == length), slot == 0, number_protected=2
        )
        # words are in no row, and far from the columns of patches
        words = torch.stack([torch.full((length,), -1, device=text.device), slot[:length] + _FAR], 1)
        grid = torch.cat([words.expand(len(text), -1, -1), place], 1).flatten(0, 1)
        tokens = tokens.with_column(GRID, grid[tokens.layout.instance * len(slot) + tokens.position])

        is_image = tokens.position >= length
        shift = tower.config.max_position_embeddings - length
        tokens = replace(tokens, position=torch.where(is_image, tokens.position + shift, tokens.position))
        return with_modality(tokens, is_image), (None,) * len(self.blocks(tower))

    def _check(
        self, tower: ViltModel, ids: Tensor, mask: Tensor | None, pixels: Tensor | None, pixel_mask: Tensor | None
    ) -> None:
        """ValueError for inputs that the tower cannot take."""
        check_ids(ids, tower.config.vocab_size, tower.config.max_position_embeddings)
        if pixels is None:
            raise ValueError("ViLT reads a text and an image: give pixel_values [batch, channels, height, width] too")
        check_images(pixels, tower.config.num_channels, None, "pixel_values")
        if len(pixels) != len(ids):
            raise ValueError(f"{len(ids)} texts and {len(pixels)} images: give one image a text, as many of each")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"attention_mask must be {list(ids.shape)} like input_ids, got {list(mask.shape)}")
        if mask is not None and not is_recorded() and not mask[:, 0].all():
            raise ValueError("attention_mask hides the first token of a text, which ViLT pools: pad on the right")
        size = (len(pixels), *pixels.shape[2:])
        if pixel_mask is not None and tuple(pixel_mask.shape) != size:
            raise ValueError(f"pixel_mask must be {list(size)} like pixel_values, got {list(pixel_mask.shape)}")

    def _embed_image(self, tower: Any, pixels: Any, pixel_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The class token and the patches of each image in their order.

        Returns:
            [batch, n, dim]; which of them are real, [batch, n] bool; and their row and column, [batch, n, 2] int64.
        """
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixels[:, 0])
        x, real, (index, (height, width)) = tower.embeddings.visual_embed(
            pixels, pixel_mask, max_image_length=tower.config.max_image_length
        )
        place = (index[..., 0] * width + index[..., 1]).masked_fill(real[:, 1:] == 0, height * width)
        # the class token stays first
        order = pad(place.argsort(dim=1, stable=True) + 1, (1, 0))
        places = pad(index, (0, 0, 1, 0)).gather(1, order[..., None].expand(-1, -1, 2))
        return x.gather(1, order[..., None].expand_as(x)), real.gather(1, order).bool(), places

    def project(self, block: ViltLayer, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        return tokens.with_x(block.attention.output(context.flatten(1), tokens.x) + tokens.x)

    def feed_forward(self, block: Any, tokens: PackedTokens, block_input: None) -> PackedTokens:
        def function(x: Tensor) -> Tensor:
            return block.output(block.intermediate(block.layernorm_after(x)), x)

        return tokens.with_x(by_tiles(function, tokens.x))

    def head(
        self, tower: ViltModel, tokens: PackedTokens, block_inputs: tuple[object, ...]
    ) -> BaseModelOutputWithPooling:
        x = tokens.with_x(tower.layernorm(tokens.x)).unpack()[0]
        pooled = None if tower.pooler is None else tower.pooler(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)

    def format_output(self, tower: ViltModel, out: Any, **named: Any) -> Any:
        out = super().format_output(tower, out, **named)
        # its tuple has None for a pooler that is not there
        return (*out, None)[:2] if isinstance(out, tuple) else out

    def padded_length(self, tokens: PackedTokens, *inputs: Any) -> int:
        # images are padded to the one with the most patches
        text = text_counts(tokens.columns[COLUMN], tokens.layout.lengths)
        return inputs[0].shape[1] + int((tokens.layout.sizes - text).max())

    def projects_affinely(self, block: Any) -> bool:
        return is_affine(block.attention.output.dense)
