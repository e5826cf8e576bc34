"""Composites of models that join square groups of patches to visual tokens: pruned inside the image tower, or behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.internvl.modeling_internvl import InternVLVisionModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from ....registry import hosts
from ...base import Host
from ...graft import shallow_copy
from ...linear_maps import measure_macs
from ..patch_groups import PatchGroupsHost, TilesHost
from ..shuffled import ShuffledHost
from .rows import RowsComposite
from .texts import PromptTexts, compared
from .tower_rows import ShuffledRowsHost
from .visual_rows import VisualRows, split_by_image, square_grid


class GroupedComposite(RowsComposite):
    """Composite of a model whose projector reads a square group of patches for each visual token.

    To the projector, each group that stays is an image of its own, of one visual token.

    Attributes:
        tower_types: Types that the image tower may have.
        tower_host: The class of its host.
        is_joined: Whether the dense model has the visual tokens of all images in one tensor, not in a list.
    """

    image = "vision_tower"
    tower_types: ClassVar[tuple[type[PreTrainedModel], ...]] = (SiglipVisionModel,)
    tower_host: ClassVar[type[PatchGroupsHost]] = PatchGroupsHost
    is_joined: ClassVar[bool] = True

    def side(self, model: Any) -> int:
        """How many patches a side of a group has.

        Args:
            model: The dense model.
        """
        return 1

    def features(self, model: Any, patches: Tensor) -> Tensor:
        """Run the projector.

        Args:
            model: The model, dense or pruned.
            patches: The patches of each group, row by row, [groups, patches, dim].

        Returns:
            The visual tokens, [groups, dim].
        """
        return model.base_model.multi_modal_projector(patches).flatten(0, 1)

    def sizes(self, texts: PromptTexts, instances: int) -> Sequence[int] | Tensor:
        """Visual tokens of each instance before pruning: of images, which have equally many.

        Args:
            texts: The texts of the prompts, and of which prompt each placeholder is.
            instances: How many there are.
        """
        return [len(texts.prompt) // max(instances, 1)] * instances

    def image_tower(self, model: Any) -> tuple[nn.Module, Host]:
        tower: Any = model.base_model.get_submodule(self.image)
        if type(tower) not in self.tower_types:
            known = " or ".join(one.__name__ for one in self.tower_types)
            raise TypeError(
                f"cannot prune a {type(model).__name__} whose image tower is a {type(tower).__name__}, those of {known} can be"
            )
        host = self.tower_host(self.side(model))
        host.check(tower)
        return tower, host

    def projector_macs(self, model: Any) -> float:
        weight = next(model.base_model.get_submodule(self.image).parameters())
        patches = weight.new_zeros(1, self.side(model) ** 2, model.config.vision_config.hidden_size)
        return measure_macs(self.features, model, patches)

    def _prune(
        self, model: Any, modality: str, texts: PromptTexts | None, names: tuple[str, ...], *inputs: Any
    ) -> VisualRows:
        encoder = model.base_model.get_submodule(self.image)
        lengths: Sequence[int] | Tensor = () if texts is None else self.sizes(texts, len(inputs[0]))
        with compared(texts, lengths, lambda x: self.features(model, encoder.adapter.normed(encoder.host, x))):
            tokens, calls = encoder.encode(*inputs)
        self.check_weighs(model, tokens)
        prefix, batch = encoder.adapter.prefix(encoder.host), tokens.layout.batch
        if prefix:
            tokens = tokens.select(tokens.position >= prefix)
        features = self.features(model, encoder.adapter.head(encoder.host, tokens, calls).last_hidden_state)
        kept = torch.zeros(len(calls[0].grid) - prefix * batch, dtype=torch.bool, device=features.device)
        kept[calls[0].attention.row(tokens) - prefix * (tokens.layout.instance + 1)] = True
        output = split_by_image(BaseModelOutputWithPooling, features, tokens.layout.lengths)
        if self.is_joined:
            uniform = tokens.layout.is_uniform
            output.pooler_output = features.unflatten(0, (tokens.layout.batch, -1)) if uniform else features[None]
        width = int(calls[0].grid[:, 1].amax()) + 1
        grid = square_grid(1, len(kept) // width, width, kept.device)
        return VisualRows(output, kept, None, tokens.keep_prob, tokens.counted_prob, grid)


@hosts.register("transformers.models.paligemma.modeling_paligemma.PaliGemmaForConditionalGeneration")
class PaliGemmaComposite(GroupedComposite):
    """Composite of PaliGemma, whose positions begin with 1. All of a prompt sees all of it, also across windows."""

    is_block_exempt = True
    first_position = 1  # in `generate` it adds the one by itself


@hosts.register("transformers.models.idefics3.modeling_idefics3.Idefics3ForConditionalGeneration")
@hosts.register("transformers.models.smolvlm.modeling_smolvlm.SmolVLMForConditionalGeneration")
class ConnectedComposite(GroupedComposite):
    """Composite of Idefics3 and SmolVLM. A count is of all tiles of a prompt."""

    image = "vision_model"
    tower_types = (Idefics3VisionTransformer, SmolVLMVisionTransformer)
    tower_host = TilesHost
    is_joined = False

    def side(self, model: Any) -> int:
        return model.config.scale_factor

    def features(self, model: Any, patches: Tensor) -> Tensor:
        return model.base_model.connector(patches).flatten(0, 1)

    def sizes(self, texts: PromptTexts, instances: int) -> Tensor:
        # an instance is a prompt, with as many images as it has
        return texts.prompt.bincount(minlength=instances)


class ShuffledTowerComposite(GroupedComposite):
    """Composite of InternVL, pruned inside the image tower. Behind it `ShuffledComposite` prunes."""

    tower_types = (InternVLVisionModel,)
    tower_host = ShuffledHost

    def side(self, model: Any) -> int:
        return round(1 / model.config.downsample_ratio)

    def features(self, model: Any, patches: Tensor) -> Tensor:
        images = patches.unflatten(1, (self.side(model), -1))
        shuffled = model.base_model.pixel_shuffle(images, scale_factor=model.config.downsample_ratio)
        return model.base_model.multi_modal_projector(shuffled.flatten(1, 2)).flatten(0, 1)

    def image_tower(self, model: Any) -> tuple[nn.Module, Host]:
        layer = model.config.vision_feature_layer
        if layer != -1:
            raise ValueError(
                f"vision_feature_layer={layer}: the image tower is pruned inside where the projector reads its last block, -1: "
                "prune behind the projector, place='output' with at=None"
            )
        return super().image_tower(model)


@hosts.register("transformers.models.internvl.modeling_internvl.InternVLForConditionalGeneration")
class ShuffledComposite(RowsComposite):
    """Composite of InternVL, pruned behind the projector."""

    host = ShuffledRowsHost

    def inside(self, model: Any) -> ShuffledTowerComposite:
        return ShuffledTowerComposite(model)


@hosts.register("transformers.models.gemma3.modeling_gemma3.Gemma3ForConditionalGeneration")
class PooledComposite(GroupedComposite):
    """Composite of Gemma 3, whose visual tokens are means of groups."""

    def side(self, model: Any) -> int:
        return model.base_model.multi_modal_projector.kernel_size

    def features(self, model: Any, patches: Tensor) -> Tensor:
        projector: Any = shallow_copy(model.base_model.multi_modal_projector)
        projector.patches_per_image = self.side(model)
        return projector(patches).flatten(0, 1)
