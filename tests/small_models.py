"""Small models that several tests share: random everywhere, so that no option is a no-op, and inputs for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

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


@functools.cache
def small(name: str) -> Small:
    """ "vit", "text", "blip", "nlvr": always the same random model."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if name == "vit":
            sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
            return Small(scrambled(VisionTransformer(**sizes)), lambda n: (images(n),))
        if name == "text":
            return Small(scrambled(Blip(**BLIP)).text, sentences)
        if name == "blip":
            return Small(scrambled(Blip(**BLIP)), lambda n: (images(n), *sentences(n)))
        return Small(scrambled(BlipNlvr(**BLIP)), lambda n: (images(n, 2), *sentences(n)))


NAMES = ("vit", "text", "blip", "nlvr")
