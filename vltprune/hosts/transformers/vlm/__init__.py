"""Composites of vision-language models of transformers that have a language model."""

from . import llava

__all__ = ["llava"]
