"""Small models that several tests share: random everywhere, so that no option is a no-op, and inputs for them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vltprune as vp
from vltprune.models.blip import Blip, BlipNlvr
from vltprune.pruning.pruner import Pruner

BLIP = {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 32,
    "vision_depth": 4,
    "vision_heads": 2,
    "text_width": 32,
    "text_depth": 4,
    "text_heads": 2,
    "vocab_size": 40,
    "max_positions": 16,
    "merge_from": 2,
}


@dataclass(frozen=True)
class Small:
    """A dense model and how to draw `batch` instances of input for it; `take(inputs, rows)` picks some of them."""

    model: nn.Module
    draw: Callable[[int], tuple[Tensor, ...]]

    def take(self, inputs: tuple[Tensor, ...], rows: Any) -> tuple[Tensor, ...]:
        return tuple(column[rows] for column in inputs)


def scrambled(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew, large enough for attention to be uneven, in evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                fan = parameter[0].numel() if parameter.dim() > 1 else 1
                parameter.normal_(std=1.5 * fan**-0.5 if parameter.dim() > 1 else 0.3)
    return model.eval()


def images(*leading: int) -> Tensor:
    """[*leading, 3, 32, 32]: patches of very different contrast, so that instances keep different counts."""
    contrast = torch.rand(*leading, 1, 4, 4).repeat_interleave(8, -1).repeat_interleave(8, -2) ** 3
    return 3 * torch.randn(*leading, 3, 32, 32) * contrast


def sentences(batch: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [batch, 12], from one real token to twelve."""
    sizes = torch.randint(1, 13, (batch, 1))
    return torch.randint(1, 40, (batch, 12)), (torch.arange(12) < sizes).long()


def soften(model: nn.Module, soft_temperature: float) -> nn.Module:
    """The pruned model as in soft training; at 0 as in evaluation."""
    model.train(soft_temperature > 0)
    for pruner in model.modules():
        if isinstance(pruner, Pruner):
            pruner.soft_temperature = soft_temperature
    return model


def pairs(batch: int) -> tuple[Tensor, ...]:
    """What ViLT reads: input_ids, attention_mask, token_type_ids, pixel_values [batch, 3, 32, 40] and pixel_mask.

    Images are from one patch to all 20, each in the upper left of its padding.
    """
    ids, mask = sentences(batch)
    rows, columns = torch.randint(1, 5, (batch, 1)), torch.randint(1, 6, (batch, 1))
    real = (torch.arange(32) < 8 * rows)[:, :, None] & (torch.arange(40) < 8 * columns)[:, None]
    contrast = torch.rand(batch, 1, 4, 5).repeat_interleave(8, -1).repeat_interleave(8, -2) ** 3
    pixels = 3 * torch.randn(batch, 3, 32, 40) * contrast * real[:, None]
    return ids, mask, torch.zeros_like(ids), pixels, real.long()


def vilt(depth: int = 4, **options: Any) -> nn.Module:
    """A random ViltForImageAndTextRetrieval without dropout; `options` of its configuration."""
    import transformers as hf

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"image_size": 32, "patch_size": 8, "max_position_embeddings": 16, "num_hidden_layers": depth}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return scrambled(hf.ViltForImageAndTextRetrieval(hf.ViltConfig(**sizes, **still, **options)))


def guide_for(scorer: str, guide: str = "codebook") -> str:
    """The guide that a scorer reads: a text where it needs one, else the one given."""
    return "text_query" if scorer == "query_attention" else guide


def asked(model: nn.Module, *inputs: Tensor) -> contextlib.AbstractContextManager[None]:
    """The text of each image, read off its pixels so that it goes where the image goes; nothing where no text is read."""
    guide, pixels = model.pruning.guide, [one for one in inputs if one.dim() >= 4]
    if guide is None or not guide.queried or not pixels:
        return contextlib.nullcontext()
    images = pixels[0]
    return vp.query(images.reshape(-1, *images.shape[-3:]).flatten(1)[:, : guide.query_dim])


@functools.cache
def small(name: str) -> Small:
    """ "vit", "text", "blip", "nlvr", "vilt": always the same random model."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if name == "vit":
            sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
            return Small(scrambled(VisionTransformer(**sizes)), lambda n: (images(n),))
        if name == "text":
            return Small(scrambled(Blip(**BLIP)).text, sentences)
        if name == "blip":
            return Small(scrambled(Blip(**BLIP)), lambda n: (images(n), *sentences(n)))
        if name == "vilt":
            return Small(vilt(), pairs)
        return Small(scrambled(BlipNlvr(**BLIP)), lambda n: (images(n, 2), *sentences(n)))


NAMES = ("vit", "text", "blip", "nlvr")
# what prunes towers of one modality; "vilt" has both in one sequence, and takes the others too


# those of language models name their tower
OF_LANGUAGE = tuple(name for name in vp.presets.names() if "language" in (vp.preset(name).to_dict()["at"] or ()))
SCORERS = tuple(name for name in vp.scorers.names() if not getattr(vp.scorers[name], "needs", vp.Stat.NONE).of_text)


def _takes_any_modality(config: vp.PruneConfig) -> bool:
    return all(stage.modality is None and stage.part("scorer").name in SCORERS for stage in config.stages)


PRESETS = tuple(name for name in vp.presets.names() if name not in OF_LANGUAGE and _takes_any_modality(vp.preset(name)))
