"""Guides as typed parts: prune(model, preset, guide=vltprune.guide.codebook(anchors=100))."""

from ..layers.guides.base import Codebook
from ..layers.guides.text import TextEmbedding, TextQuery
from .typed import typed_part

codebook = typed_part(Codebook)
text_embedding = typed_part(TextEmbedding)
text_query = typed_part(TextQuery)
