"""Presets: named PruneConfigs, one module for each family of methods."""

from __future__ import annotations

from ...registry import bind, name_arguments, presets
from ..config import PruneConfig
from ..part import parse_short_form
from . import choosing, fusion, language, merging, scoring, trained, vlm

__all__ = ["choosing", "fusion", "language", "merging", "preset", "scoring", "trained", "vlm"]


def preset(name: str) -> PruneConfig:
    """The PruneConfig of a registered preset.

    Args:
        name: the registered name, as `vltprune.presets.names()` lists them. A preset that takes arguments has them behind it,
            "sparsevlm(tokens=96)" or "sparsevlm(96)".

    Returns:
        The config, with which `vltprune.prune` prunes any model.

    Raises:
        LookupError: for another name, with the nearest ones.
        TypeError, ValueError: for arguments that the preset does not take.
    """
    if "(" not in name:
        return presets[name]()
    name, values, arguments = parse_short_form(name, positional=True)
    maker, what = presets[name], f"preset {name!r}"
    named = name_arguments(what, maker, values, arguments)
    bind(what, maker, named)
    return maker(**named)
