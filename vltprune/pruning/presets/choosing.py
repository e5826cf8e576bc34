"""Presets of methods that choose which tokens of a vision or text encoder stay."""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig


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
