"""Command-line options that say how a model is pruned: a preset, and single parts in place of the preset's."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from ..models.catalog import ModelName
from ..models.factory import PARTS
from ..models.resolve import is_saved_model
from ..pruning.part import KINDS
from ..pruning.stage import Place
from . import options

PRESET = "attention"  # for use without training


def add(parser: argparse.ArgumentParser) -> None:
    """--preset, an option for each kind of part, --at and --place."""
    group = parser.add_argument_group(
        "pruning", "A model that has a preset in its name, or was saved pruned, keeps that pruning."
    )
    group.add_argument(
        "--preset",
        type=options.preset,
        metavar="NAME",
        help=f"how to prune a dense model; `vltprune list --presets` has the names (default: {PRESET})",
    )
    for name in KINDS:
        none = ", or none" if name == "guide" else ""
        group.add_argument(
            f"--{name}",
            type=options.part(name),
            metavar="PART",
            help=f"as name, 'name(value)' or 'name(key=value)'{none} (default: the preset's)",
        )
    group.add_argument(
        "--at",
        type=options.depths,
        metavar="DEPTHS",
        help="blocks to prune at, such as 3,6,9, or --at=-1 for the last (default: the preset's)",
    )
    group.add_argument(
        "--place",
        choices=get_args(Place),
        help="before these blocks, between their attention and MLP, behind them, or behind the tower (default: the preset's)",
    )


def replaced_parts(args: argparse.Namespace) -> dict[str, Any]:
    """The parts that the options replace, as `prune` takes them."""
    parts = {name: getattr(args, name) for name in PARTS if getattr(args, name, None) is not None}
    if parts.get("guide") == "none":
        parts["guide"] = None
    return parts


def check_preset(args: argparse.Namespace) -> None:
    """Refuse --preset for a model whose name has a preset already. Loads nothing."""
    if args.preset and not is_saved_model(args.model) and ModelName.parse(args.model).preset is not None:
        raise ValueError(
            f"--preset {args.preset}: {args.model} names a preset already: leave --preset out, or name the dense model"
        )
