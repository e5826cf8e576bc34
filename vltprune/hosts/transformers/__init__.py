"""Hugging Face transformers, taken apart. Importing this registers its towers and models."""

import transformers

_OLDEST = (5, 24)  # before, the same models kept their parts elsewhere
if tuple(map(int, transformers.__version__.split(".")[:2])) < _OLDEST:
    raise ImportError(
        f"models of transformers {transformers.__version__} cannot be pruned, those of {'.'.join(map(str, _OLDEST))} and later "
        "can: pip install 'vltprune[hf]'"
    )

from . import blip, clip, dino, heads, modernbert, text, vit  # noqa: E402

__all__ = ["blip", "clip", "dino", "heads", "modernbert", "text", "vit"]
