"""The backbones no installed package offers: their sizes, and where weights lie. Data only; importing it imports no model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..registry import backbones, bind

WEIGHTS = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class Backbone:
    """A model class, by module and name, and the sizes that make it this backbone. Calling it builds the dense model.

    mean, std: what its pixels, between 0 and 1, are normalised by (CLIP's, as BLIP does).
    """

    module: str
    cls: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def type(self) -> type[nn.Module]:
        return getattr(importlib.import_module(self.module), self.cls)

    def __call__(self, **model_args: Any) -> nn.Module:
        """TypeError for an argument that the class does not take."""
        cls = self.type()
        bind(f"{self.cls}", cls, model_args)
        return cls(**{**self.sizes, **model_args})


_TINY = {
    "image_size": 96,
    "patch_size": 8,
    "vision_width": 128,
    "vision_depth": 6,
    "vision_heads": 4,
    "text_width": 128,
    "text_depth": 4,
    "text_heads": 4,
    "vocab_size": 57,
    "max_positions": 32,
    "merge_from": 2,
}
_HALF = (0.5, 0.5, 0.5)
_LARGE = {"vision_width": 1024, "vision_depth": 24, "vision_heads": 16}

for _stem, _cls in (("blip", "Blip"), ("blip_nlvr", "BlipNlvr")):
    for _size, _sizes in (("tiny", _TINY), ("base", {}), ("large", _LARGE)):
        _pixels = {"mean": _HALF, "std": _HALF} if _size == "tiny" else {}  # between -1 and 1
        backbones.register(f"{_stem}_{_size}")(Backbone("vltprune.models.blip", _cls, _sizes, **_pixels))


def packaged(name: str) -> Path | None:
    """The folder of weights of this name ("backbone", "backbone_preset.tag") inside the package, None without one."""
    folder = WEIGHTS / name
    return folder if (folder / "config.json").is_file() else None
