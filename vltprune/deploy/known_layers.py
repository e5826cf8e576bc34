"""Where modules of the supported libraries have a linear layer with its activation, and a convolution of patches.

They are known by the dotted names of their classes, so that no library is imported. In an unknown class layers may be called in
any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

_BERT = ("bert.modeling_bert.Bert", "roberta.modeling_roberta.Roberta", "mpnet.modeling_mpnet.MPNet")
_BERT += ("xlm_roberta.modeling_xlm_roberta.XLMRoberta", "vilt.modeling_vilt.Vilt", "blip.modeling_blip_text.BlipText")
_MLP = ("vit.modeling_vit.ViT", "deit.modeling_deit.DeiT", "clip.modeling_clip.CLIP", "blip.modeling_blip.Blip")
_MLP += ("siglip.modeling_siglip.Siglip", "siglip2.modeling_siglip2.Siglip2")
_DINO = ("dinov2.modeling_dinov2.Dinov2", "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters")

# class -> the names of a linear layer and of the activation that is called on its output, and on nothing else
_ACTIVATED = {
    "timm.layers.mlp.Mlp": ("fc1", "act"),
    "vltprune.models.med.MedLayer": ("fc1", "activation"),
    "transformers.models.distilbert.modeling_distilbert.FFN": ("lin1", "activation"),
    **{f"transformers.models.{name}Intermediate": ("dense", "intermediate_act_fn") for name in _BERT},
    **{f"transformers.models.{name}MLP": ("fc1", "activation_fn") for name in _MLP},
    **{f"transformers.models.{name}MLP": ("fc1", "activation") for name in _DINO},
}

# class -> the name of a convolution whose result is flattened to patches, however it lies in memory
_PATCHES = {
    "timm.layers.patch_embed.PatchEmbed": "proj",
    "open_clip.transformer.VisionTransformer": "conv1",
    "transformers.models.vit.modeling_vit.ViTPatchEmbeddings": "projection",
    "transformers.models.deit.modeling_deit.DeiTPatchEmbeddings": "projection",
    "transformers.models.clip.modeling_clip.CLIPVisionEmbeddings": "patch_embedding",
}


def activated_layers(parent: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of linear layers in a module, each with that of the activation behind it.

    Args:
        parent: any module.

    Yields:
        The names of two children.
    """
    if type(parent) is nn.Sequential:
        yield from pairwise(parent._modules)
    elif (names := _ACTIVATED.get(_dotted(parent))) is not None:
        yield names


def patch_convolution(parent: nn.Module) -> nn.Conv2d | None:
    """The convolution of patches in a module, which do not overlap. None where there is none, or one of another kind."""
    conv = parent._modules.get(_PATCHES.get(_dotted(parent), ""))
    if type(conv) is not nn.Conv2d or conv.kernel_size != conv.stride:
        return None
    return conv if (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1) else None


def _dotted(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
