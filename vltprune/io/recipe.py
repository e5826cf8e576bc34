"""Recipe: the name and arguments that `create_model` built a dense model from, and checks that they still build it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..utils.modes import on_meta
from ..utils.structure import Structure, listed, plain
from ..utils.wrappers import is_sharded, unwrapped

_MOST = 8  # names in a message


@dataclass(frozen=True)
class Recipe:
    """The name and arguments that `create_model` built a dense model from, as a checkpoint needs them to build it again.

    Attributes:
        backbone: the dense model's name; empty for a model that `create_model` did not build.
        model_args: arguments of `create_model` besides.
        built: the structure of the model when it was built; None where nobody compares.
        build: build(backbone, **model_args) builds another such model; None where nobody compares.
    """

    backbone: str
    model_args: dict[str, Any] = field(default_factory=dict)
    built: Structure | None = field(default=None, compare=False, repr=False)
    build: Callable[..., nn.Module] | None = field(default=None, compare=False, repr=False)


def original_recipe(model: nn.Module) -> Recipe:
    """The recipe that `create_model` built a dense model from; an empty one for a model that it did not build."""
    recipe = getattr(model, "recipe", None)
    return recipe if isinstance(recipe, Recipe) else Recipe("")


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe of a dense model as it is now; an empty one for a model that `create_model` did not build.

    What was exchanged after building, and is an argument of the model, becomes one: a new number of classes, another pooling
    or image size of timm's models, another preprocessing of open_clip's.

    Raises:
        ValueError: for any other change, which it names.
    """
    recipe = original_recipe(model)
    if recipe.built is None or recipe.build is None:
        return recipe
    now = Structure.from_model(model)
    differences = recipe.built.differences(now)
    if not differences:
        return recipe
    for arguments in _arguments(recipe, model):
        if Structure.from_model(_built(recipe, arguments)).differences(now) == []:
            return dataclasses.replace(recipe, model_args=arguments, built=now)
    raise ValueError(
        f"cannot save this {recipe.backbone}: it is no longer what create_model built, and would come back without the "
        f"change: {listed(differences)}. Nothing was written. Build it so by create_model's arguments; or save "
        "model.state_dict() with torch.save, and after loading make the same change again"
    )


def _arguments(recipe: Recipe, model: Any) -> Iterator[dict[str, object]]:
    """Arguments that may build the model as it is now."""
    args = dict(recipe.model_args)
    if hasattr(model, "reset_classifier") and hasattr(model, "patch_embed"):  # of timm
        changed = {name: getattr(model, name) for name in ("num_classes", "global_pool") if hasattr(model, name)}
        size = getattr(model.patch_embed, "img_size", None)
        if size is not None:
            changed["img_size"] = list(size)
        patch = getattr(model.patch_embed, "patch_size", None)
        overlay = _changed(recipe, getattr(model, "pretrained_cfg", None))
        if overlay:
            changed["pretrained_cfg_overlay"] = {**(args.get("pretrained_cfg_overlay") or {}), **overlay}
        norm = not isinstance(getattr(model, "fc_norm", None), nn.Identity)
        for more in ({}, {"patch_size": patch and patch[0]}):
            for norms in ({}, {"fc_norm": norm}, {"use_fc_norm": norm}):  # of VisionTransformer, of Eva
                yield {**args, **changed, **more, **norms}
    preprocess = getattr(getattr(model, "visual", None), "preprocess_cfg", None)
    if preprocess is not None:  # of open_clip
        for name in ("force_preprocess_cfg", "preprocess_cfg"):
            yield {**args, name: dict(preprocess)}


def _changed(recipe: Recipe, config: object) -> dict[str, object]:
    """What of timm's pretrained_cfg is another than it was."""
    assert recipe.built is not None
    before = recipe.built.modules[""][1].get("pretrained_cfg")
    if not isinstance(config, Mapping) or not isinstance(before, Mapping):
        return {}
    return {key: value for key, value in config.items() if plain(value) != before.get(key)}


def _built(recipe: Recipe, arguments: Mapping[str, object]) -> nn.Module:
    """A model by these arguments, without memory for its weights where its library can; an empty one where they are wrong."""
    assert recipe.build is not None
    wrong = (TypeError, ValueError, LookupError, AssertionError, RuntimeError)
    with torch.random.fork_rng(devices=[]):
        try:
            with on_meta():
                return recipe.build(recipe.backbone, **arguments)
        except wrong:
            pass  # wrong arguments, or a constructor that computes with its weights
        try:
            return recipe.build(recipe.backbone, **arguments)
        except wrong:
            return nn.Module()


def check_shared(model: nn.Module, host: nn.Module, towers: Mapping[str, nn.Module]) -> None:
    """Check that a pruned model still shares its parts with its dense model, which is what is saved.

    Args:
        model: the pruned model.
        host: the dense model that it was pruned from.
        towers: the pruned towers by name.

    Raises:
        ValueError: for parts that are not shared, which it names.
    """
    if model is host or not any(tower is not model for tower in towers.values()):
        return
    ours, theirs = (dict(one.state_dict(keep_vars=True)) for one in (model, host))
    strange = [key for key, value in theirs.items() if ours.get(key) is not value]
    parts = {name for name, child in model.named_children() if name != "guide"}
    strange += sorted(parts - {name for name, _ in host.named_children()} - {"text"})
    for name, child in host.named_children():
        got = getattr(model, name, None)
        if got is not child and getattr(got, "host", None) is not child and type(got) is not type(child):
            strange.append(name)
    if strange:
        raise ValueError(
            f"cannot save this {type(model).__name__}: it does not share {', '.join(strange[:_MOST])} with its dense model, "
            "which is what is saved. Nothing was written. Exchange parts in model.host, and prune that again"
        )


def check_whole(model: nn.Module, adapters: bool = True) -> None:
    """Check that a model has neither weights that FSDP shards nor adapters of peft: `load` builds neither.

    Args:
        model: the model that is to be saved.
        adapters: whether to look for adapters.

    Raises:
        ValueError: for such weights or adapters; with what to write.
    """
    for name, module in model.named_modules():
        if is_sharded(module):
            raise ValueError(
                f"cannot save this {type(unwrapped(model)).__name__}: its weights are sharded by FSDP. Nothing was written. "
                "Shard it by fully_shard(model), write state = get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)) of torch.distributed.checkpoint.state_dict in every process, fill a model that is "
                "pruned as this one by whole.load_state_dict(state), and save that"
            )
        if adapters and type(module).__module__.partition(".")[0] == "peft":
            what = f"{name} is" if name else "it is"
            raise ValueError(
                f"cannot save this model: {what} a {type(module).__name__} of peft, which loading would not build. Nothing "
                "was written. Write vltprune.save(model.merge_and_unload(), folder) with peft's model, or save the adapters "
                "alone by its save_pretrained(folder); of adapters that were injected, merge() each and put its "
                "get_base_layer() in its place"
            )
