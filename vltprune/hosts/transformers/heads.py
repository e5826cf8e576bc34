"""Composites of transformers with one tower and a head that uses a protected token: classifiers and projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...layers.guides.base import TokenProjection
from ...registry import hosts
from ..base import Composite, Host
from ..find import find_host
from ..graft import with_submodule
from ..linear_maps import linear_macs
from ..ops import image_projection
from .saving import with_pruning_saved


@hosts.register("transformers.models.bert.modeling_bert.BertForSequenceClassification")
@hosts.register("transformers.models.roberta.modeling_roberta.RobertaForSequenceClassification")
@hosts.register("transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaForSequenceClassification")
@hosts.register("transformers.models.mpnet.modeling_mpnet.MPNetForSequenceClassification")
@hosts.register("transformers.models.modernbert.modeling_modernbert.ModernBertForSequenceClassification")
@hosts.register("transformers.models.distilbert.modeling_distilbert.DistilBertForSequenceClassification")
@hosts.register("transformers.models.vit.modeling_vit.ViTForImageClassification")
@hosts.register("transformers.models.deit.modeling_deit.DeiTForImageClassification")
@hosts.register("transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher")
@hosts.register("transformers.models.clip.modeling_clip.CLIPTextModelWithProjection")
@hosts.register("transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection")
@hosts.register("transformers.models.vilt.modeling_vilt.ViltForQuestionAnswering")
@hosts.register("transformers.models.vilt.modeling_vilt.ViltForImageAndTextRetrieval")
@hosts.register("transformers.models.vilt.modeling_vilt.ViltForImagesAndTextClassification")
class HeadComposite(Composite):
    """Composite of the model's base tower (`base_model_prefix`); its other children are the head."""

    def towers(self, model: PreTrainedModel) -> dict[str, tuple[nn.Module, Host]]:
        pooling = getattr(model.config, "classifier_pooling", "cls")
        if pooling != "cls":
            raise ValueError(
                f"cannot prune this {type(model).__name__}: its classifier_pooling is {pooling!r}, over tokens of which some "
                "would be pruned. Supported: 'cls'"
            )
        tower = getattr(model, model.base_model_prefix)
        host = find_host(tower)
        return {host.tower: (tower, host)}

    def assemble(self, model: PreTrainedModel, towers: Mapping[str, nn.Module]) -> nn.Module:
        [tower] = towers.values()
        return with_pruning_saved(with_submodule(model, model.base_model_prefix, tower))

    def projections(self, model: Any) -> dict[str, TokenProjection]:
        tower = getattr(model, model.base_model_prefix)
        return image_projection(getattr(tower, "post_layernorm", None), getattr(model, "visual_projection", None))

    def head_macs(self, model: PreTrainedModel) -> float:
        heads = [child for name, child in model.named_children() if name != model.base_model_prefix]
        return sum(map(linear_macs, heads))
