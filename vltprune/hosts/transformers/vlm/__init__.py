"""Composites of vision-language models of transformers that have a language model."""

from . import grouped, llava, qwen, tiles, tower_rows
from .rows import generic_composite

__all__ = ["generic_composite", "grouped", "llava", "qwen", "tiles", "tower_rows"]
