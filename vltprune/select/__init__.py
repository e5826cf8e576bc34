"""Token selection as functions of one instance's features [n, dim]: which tokens stay, and into which the others merge.

They decide as the selectors of pruned models do, for use outside of one: between a vision tower and a language model, say.
Features may have any floating-point dtype and be on any device; everything is computed in single precision at least.
Similarities and scores that are equal within rounding tie, and ties go by position.
"""

from ..layers.algorithms.sampling import grid_windows
from .choosing import deduplicate, dpp, max_min, outliers, pivots, sample_cdf, spread_uniform, windows
from .matching import bipartite, components, energy, graph, local_pairs, nearest

__all__ = [
    "bipartite",
    "components",
    "deduplicate",
    "dpp",
    "energy",
    "graph",
    "grid_windows",
    "local_pairs",
    "max_min",
    "nearest",
    "outliers",
    "pivots",
    "sample_cdf",
    "spread_uniform",
    "windows",
]
