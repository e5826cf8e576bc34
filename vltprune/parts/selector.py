"""Selectors as typed parts: prune(model, preset, selector=vltprune.selector.top())."""

from ..layers.diverse_selectors import Deduplicate, Dpp, MaxMin, Pivots
from ..layers.matching_selectors import Bipartite
from ..layers.sampling_selectors import SampleCdf, Uniform, Windows
from ..layers.selectors import Top
from .typed import typed_part

bipartite = typed_part(Bipartite)
deduplicate = typed_part(Deduplicate)
dpp = typed_part(Dpp)
max_min = typed_part(MaxMin)
pivots = typed_part(Pivots)
sample_cdf = typed_part(SampleCdf)
top = typed_part(Top)
uniform = typed_part(Uniform)
windows = typed_part(Windows)
