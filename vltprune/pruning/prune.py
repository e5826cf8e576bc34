"""prune_towers: builds a pruned model that shares the dense model's weights and leaves that unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn
from typing_extensions import Unpack

from ..hosts.base import Composite, Host
from ..hosts.find import find_composite, find_host
from ..hosts.graft import check_forward
from ..layers import AlignmentGuide, BlockSpec, TokenProjection
from ..registry import guides
from ..utils.wrappers import unwrapped
from . import presets
from .config import Parts, PruneConfig
from .encoder import PrunedEncoder, Pruning
from .model import PrunedModel, check_pruned, find_pruning, is_pruned
from .pruner import build_like
from .stage import NAMED_ALONE


def prune_towers(model: nn.Module, preset: PruneConfig | str, **parts: Unpack[Parts]) -> PrunedModel:
    """Builds a pruned model that shares the dense model's weights; `vltprune.prune` without a cost to set.

    Args:
        model: a tower or a composite of two, as `vltprune.prune` takes it. It is unchanged.
        preset: the name of a preset, or a PruneConfig.
        **parts: single parts in place of the preset's, as `PruneConfig.replace` takes them.

    Returns:
        The pruned model, which has `.pruning` and `.host`.

    Raises:
        TypeError: for a model that is wrapped, already pruned or without a host, for one whose forward was replaced, as by
            hooks of accelerate, and for `preset` of another type.
        LookupError: for a preset or part that is not registered.
        ValueError: for a tower that the model lacks, and for parts that need what a tower lacks.
    """
    _check_dense(model)
    config = presets.preset(preset) if isinstance(preset, str) else preset
    if not isinstance(config, PruneConfig):
        raise TypeError(
            f"preset={preset!r}: give the name of a preset or a PruneConfig, such as PruneConfig.from_dict of a dictionary"
        )
    config = config.replace(**parts) if parts else config
    composite = _composite_for(model, config)
    if composite is None:
        host = find_host(model)
        towers = {host.tower: (model, host)}
    else:
        towers = composite.towers(model)
    _check_towers(config, tuple(towers), lambda name: "" if composite is None else composite.why_without(model, name))
    _check_forwards(model, towers, config)

    specs = {name: host.spec(tower, 0, name) for name, (tower, host) in towers.items()}
    projections = _projections(towers, {} if composite is None else composite.projections(model))
    for name, projection in projections.items():
        specs[name] = replace(specs[name], embed_dim=len(projection.weight))
    further = composite.guide_specs(model) if composite is not None else {}
    guide = build_guide(config, _related(config, specs) | further, model)
    if guide is not None:
        for name, projection in projections.items():
            guide.start_from(name, projection)
        guide.train(model.training)
    owner = model if composite is not None else None
    pruned: dict[str, PrunedEncoder] = {}
    for name, (tower, host) in towers.items():
        encoder = host.pruned_class or PrunedEncoder
        if not issubclass(encoder, PrunedEncoder):
            raise TypeError(
                f"{type(host).__name__}.pruned_class is {encoder.__name__}: give a subclass of PrunedEncoder, or None"
            )
        pruned[name] = encoder(tower, host, config, guide, name, owner)
    result = pruned[next(iter(pruned))] if composite is None else _assemble(model, composite, pruned, guide)
    object.__setattr__(result, "pruning", Pruning(config, model, guide, pruned))
    return check_pruned(result)


def composite_of(model: nn.Module) -> Composite | None:
    """Finds the composite that a model is pruned by, or would be behind its image tower.

    Args:
        model: the model, dense or pruned, wrapped or not.

    Returns:
        The composite; None for a model of one tower.
    """
    pruning = find_pruning(model)
    return find_composite(unwrapped(model)) if pruning is None else _composite_for(pruning.host, pruning.config)


def _composite_for(model: nn.Module, config: PruneConfig) -> Composite | None:
    """The composite of a dense model that prunes where a config says; None for a model of one tower."""
    composite = find_composite(model)
    if composite is None or not any(one.place != "output" and one.names("image") for one in config.stages):
        return composite
    return composite.inside(model)


def _check_dense(model: nn.Module) -> None:
    """TypeError for a model that is wrapped, pruned or finished."""
    if unwrapped(model) is not model:
        raise TypeError(
            f"a {type(model).__name__} wraps a {type(unwrapped(model)).__name__}: prune that one, and wrap what `prune` "
            "returns (vltprune.unwrapped(model) is the model itself)"
        )
    if is_pruned(model):
        raise TypeError("this model is pruned already: prune its dense host, prune(model.host, ...)")
    if hasattr(model, "finished"):
        raise TypeError(
            "this model is finished for inference: prune the model that it was made from, and finish the result"
        )


def _related(config: PruneConfig, specs: Mapping[str, BlockSpec]) -> dict[str, BlockSpec]:
    """The towers that a guide relates. A text is compared with the tokens of a language model only where these are pruned."""
    queried = config.guide is not None and getattr(guides[config.part("guide").name], "queried", False)
    return {
        name: spec
        for name, spec in specs.items()
        if not queried or name != NAMED_ALONE or config.depths(name, spec.depths)
    }


def _projections(
    towers: Mapping[str, tuple[nn.Module, Host]], outside: Mapping[str, TokenProjection]
) -> dict[str, TokenProjection]:
    """What maps the tokens of towers to embeddings, by tower: their own projections, and those outside of them."""
    own = {name: host.projection(tower) for name, (tower, host) in towers.items()}
    return {name: one for name, one in own.items() if one is not None} | dict(outside)


def _assemble(
    model: nn.Module, composite: Composite, pruned: Mapping[str, PrunedEncoder], guide: AlignmentGuide | None
) -> nn.Module:
    """The composite model of pruned towers. It registers the guide that the towers share, which do not."""
    result = composite.assemble(model, pruned)
    if guide is not None:
        result.add_module("guide", guide)
    # not a child: its towers are in `result` already
    object.__setattr__(result, "host", model)
    return result


def build_guide(config: PruneConfig, specs: Mapping[str, BlockSpec], model: nn.Module) -> AlignmentGuide | None:
    """Builds the guide that the towers of a model share.

    Args:
        config: the config, for its guide.
        specs: one BlockSpec per tower name, of any depth.
        model: the dense model, whose dtype and device the guide gets.

    Returns:
        The guide; None where the config has none.
    """
    if config.guide is None:
        return None
    part = config.part("guide")
    return build_like(model, guides[part.name], specs, **part.args)


def _check_forwards(model: nn.Module, towers: Mapping[str, tuple[nn.Module, Host]], config: PruneConfig) -> None:
    """TypeError where hooks or wrappers replaced the forward of a model, tower or block, which no pruned model calls."""
    check_forward(model)
    for name, (tower, host) in towers.items():
        blocks = host.blocks(tower)
        # a language model that no stage prunes runs as it is
        if name != NAMED_ALONE or config.depths(name, len(blocks)):
            for module in (tower, *blocks):
                check_forward(module)


def _check_towers(config: PruneConfig, towers: tuple[str, ...], why: Callable[[str], str]) -> None:
    """ValueError for a tower that the config names and the model lacks, and `why` it does."""
    for stage in config.stages:
        for name, given in (("at", stage.at), ("keep", stage.keep)):
            unknown = [tower for tower in given if tower not in towers] if isinstance(given, Mapping) else []
            if unknown:
                asked = f"{name}={stage.to_dict()[name]!r}"
                has = f"this model has {', '.join(towers)}{why(str(unknown[0]))}"
                raise ValueError(f"{asked} names the tower {unknown[0]!r}; {has}")
