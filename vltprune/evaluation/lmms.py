"""Models of lmms-eval, pruned: what `lmms-eval --model vltprune_llava --model_args pretrained=...,preset=fastervlm` runs.

lmms-eval finds them by the entry point `lmms_eval.models`. It is installed apart: nothing here imports it before it asks.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from ..cost.prune import prune

_PARTS = ("preset", "scorer", "keep", "selector", "reducer", "guide", "at", "place", "modality")


class _Base(NamedTuple):
    """A model of lmms-eval: its module, and its classes for plain prompts and for chat templates; None where it has none."""

    module: str
    simple: str | None
    chat: str | None


BASES = {
    "llava": _Base("llava_hf", "LlavaHf", "LlavaHf"),
    "qwen2_vl": _Base("qwen2_vl", "Qwen2_VL", None),
    "qwen2_5_vl": _Base("qwen2_5_vl", "Qwen2_5_VL", "Qwen2_5_VL"),
    "qwen3_vl": _Base("qwen3_vl", "Qwen3_VL", "Qwen3_VL"),
    "internvl": _Base("internvl_hf", None, "InternVLHf"),
    "gemma3": _Base("gemma3", "Gemma3", None),
}


def manifests() -> list[Any]:
    """What lmms-eval registers: a ModelManifest for each key of BASES, called `vltprune_<key>`."""
    manifest = importlib.import_module("lmms_eval.models.registry_v2").ModelManifest
    return [
        manifest(
            model_id=f"vltprune_{name}",
            simple_class_path=f"{__name__}.simple_{name}" if base.simple else None,
            chat_class_path=f"{__name__}.chat_{name}" if base.chat else None,
        )
        for name, base in BASES.items()
    ]


def __getattr__(name: str) -> type:
    """The classes that the manifests name, `simple_llava` and the like, made when lmms-eval asks for one."""
    kind, _, key = name.partition("_")
    base = BASES.get(key)
    found = getattr(base, kind, None) if kind in ("simple", "chat") else None
    if base is None or found is None:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return pruned_model(getattr(importlib.import_module(f"lmms_eval.models.{kind}.{base.module}"), found))


def pruned_model(base: type) -> type:
    """A model of lmms-eval whose `_model` is pruned when it is loaded.

    Args:
        base: a class of lmms-eval that holds a model of transformers as `_model`, and gives it unwrapped as `model`.

    Returns:
        A subclass. Beside the arguments of `base` it takes those of `vltprune.prune`, which a command line gives as strings or
        numbers: preset, which is required, and keep, scorer, selector, reducer, guide, at, place, modality.
    """

    class Pruned(base):
        def __init__(self, **named: Any):
            parts = {name: named.pop(name) for name in _PARTS if name in named}
            super().__init__(**named)
            # what Accelerate puts around a model is for training: processes evaluate apart
            self._model = prune(self.model, parts.pop("preset", None), **parts).eval()

    Pruned.__name__ = Pruned.__qualname__ = f"Pruned{base.__name__}"
    return Pruned
