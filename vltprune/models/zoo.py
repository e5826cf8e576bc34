"""Registry of this library's own backbones: their classes and sizes, and the weights that are packaged with it.

Importing it imports no model.
"""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..registry import backbones, bind
from ..utils.frozen import FrozenDict, frozen

WEIGHTS = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class Backbone:
    """A registered backbone: a model class and the sizes it is built with. Calling it builds the dense model.

    Attributes:
        module: Module of the class, imported when it is needed.
        cls: Name of the class.
        sizes: Arguments of the class.
        mean: Mean of each color channel, of pixels in 0 .. 1; CLIP's, as in BLIP.
        std: Standard deviation of each color channel, of pixels in 0 .. 1.
    """

    module: str
    cls: str
    sizes: Mapping[str, Any] = field(default_factory=FrozenDict)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", frozen(self.sizes, "sizes"))

    def type(self) -> builtins.type[nn.Module]:
        """Import the model class."""
        return getattr(importlib.import_module(self.module), self.cls)

    def __call__(self, **model_args: Any) -> nn.Module:
        """Build the dense model.

        Args:
            **model_args: Arguments of the class, in place of this backbone's sizes.

        Raises:
            TypeError: For an argument that the class does not take.
        """
        cls = self.type()
        given = {**self.sizes, **model_args}
        bind(self.cls, cls, given)
        return cls(**given)


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
# tiny task models have two words more, as BLIP has two more than BERT: [DEC], which begins a sentence, and [ENC]
_TINY_TASK = {key: value for key, value in _TINY.items() if key != "merge_from"} | {"vocab_size": 59}
_TINY_DECODER = _TINY_TASK | {"bos_id": 57, "eos_id": 2}
_TINY_RETRIEVAL = _TINY_TASK | {"enc_id": 58}

_TASKS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    # the stem of the name, the class, what all sizes have in common, what the tiny one is
    ("blip", "blip.Blip", {}, _TINY),
    ("blip_nlvr", "blip.BlipNlvr", {}, _TINY),
    ("blip_caption", "caption.BlipCaption", {}, _TINY_DECODER | {"prompt": ()}),
    ("blip_vqa", "vqa.BlipVqa", {"image_size": 480}, _TINY_DECODER | {"enc_id": 58}),
    ("blip_retrieval", "retrieval.BlipRetrieval", {}, _TINY_RETRIEVAL),
)
for _stem, _cls, _common, _tiny in _TASKS:
    for _size, _sizes in (("tiny", _tiny), ("base", {}), ("large", _LARGE)):
        _module, _, _class = f"vltprune.models.{_cls}".rpartition(".")
        _pixels = {"mean": _HALF, "std": _HALF} if _size == "tiny" else {}  # between -1 and 1
        backbones.register(f"{_stem}_{_size}")(Backbone(_module, _class, {**_common, **_sizes}, **_pixels))

backbones.register("llava_tiny")(
    Backbone(
        "vltprune.models.llava",
        "build_llava",
        {
            "image_size": 96,
            "patch_size": 12,
            "vision_width": 128,
            "vision_depth": 6,
            "vision_heads": 4,
            "text_width": 128,
            "text_depth": 6,
            "text_heads": 4,
            "text_hidden": 256,
            "vocab_size": 61,
            "max_positions": 256,
            "image_id": 57,
            "eos_id": 60,
        },
        mean=_HALF,
        std=_HALF,
    )
)


def packaged(name: str) -> Path | None:
    """The folder of a name's weights ("backbone", "backbone_preset.tag") inside the package; None if there is none."""
    folder = WEIGHTS / name
    return folder if (folder / "config.json").is_file() else None


def packaged_names() -> list[str]:
    """The names whose weights are packaged, sorted."""
    return sorted(folder.name for folder in WEIGHTS.glob("*") if packaged(folder.name) is not None)
