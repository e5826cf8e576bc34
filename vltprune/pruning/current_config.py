"""current_config: the config of a pruned model with the arguments that were set since it was pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..registry import parameters
from ..utils.structure import attributes
from ..utils.wrappers import unwrapped
from .config import PruneConfig
from .encoder import PrunedEncoder
from .part import KINDS
from .stage import Stage
from .tower import stage_number

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
    built = {name: _built(config, tower) for name, tower in towers.items()}
    stages = tuple(_current_stage(number, stage, towers, built) for number, stage in enumerate(config.stages))
    config = config.with_stages(stages)
    built = {name: _built(config, tower) for name, tower in towers.items()}
    for number, stage in enumerate(config.stages):
        for kind in _PARTS:
            for name, tower in towers.items():
                remaining = _changed(number, stage, kind, tower, built[name])
                if remaining:
                    raise _refusal(f"its parts have arguments that no config can set: {remaining!r}")
    return config


def _current_stage(
    number: int, stage: Stage, towers: Mapping[str, PrunedEncoder], built: Mapping[str, nn.ModuleDict]
) -> Stage:
    """A stage with the arguments that its parts have now."""
    pruned = [name for name, tower in towers.items() if _pruners(tower.pruners, number)]
    for kind in _PARTS:
        changes = {name: _changed(number, stage, kind, towers[name], built[name]) for name in pruned}
        if not any(changes.values()):
            continue
        part = getattr(stage, kind)
        parts = {name: stage.part(kind, name).replace(**changes[name]) for name in pruned}
        alike = all(one == parts[pruned[0]] for one in parts.values())
        if kind != "keep" and not alike:
            raise _refusal(f"its towers have different {kind}s: {', '.join(map(str, parts.values()))}")
        by_tower = {**part, **parts} if isinstance(part, Mapping) else parts
        replaced: dict[str, Any] = {kind: parts[pruned[0]] if alike and not isinstance(part, Mapping) else by_tower}
        stage = dataclasses.replace(stage, **replaced)
    return stage


def _built(config: PruneConfig, tower: PrunedEncoder) -> nn.ModuleDict:
    """The pruners that a config builds for a tower. ValueError where they are at other depths than the tower's."""
    with torch.random.fork_rng(devices=[]):
        built = tower.build_pruners(config)
    if set(tower.pruners) != set(built):
        raise _refusal(
            f"its {tower.tower} tower is pruned at {sorted(tower.pruners)}, and its config says {sorted(built)}"
        )
    return built


def _pruners(pruners: nn.ModuleDict, number: int) -> dict[str, nn.Module]:
    """The pruners of one stage by name."""
    return {key: pruner for key, pruner in pruners.items() if stage_number(key) == number}


def _changed(number: int, stage: Stage, kind: str, tower: PrunedEncoder, built: nn.ModuleDict) -> dict[str, object]:
    """Arguments of a tower's parts of one kind and stage that are not what the config builds, by their values now."""
    found: list[dict[str, object]] = []
    for key, pruner in _pruners(tower.pruners, number).items():
        part = unwrapped(getattr(pruner, _PARTS[kind]))
        original = getattr(built[key], _PARTS[kind])
        if type(part) is not type(original):
            raise _refusal(
                f"the {kind} of its {tower.tower} tower at {key} is {type(part).__name__} and was {type(original).__name__}"
            )
        now, then = attributes(part), attributes(original)
        found.append(
            {name: now.get(name) for name in original.arguments if name in then and now.get(name) != then[name]}
        )
    maker = KINDS[kind][0][stage.part(kind, tower.tower).name] if found else None
    accepted = {parameter.name for parameter in parameters(maker)} if maker is not None else set()
    for name in (name for one in found for name in one if name not in accepted):
        raise _refusal(
            f"{name} of the {kind} of its {tower.tower} tower was set, and its maker takes no argument {name!r}"
        )
    if any(one != found[0] for one in found):
        raise _refusal(
            f"the {kind} of its {tower.tower} tower has other arguments at some depths than at others: {found}"
        )
    return found[0] if found else {}


def _refusal(why: str) -> ValueError:
    return ValueError(
        f"cannot save this pruned model: {why}, which would not come back. Nothing was written. Prune its dense model anew, "
        "vltprune.prune(model.host, config), with the parts and depths that you want"
    )
