"""Presets: named PruneConfigs for use without training and with it, and published methods with their papers."""

from __future__ import annotations

from ..registry import presets
from .config import PruneConfig


def preset(name: str) -> PruneConfig:
    """The PruneConfig of a registered preset.

    Args:
        name: the registered name, as `vltprune.presets.names()` lists them.

    Raises:
        LookupError: for another name, with the nearest ones.
    """
    return presets[name]()


@presets.register("attention")
def attention() -> PruneConfig:
    """For use without training: the least attended tokens are fused, as many as an error allows, which a budget sets.

    Tokens that resemble each other share what attention they receive. Without a guide it fits any tower. On photographs it
    recalls more than a ratio for all, and on pages more than plain attention does (docs/ablations.md).
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
    """For training: MADTP's scores and guide, and a ratio for all instances that prunes most at the first block.

    Trained to 70 % fewer MACs it recalls 42.6 on photographs after 600 steps, and MADTP's threshold with the same decay 37.3
    (docs/ablations.md).
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


@presets.register("random")
def random() -> PruneConfig:
    """The baseline: at every block 85 % of the tokens stay, whichever they are."""
    return PruneConfig(scorer="random", keep="ratio(ratio=0.85)", reducer="drop")
