"""Presets of methods that choose which tokens of a vision or text encoder stay."""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig
from ..stage import Stage


@presets.register("ats")
def ats() -> PruneConfig:
    """ATS (arXiv 2111.15667): samples of class attention times the length of values, at the 4th, 7th and 10th of twelve blocks.

    The keeper sets the most that an image keeps, K in the paper: `keep="count(count=...)"` or a ratio. Sampled tokens count
    once, so that images with few tokens of weight keep fewer.

    **Departs**: the reference samples at all of the last nine blocks, `at=range(3, 12)`. K that is no less than the number of
    tokens keeps all of them, where the reference still drops tokens that no sample chooses. No minimum of 8 tokens. The
    feed-forward of a block runs on what stays, as there; its attention computes the rows of all queries, where the reference
    computes those of sampled tokens. A single sample is in the middle.
    """
    return PruneConfig(
        scorer="ats", keep="ratio(ratio=0.7)", reducer="drop", selector="sample_cdf", at=(0.25, 0.5, 0.75)
    )


@presets.register("powerbert")
def powerbert() -> PruneConfig:
    """PoWER-BERT (arXiv 2001.08950), for texts: tokens that others attend to stay, fewer at each block.

    The score of a token is the attention that it receives from other tokens, summed over heads and queries.

    **Departs**: a ratio of each text's tokens stays, which falls less at later blocks. The paper learns how many stay at each
    block by soft extraction. A ratio is of the tokens that a text has; the reference counts its padding too.
    """
    return PruneConfig(scorer="column_attention(diagonal=False)", keep="ratio(ratio=0.7, decay=0.8)", reducer="drop")


@presets.register("zero_tprune")
def zero_tprune() -> PruneConfig:
    """Zero-TPrune (arXiv 2305.17328): removes unimportant tokens that resemble important ones, then the least important.

    Importance is PageRank on the graph of attention. At five of twelve blocks a ratio passes each of two stages: by
    similarity of keys between the less and the more important half, then by importance.

    **Departs**: there is no reference code; blocks and ratios are not the paper's. The order of the first stage is that of
    full PageRank, for which the paper has a single step, and it is divided into halves, not in turn. The number of steps is 30
    at every depth. Heads count alike: the paper's filter of heads by variance is left out.
    """
    blocks = (1 / 12, 3 / 12, 6 / 12, 9 / 12, 11 / 12)
    second = Stage("pagerank", "ratio(ratio=0.85)", "drop", at=blocks)
    return PruneConfig("pagerank", "ratio(ratio=0.85)", "drop", at=blocks, selector="unlike_important", then=(second,))


@presets.register("pooling")
def pooling() -> PruneConfig:
    """The baseline: patches are averaged in cells of a coarser grid once, at the first block; a quarter is 2 x 2 pooling.

    Means are taken behind the attention of the first block, whose attention therefore costs what it did. Sides that do not
    divide have cells of unequal size.
    """
    return PruneConfig(
        scorer="equal", keep="ratio(ratio=0.25)", reducer="merge(weights='equal')", selector="pool", at=0
    )
