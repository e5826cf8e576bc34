"""Presets of methods that are trained: thresholds, predictors and halting that learn what to keep."""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig


@presets.register("ltp")
def ltp() -> PruneConfig:
    """LTP (arXiv 2107.00910): at every block tokens stay whose mean attention is above a learned threshold.

    Train it with `budget="learned"` (docs/compress.md). Thresholds begin as a line over the blocks.

    **Departs**: tokens leave, also in soft training, where the reference masks them. Padding has no influence on scores.
    Thresholds are in units of 1 / n (`rising_threshold`). A loss on the expected MACs takes the place of the mean mask's, which
    `losses={"kept_share": 0.01}` adds.
    """
    return PruneConfig(scorer="column_attention", keep="rising_threshold(final=1.0)")


@presets.register("asvit")
def asvit() -> PruneConfig:
    """AS-ViT (arXiv 2209.13802): class attention weighted by head, above a learned threshold, at three of twelve blocks.

    Train it with `budget="learned"` (docs/compress.md), which has AS-ViT's loss on the MACs.

    **Departs**: counts are per instance in any batch; the reference keeps the batch's mean count of every image. Thresholds are
    in standard deviations of an instance's scores, and so is the temperature of their gradient, which is 1. The three
    blocks are EViT's and DynamicViT's; AS-ViT's own were not at hand.
    """
    return PruneConfig(scorer="cls_attention", keep="learned(threshold=-0.5, hard=True)", at=(0.25, 0.5, 0.75))


@presets.register("dynamicvit")
def dynamicvit() -> PruneConfig:
    """DynamicViT (arXiv 2106.02034): a small network keeps 70 % before the 4th, 7th and 10th of twelve blocks.

    The network is random until it is trained: without training it is no better than `random`. Train it with
    `budget="learned"`, `losses={"keep_ratio": 2.0}`, `distill=0.5` and `distill_tokens=0.5` (docs/compress.md).

    **Departs**: it prunes behind the block before, which is the same place. Kept tokens stay in the order of the sequence. In
    training, a masked token does not attend to itself. Counts are ceil(.7 n) of the tokens that enter. Networks of text towers
    are trained alike; the paper has images alone.
    """
    # a little less than 1/4, 1/2 and 3/4 of the depth: the block before
    return PruneConfig(scorer="predictor", keep="sampled_ratio(ratio=0.7)", at=(0.24, 0.49, 0.74), place="block")


@presets.register("avit")
def avit() -> PruneConfig:
    """A-ViT (arXiv 2112.07658): behind every block a token leaves where its halting probabilities sum to 1.

    The probabilities read the first entry of a token, which training shapes: `budget="learned"` and
    `losses={"ponder": 5e-4, "halting_prior": 0.1}` (docs/compress.md). Without training they are arbitrary. A budget moves the
    sum at which tokens halt: a threshold t makes it (1 - eps) exp(-t).

    **Departs**: tokens leave, where the reference masks them. The output is that of the class token behind the last block. The
    paper sums its states over the layers, weighted by their halting probabilities. So the class token does not halt, and the
    task's loss reaches the probabilities through soft training. Where the output is a mean of tokens, the last one stays.
    """
    return PruneConfig(scorer="halting", keep="above(threshold=0.0)", place="block")
