"""Image towers whose patches become visual tokens in groups: a token is the patches of one visual token, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics3.modeling_idefics3 import Idefics3EncoderLayer, Idefics3VisionAttention
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMEncoderLayer, SmolVLMVisionAttention

from ...core.checks import check_images
from ...core.layout import Layout
from ...core.regions import Regions
from ...core.statistics import Stat
from ...core.tokens import PackedTokens
from ...layers.block_spec import BlockSpec
from ...layers.grid import COLUMN as GRID
from ...pruning.config import PruneConfig
from ...pruning.pruner import Pruner
from ..base import Host
from .base import ImageHost, PrunedTransformer
from .clip import ClipBlocksHost

# a logit of this much less weighs nothing, and is a number in half precision too
_HIDDEN = -1e4


class PatchAttention:
    """What attention needs in the blocks of one kind, in one call: regions and rotary tables of the tokens that are left.

    Args:
        patches: How many patches a token is.
        starts: [instances] int64, the first token of each image, video or prompt among all tokens of the call.
        region: [tokens] int64, the region in which each attends, larger from instance to instance. None for whole instances.
        is_ordered: Whether the tokens of a region follow each other.
        tables: Cosine and sine of all patches of the call, [2, tokens, patches, head_dim]. None without rotary positions.
        hidden: [tokens, patches] bool, the patches that none attends to, such as padding. None for none.
    """

    def __init__(
        self,
        patches: int,
        starts: Tensor,
        region: Tensor | None = None,
        is_ordered: bool = True,
        tables: Tensor | None = None,
        hidden: Tensor | None = None,
    ):
        self.patches, self.starts, self.region, self.is_ordered = patches, starts, region, is_ordered
        self.tables, self.hidden = tables, hidden
        self._last: tuple[Tensor, tuple[Regions, Tensor | None]] | None = None

    def row(self, tokens: PackedTokens) -> Tensor:
        """[total] int64: the place of each token among all tokens of the call."""
        return self.starts[tokens.layout.instance] + tokens.position

    def of(self, tokens: PackedTokens) -> tuple[Regions, Tensor | None]:
        """The regions of tokens, and cosine and sine of their patches, region after region, [2, patches of all, head_dim]."""
        # computed anew where tokens went
        if self._last is None or self._last[0] is not tokens.position:
            self._last = tokens.position, self._regions(tokens)
        return self._last[1]

    def _regions(self, tokens: PackedTokens) -> tuple[Regions, Tensor | None]:
        row, order = self.row(tokens), None
        layout = tokens.layout.map(lambda length: length * self.patches)
        if self.region is not None:
            region = self.region[row]
            if not self.is_ordered:
                order = region.argsort(stable=True)
                region, row = region[order], row[order]
            lengths = region.unique_consecutive(return_counts=True)[1].tolist()
            layout = Layout([length * self.patches for length in lengths], row.device)
        bias = None
        if self.hidden is not None:
            hidden = self.hidden[row].flatten()
            bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, _HIDDEN)
        tables = None if self.tables is None else self.tables.index_select(1, row).flatten(1, 2)
        return Regions(layout, self.patches, order, bias), tables


@dataclass(frozen=True)
class PatchInput:
    """What one call gives to one block besides its tokens.

    Attributes:
        attention: Regions and rotary tables, of all blocks of the same kind.
        grid: [tokens, 2] int64, row and column of each in its image or video, of those that are patches.
        level: Which level of deeper features the block's output is (DeepStack, arXiv 2406.04334); None for none.
    """

    attention: PatchAttention
    grid: Tensor
    level: int | None = None


class PrunedPatchGroups(PrunedTransformer):
    """A pruned image tower of which a token is several patches.

    Args:
        host, adapter, config, guide, tower, composite: As in `PrunedEncoder`.
    """

    adapter: Any

    def build_pruners(self, config: PruneConfig) -> nn.ModuleDict:
        pruners = super().build_pruners(config)
        several = self.adapter.group_size(self.host) > 1
        for pruner in pruners.values():
            if several and isinstance(pruner, Pruner) and Stat.FROM_QUERY in pruner.needs:
                raise ValueError(
                    f"a part reads the attention of a text query ({Stat.FROM_QUERY}), and a token of a "
                    f"{type(self.host).__name__} is several patches, of which no text is one: choose another scorer, such as "
                    "'column_attention'"
                )
        return pruners


class PatchGroupsHost(ClipBlocksHost, ImageHost):
    """Host of an image tower with blocks as CLIP's, of which a square of patches becomes one visual token.

    Statistics of attention are means over the patches of a token. Its composite makes it: a tower does not know the squares.

    Args:
        side: How many patches a side of the square has.

    Attributes:
        norm: The name of the norm behind the blocks.
    """

    pruned_class = PrunedPatchGroups
    has_summary = False
    norm: ClassVar[str] = "post_layernorm"

    def __init__(self, side: int):
        self.side = side

    def group_size(self, tower: Any) -> int:
        """How many patches a token is."""
        return self.side**2

    def spec(self, tower: Any, depth: int, name: str) -> BlockSpec:
        spec = super().spec(tower, depth, name)
        return replace(spec, dim=spec.dim * self.group_size(tower))

    def embed(self, tower: Any, pixel_values: Tensor) -> tuple[PackedTokens, tuple[PatchInput, ...]]:
        images = self.check_pixels(tower, pixel_values, False)
        return self.group(tower, tower.embeddings(images), [1] * len(images))

    def group(
        self, tower: Any, x: Tensor, images: Sequence[int], hidden: Tensor | None = None
    ) -> tuple[PackedTokens, tuple[PatchInput, ...]]:
        """Join the patches of each visual token.

        Args:
            tower: The dense tower.
            x: Embedded images [images, patches, dim].
            images: How many of them each instance has.
            hidden: [images, patches] bool, which patches none attends to. None for none.

        Returns:
            What `embed` returns.

        Raises:
            ValueError: For patches that are no square of groups.
        """
        rows = side_by_side(x, self.side)
        side = math.isqrt(rows.shape[1])
        layout = Layout([number * side**2 for number in images], x.device)
        line = torch.arange(side, device=x.device)
        grid = torch.cartesian_prod(line, line).repeat(len(x), 1)
        # images of an instance stand below each other
        grid[:, 0] += layout.slot // side**2 * side

        region = None
        if set(images) != {1}:
            region = torch.arange(len(x), device=x.device).repeat_interleave(side**2)
        if hidden is not None:
            hidden = side_by_side(hidden[..., None], self.side).flatten(0, 1)
        attention = PatchAttention(self.side**2, layout.starts, region, hidden=hidden)
        nothing = torch.zeros(layout.total, dtype=torch.bool, device=x.device)
        tokens = PackedTokens(rows.flatten(0, 1), layout, layout.slot, nothing, number_protected=0)
        return tokens.with_column(GRID, grid), (PatchInput(attention, grid),) * len(self.blocks(tower))

    def regions(self, block: Any, tokens: PackedTokens, block_input: PatchInput) -> Regions | None:
        attention = block_input.attention
        return None if self.side == 1 and attention.region is attention.hidden is None else attention.of(tokens)[0]

    def patches(self, tokens: PackedTokens) -> PackedTokens:
        """The tokens with x [patches of all, dim], for what a block does to each patch alone."""
        return tokens.with_x(tokens.x.reshape(len(tokens.x) * self.side**2, -1))

    def qkv(self, block: Any, tokens: PackedTokens, block_input: PatchInput) -> tuple[Tensor, Tensor, Tensor]:
        return super().qkv(block, self.patches(tokens), block_input)

    def project(self, block: Any, tokens: PackedTokens, context: Tensor) -> PackedTokens:
        projected = super().project(block, self.patches(tokens), context.flatten(0, -3))
        return tokens.with_x(projected.x.view_as(tokens.x))

    def feed_forward(self, block: Any, tokens: PackedTokens, block_input: PatchInput) -> PackedTokens:
        fed = super().feed_forward(block, self.patches(tokens), block_input)
        return tokens.with_x(fed.x.view_as(tokens.x))

    def head(
        self, tower: Any, tokens: PackedTokens, block_inputs: tuple[PatchInput, ...]
    ) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.normed(tower, tokens.x))

    def normed(self, tower: Any, x: Tensor) -> Tensor:
        """Run the final norm.

        Args:
            tower: The dense tower.
            x: Contents of visual tokens, their patches side by side.

        Returns:
            [visual tokens, patches, dim].
        """
        patches = x.reshape(len(x) * self.side**2, -1)
        return getattr(tower, self.norm)(patches).unflatten(0, (-1, self.side**2))


class TilesHost(PatchGroupsHost):
    """Host of the image towers of Idefics3 and SmolVLM. All tiles of a prompt are one instance, each of which attends alone.

    Images may have any size that is a square of groups. Patches of padding are there as in the dense tower, and hidden.
    """

    known: ClassVar = {
        Idefics3EncoderLayer: (Idefics3VisionAttention,),
        SmolVLMEncoderLayer: (SmolVLMVisionAttention,),
    }

    def bind_arguments(self, tower: Any, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        # those of the whole model, which drops empty tiles before its tower
        return Host.bind_arguments(self, tower, *inputs, **named)

    def embed(
        self, tower: Any, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None
    ) -> tuple[PackedTokens, tuple[PatchInput, ...]]:
        """Embed the tiles of prompts.

        Args:
            tower: The dense tower.
            pixel_values: [prompts, tiles, channels, H, W]. Tiles of zeros are padding.
            pixel_attention_mask: [prompts, tiles, H, W], nonzero where a pixel is no padding. None for everywhere.

        Returns:
            As for any tower.
        """
        check_images(pixel_values, tower.config.num_channels, None, "pixel_values", ("prompts", "images"))
        patch, (height, width) = tower.patch_size, pixel_values.shape[-2:]
        if height != width or height % (patch * self.side):
            raise ValueError(
                f"pixel_values must be squares with sides of a multiple of {patch * self.side} pixels, got {height} x {width}: "
                "prepare them with this model's processor"
            )
        is_tile = (pixel_values != 0).flatten(2).any(-1)
        images = pixel_values[is_tile].to(tower.dtype)
        there = torch.ones(len(images), height // patch, width // patch, dtype=torch.bool, device=images.device)
        if pixel_attention_mask is not None:
            cells = pixel_attention_mask[is_tile].unfold(1, patch, patch).unfold(2, patch, patch)
            there = (cells != 0).any(-1).any(-1)
        x = tower.embeddings(pixel_values=images, patch_attention_mask=there)
        hidden = None if bool(there.all()) else ~there.flatten(1)
        return self.group(tower, x, is_tile.sum(1).tolist(), hidden)


def side_by_side(patches: Tensor, side: int) -> Tensor:
    """Join square groups of patches.

    Args:
        patches: Values of the patches of square images, row by row, [images, patches, ...].
        side: How many patches a side of a group has.

    Returns:
        The groups, row by row, and in each its patches, row by row, flat: [images, groups, patches of a group * ...].

    Raises:
        ValueError: For patches that are no square of groups.
    """
    line = math.isqrt(patches.shape[1])
    if line**2 != patches.shape[1] or line % side:
        raise ValueError(
            f"an image of {patches.shape[1]} patches is no square of groups of {side} x {side}, which become a visual token "
            "each: prepare images with this model's processor"
        )
    groups = patches.unflatten(1, (line // side, side, line // side, side)).transpose(2, 3)
    return groups.flatten(3).flatten(1, 2)
