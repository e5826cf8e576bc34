"""Selectors as typed parts: prune(model, preset, selector=vltprune.selector.top())."""

from ..layers.assigning_selectors import Components, Dominant
from ..layers.diverse_selectors import Deduplicate, Dpp, MaxMin, Pivots, UnlikeImportant
from ..layers.grid_selectors import Anchors, Pool
from ..layers.matching_selectors import Bipartite, Energy, Graph, Window
from ..layers.mctf import Mctf
from ..layers.sampling_selectors import SampleCdf, Uniform, Windows
from ..layers.selectors import Top
from .typed import typed_part

anchors = typed_part(Anchors)
bipartite = typed_part(Bipartite)
components = typed_part(Components)
deduplicate = typed_part(Deduplicate)
dominant = typed_part(Dominant)
dpp = typed_part(Dpp)
energy = typed_part(Energy)
graph = typed_part(Graph)
max_min = typed_part(MaxMin)
mctf = typed_part(Mctf)
pivots = typed_part(Pivots)
pool = typed_part(Pool)
sample_cdf = typed_part(SampleCdf)
top = typed_part(Top)
uniform = typed_part(Uniform)
window = typed_part(Window)
unlike_important = typed_part(UnlikeImportant)
windows = typed_part(Windows)
