"""Selectors as typed parts: prune(model, preset, selector=vltprune.selector.top())."""

from ..layers.selectors.assigning import Clusters, Components, Dominant, Evenly
from ..layers.selectors.base import Top
from ..layers.selectors.diverse import Deduplicate, Dpp, MaxMin, Pivots, UnlikeImportant
from ..layers.selectors.grid import Anchors, Pool
from ..layers.selectors.matching import Bipartite, Energy, Graph, Window
from ..layers.selectors.mctf import Mctf
from ..layers.selectors.sampling import SampleCdf, Uniform, Windows
from .typed import typed_part

anchors = typed_part(Anchors)
bipartite = typed_part(Bipartite)
clusters = typed_part(Clusters)
components = typed_part(Components)
deduplicate = typed_part(Deduplicate)
dominant = typed_part(Dominant)
dpp = typed_part(Dpp)
energy = typed_part(Energy)
evenly = typed_part(Evenly)
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
