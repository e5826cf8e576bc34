"""Hugging Face transformers, taken apart. Importing this registers its towers and models."""

from . import clip, dino, text, vit

__all__ = ["clip", "dino", "text", "vit"]
