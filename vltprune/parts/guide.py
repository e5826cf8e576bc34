"""Guides as typed parts: prune(model, preset, guide=vltprune.guide.codebook(anchors=100))."""

from ..layers.guides import Codebook
from .typed import typed_part

codebook = typed_part(Codebook)
