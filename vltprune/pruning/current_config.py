"""current_config: the config of a pruned model with the arguments that were set since it was pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..registry import parameters
from ..utils.structure import attributes
from ..utils.wrappers import unwrapped
from .config import PruneConfig
from .encoder import PrunedEncoder
from .part import KINDS

_PARTS = {
    "scorer": "scorer",
    "keep": "keeper",
    "selector": "selector",
    "reducer": "reducer",
}  # kind -> attribute of a pruner


def current_config(config: PruneConfig, towers: Mapping[str, PrunedEncoder]) -> PruneConfig:
    """The config that builds the pruners of these towers as they are now.

    Args:
        config: the config that they were built with.
        towers: the pruned towers by name.

    Returns:
        The config, with the arguments that were set since.

    Raises:
        ValueError: where no config builds them: parts of another type, other depths, arguments that differ between depths.
    """
    changed = {(kind, tower): _changed(config, kind, tower, towers[tower]) for kind in _PARTS for tower in towers}
    pruned = [tower for tower in towers if towers[tower].pruners]
    for kind in _PARTS:
        changes = {tower: changed[kind, tower] for tower in pruned}
        if not any(changes.values()):
            continue
        part = getattr(config, kind)
        parts = {tower: config.part(kind, tower).replace(**changes[tower]) for tower in pruned}
        alike = all(one == parts[pruned[0]] for one in parts.values())
        if kind != "keep" and not alike:
            raise _refusal(f"its towers have different {kind}s: {', '.join(map(str, parts.values()))}")
        by_tower = {**part, **parts} if isinstance(part, Mapping) else parts
        replaced: dict[str, Any] = {kind: parts[pruned[0]] if alike and not isinstance(part, Mapping) else by_tower}
        config = config.replace(**replaced)
    remaining = [_changed(config, kind, tower, towers[tower]) for kind in _PARTS for tower in pruned]
    if any(remaining):
        raise _refusal(f"its parts have arguments that no config can set: {next(filter(None, remaining))!r}")
    return config


def _changed(config: PruneConfig, kind: str, tower: str, encoder: PrunedEncoder) -> dict[str, object]:
    """Arguments of a tower's parts of one kind that are not what the config builds, by their values now."""
    with torch.random.fork_rng(devices=[]):
        built = encoder.build_pruners(config)
    depths = {int(depth) for depth in encoder.pruners}
    if depths != {int(depth) for depth in built}:
        raise _refusal(
            f"its {tower} tower is pruned at {sorted(depths)}, and its config says {sorted(map(int, built))}"
        )
    found: list[dict[str, object]] = []
    for depth, pruner in encoder.pruners.items():
        part = unwrapped(getattr(pruner, _PARTS[kind]))
        original = getattr(built[depth], _PARTS[kind])
        if type(part) is not type(original):
            raise _refusal(
                f"the {kind} of its {tower} tower at {depth} is {type(part).__name__} and was {type(original).__name__}"
            )
        now, then = attributes(part), attributes(original)
        found.append(
            {name: now.get(name) for name in original.arguments if name in then and now.get(name) != then[name]}
        )
    maker = KINDS[kind][0][config.part(kind, tower).name] if found else None
    accepted = {parameter.name for parameter in parameters(maker)} if maker is not None else set()
    for name in (name for one in found for name in one if name not in accepted):
        raise _refusal(f"{name} of the {kind} of its {tower} tower was set, and its maker takes no argument {name!r}")
    if any(one != found[0] for one in found):
        raise _refusal(f"the {kind} of its {tower} tower has other arguments at some depths than at others: {found}")
    return found[0] if found else {}


def _refusal(why: str) -> ValueError:
    return ValueError(
        f"cannot save this pruned model: {why}, which would not come back. Nothing was written. Prune its dense model anew, "
        "vltprune.prune(model.host, config), with the parts and depths that you want"
    )
