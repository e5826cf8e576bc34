"""Presets of methods that merge similar tokens."""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig


@presets.register("tome")
def tome() -> PruneConfig:
    """ToMe (arXiv 2210.09461): at every block the 8 most similar pairs merge, and attention is in proportion to size.

    The results are those of the published algorithm with `keep="remove(r=8)"`, for any r.

    **Departs**: tokens stay in the order of the sequence. Averages over the tokens of a tower weigh them by size.
    """
    return PruneConfig(
        scorer="equal", keep="remove(r=8)", selector="bipartite", reducer="merge(weights='size', proportional=True)"
    )
