"""Hugging Face transformers, taken apart. Importing this registers its towers and models."""

from . import blip, clip, dino, text, vit

__all__ = ["blip", "clip", "dino", "text", "vit"]
