"""Presets that keep tokens by their scores: for use without training and with it, and published methods with their papers."""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig


@presets.register("attention")
def attention() -> PruneConfig:
    """For use without training: tokens with little attention are fused, as many of each instance as an error allows.

    Tokens that resemble each other share the attention that they receive. No guide is needed, so that it fits any tower. A
    budget sets the error. At half the MACs of 256 patches, `distortion` recalls 48.8 of 53.1 points on photographs and a ratio
    45.7. On pages `distinct_attention` recalls 31.2 and `self_attention` 21.8 (docs/results.md, docs/ablations.md).
    """
    return PruneConfig(scorer="distinct_attention", keep="distortion(error=0.1)", reducer="fuse")


@presets.register("madtp")
def madtp() -> PruneConfig:
    """MADTP (arXiv 2403.02991): shared anchors guide a threshold per instance at every block; the rest is fused.

    Departs from the reference code in what docs/parity.md lists; counts are per instance, not the batch's maximum.
    """
    return PruneConfig(scorer="madtp", keep="threshold(temperature=1.0)", reducer="fuse", guide="codebook(anchors=100)")


@presets.register("madtp_decay")
def madtp_decay() -> PruneConfig:
    """For training: MADTP's scores and guide, and one ratio for all instances that prunes most at the first block.

    At 70 % fewer MACs it recalls 42.6 on photographs after 600 steps, and MADTP's threshold with the same decay 37.3. At 80 %
    it answers 77.1 % of synthetic pairs after 300 steps, and `madtp` 71.9 % (docs/ablations.md).
    """
    return PruneConfig(
        scorer="madtp", keep="ratio(ratio=0.5, decay=0.25)", reducer="fuse", guide="codebook(anchors=32)"
    )


@presets.register("evit")
def evit() -> PruneConfig:
    """EViT (arXiv 2202.07800): mean class attention keeps 70 % at the 4th, 7th and 10th of twelve blocks; the rest is fused."""
    return PruneConfig(
        scorer="mean_cls_attention",
        keep="ratio(ratio=0.7)",
        reducer="fuse(normalize=False)",
        at=(0.25, 0.5, 0.75),
    )


@presets.register("trips")
def trips() -> PruneConfig:
    """TRIPS (arXiv 2403.07883): a text's attention keeps 70 % of the patches at two of twelve blocks; the rest is fused.

    They are the 5th and the 10th. The text's class token becomes a query by the block's own projection, and attends to the
    keys of the patches. So the text runs first: `with vltprune.query(model.encode_text(texts)): model.encode_image(images)`.
    Text towers are not pruned.

    **Departs**: there is no reference code. A linear layer (`text_query`) lets the text have another width than the tower. It
    begins as the identity between equal widths, and has to be trained between others. The text passes the block's norm as
    patches do. Attention is the mean over heads. The weights of the fused token sum to one.
    """
    return PruneConfig(
        scorer="query_attention",
        keep="ratio(ratio=0.7)",
        reducer="fuse",
        guide="text_query",
        at={"image": (1 / 3, 0.75)},
    )


@presets.register("random")
def random() -> PruneConfig:
    """The baseline: at every block 85 % of the tokens stay, chosen at random; the rest is dropped."""
    return PruneConfig(scorer="random", keep="ratio(ratio=0.85)", reducer="drop")
