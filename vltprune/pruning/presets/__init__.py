"""Presets: named PruneConfigs, one module for each family of methods."""

from __future__ import annotations

from ...registry import presets
from ..config import PruneConfig
from . import choosing, fusion, language, merging, scoring, trained, vlm

__all__ = ["choosing", "fusion", "language", "merging", "preset", "scoring", "trained", "vlm"]


def preset(name: str) -> PruneConfig:
    """The PruneConfig of a registered preset.

    Args:
        name: the registered name, as `vltprune.presets.names()` lists them.

    Returns:
        The config, with which `vltprune.prune` prunes any model.

    Raises:
        LookupError: for another name, with the nearest ones.
    """
    return presets[name]()
