"""Selectors as typed parts: prune(model, preset, selector=vltprune.selector.top())."""

from ..layers.diverse_selectors import Deduplicate, Dpp, MaxMin, Pivots
from ..layers.matching_selectors import Bipartite, Energy, Graph, Window
from ..layers.mctf import Mctf
from ..layers.sampling_selectors import SampleCdf, Uniform, Windows
from ..layers.selectors import Top
from .typed import typed_part

bipartite = typed_part(Bipartite)
deduplicate = typed_part(Deduplicate)
dpp = typed_part(Dpp)
energy = typed_part(Energy)
graph = typed_part(Graph)
max_min = typed_part(MaxMin)
mctf = typed_part(Mctf)
pivots = typed_part(Pivots)
sample_cdf = typed_part(SampleCdf)
top = typed_part(Top)
uniform = typed_part(Uniform)
window = typed_part(Window)
windows = typed_part(Windows)
