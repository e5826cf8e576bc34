"""Selectors as typed parts: prune(model, preset, selector=vltprune.selector.top())."""

from ..layers.selectors import Top
from .typed import typed_part

top = typed_part(Top)
