"""Hosts of Hugging Face transformers. Importing this registers its towers and models."""

import transformers

# before, the same models had their parts under other names
_OLDEST = (5, 24)
if tuple(map(int, transformers.__version__.split(".")[:2])) < _OLDEST:
    raise ImportError(
        f"models of transformers {transformers.__version__} cannot be pruned, those of {'.'.join(map(str, _OLDEST))} and later "
        "can: pip install 'vltprune[hf]'"
    )

from . import blip, clip, dino, heads, language, modernbert, patch_groups, qformer, qwen_vision, text, vilt, vit, vlm  # noqa: E402
from .vlm import generic_composite  # noqa: E402

__all__ = [
    "blip",
    "clip",
    "dino",
    "generic_composite",
    "heads",
    "language",
    "modernbert",
    "patch_groups",
    "qformer",
    "qwen_vision",
    "text",
    "vilt",
    "vit",
    "vlm",
]
