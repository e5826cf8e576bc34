"""create_model: builds a model from a name, which is a backbone, then a preset, then a tag of weights."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, overload

from torch import nn

from ..io import checkpoint
from ..io.recipe import Recipe
from ..pruning import presets
from ..pruning.config import PruneConfig
from ..pruning.model import PrunedModel
from ..pruning.prune import prune_towers
from ..registry import backbones, bind
from ..utils.structure import Structure
from . import sources, zoo
from .catalog import CONFIGURED, ModelName, list_models, list_pretrained, open_clip_name

__all__ = ["CONFIGURED", "ModelName", "create_model", "list_models", "list_pretrained", "open_clip_name"]

PARTS = ("scorer", "keep", "reducer", "guide", "at")


@overload
def create_model(
    name: str,
    *,
    pretrained: bool | str | Path | None = None,
    preset: PruneConfig | str,
    **arguments: Any,
) -> PrunedModel: ...


@overload
def create_model(
    name: str,
    *,
    pretrained: bool | str | Path | None = None,
    preset: PruneConfig | str | None = None,
    **arguments: Any,
) -> nn.Module: ...


def create_model(
    name: str,
    *,
    pretrained: bool | str | Path | None = None,
    preset: PruneConfig | str | None = None,
    **arguments: Any,
) -> nn.Module:
    """A model by name, dense or pruned.

    name: a backbone of this library ("blip_nlvr_base"), of timm under its own name ("vit_base_patch16_224") or of
    open_clip under its own or ours ("ViT-B-32" is "clip_vit_b_32", and "clip" is what embed_dim=, vision_cfg= and text_cfg=
    say, as in its files of architectures); "_" and a preset prune it ("blip_base_madtp"); "." and a tag mean its weights
    ("clip_vit_b_32.openai"; `list_pretrained` gives them). pretrained: None for the weights of the tag, and random ones
    without a tag; True for the weights that belong to the name (the package's own, or downloaded); False for random ones;
    or the path of a file or folder: our own, BLIP's as Salesforce, the MADTP reference or transformers write it, told
    apart by their keys.
    preset: a preset's name or a PruneConfig, instead of the one in the name. Where a preset is named and the folder of
    `pretrained` was saved with a pruning of the same parts, it is pruned as saved, calibration included. Arguments named
    scorer, keep, reducer, guide, at replace parts of it; all others go to the backbone.

    Raises LookupError for unknown names and tags, TypeError for arguments nobody takes, ValueError for a preset that
    contradicts the saved pruning, CheckpointError for weights that do not fit.
    """
    parts = {key: arguments.pop(key) for key in PARTS if key in arguments}
    read = ModelName.parse(name)
    read.check_tag()
    if preset is not None and read.preset is not None:
        raise ValueError(f"{name!r} already names the preset {read.preset!r}: give preset=... to {read.backbone!r}")

    own = read.tag is not None if pretrained is None else pretrained is True
    path = _own_weights(read) if own else _given_weights(read, pretrained)
    config = _config(read, preset, parts, path, given=not own)
    model = _build(read, own and path is None, arguments)
    recorded = _recorded(read, arguments)
    pixels: Any = getattr(getattr(model, "visual", None), "preprocess_cfg", None)
    if own and path is None and pixels is not None:
        recorded.setdefault("force_preprocess_cfg", dict(pixels))  # the weights' own, which the tag brought
    recipe = Recipe(_dense_name(read), recorded, Structure.from_model(model), partial(create_model, pretrained=False))
    object.__setattr__(model, "recipe", recipe)
    if config is not None:
        model = prune_towers(model, config)
    if path is not None:
        checkpoint.fill(model, path)
    return model.eval()


def _config(
    name: ModelName, preset: PruneConfig | str | None, parts: Mapping[str, Any], path: Path | None, given: bool
) -> PruneConfig | None:
    """The pruning that was asked for: the given one, or the named one as `path` was saved with it; single parts replaced.

    given: whether the user chose `path`, which may contradict the name; a tag's folder is what the name means.
    """
    asked = preset if name.preset is None else name.preset
    if isinstance(asked, str):
        saved = checkpoint.saved_pruning(path) if path is not None else None
        if saved is not None and given:
            check_same(asked, presets.preset(asked), saved, path, parts)
        config = saved or _as_stored(presets.preset(asked), path)
    else:
        config = asked
    if config is None and parts:
        raise TypeError(f"{', '.join(parts)} given, but {name.backbone!r} is dense: append a preset or give preset=...")
    return config.replace(**parts) if config is not None and parts else config


def check_same(asked: str, config: PruneConfig, saved: PruneConfig, path: object, replaced: Mapping[str, Any]) -> None:
    """ValueError unless a preset and a saved pruning are of the same parts, but for those that are replaced anyway."""
    for kind in ("scorer", "keep", "reducer", "guide"):
        here, there = ({part.name for part in one.parts(kind)} for one in (config, saved))
        if kind not in replaced and here != there:
            raise ValueError(
                f"{path} was saved with {kind}={saved.spelled(kind)!r}, and the preset {asked!r} has "
                f"{kind}={config.spelled(kind)!r}: to prune as saved, give that folder as the model; to prune otherwise, say "
                f"{kind}=... too"
            )


def _as_stored(config: PruneConfig, path: Path | None) -> PruneConfig:
    """The config, with the threshold's temperature that a file of the MADTP reference was trained at."""
    keep = config.part("keep")
    temperature = checkpoint.saved_temperature(path) if path is not None and keep.name == "threshold" else None
    return config if temperature is None else config.replace(keep=keep.replace(temperature=temperature))


def _own_weights(name: ModelName) -> Path | None:
    """The file or folder of a name's own weights, downloaded where need be; None where timm or open_clip load them.

    LookupError for none, ValueError where the name does not say which of several.
    """
    if name.library == "timm":
        timm: Any = importlib.import_module("timm")
        if not name.tags() and timm.list_models(name.backbone):  # an outdated name is not listed, and may have weights
            raise LookupError(name.no_weights())
        return None
    if name.library == "open_clip":
        if name.tag is None and name.backbone != CONFIGURED:
            raise _unsaid(name, name.tags())
        return None
    folder = zoo.packaged(str(name))
    if folder is None and name.tag is None:
        pruned = [tag for tag in name.tags() if name.preset is not None and zoo.packaged(f"{name.arch}.{tag}")]
        if pruned:
            raise _unsaid(name, pruned)
        folder = zoo.packaged(name.backbone)
    return folder or sources.fetch(sources.published(name.backbone, name.tag))


def _unsaid(name: ModelName, tags: list[str]) -> Exception:
    if not tags:
        return LookupError(name.no_weights())
    return ValueError(
        f"{str(name)!r} does not say which weights: append a tag, one of {', '.join('.' + tag for tag in tags)}"
    )


def _given_weights(name: ModelName, pretrained: Any) -> Path | None:
    """The path that `pretrained` is, None for none. ValueError for a tag, CheckpointError for no such file."""
    if pretrained is None or pretrained is False:
        return None
    if not isinstance(pretrained, (str, os.PathLike)):
        raise TypeError(f"pretrained={pretrained!r}: write True, False, or the path of a file or folder")
    path = Path(pretrained)
    if path.exists():
        return path
    tag = str(pretrained).lower().replace("-", "_")
    if tag in name.tags():
        raise ValueError(f"pretrained={str(pretrained)!r} is a tag: it belongs to the name, '{name.arch}.{tag}'")
    if str(pretrained).startswith("hf-hub:"):
        raise ValueError(f"pretrained={pretrained!r}: read it with vltprune.from_pretrained({pretrained!r})")
    raise checkpoint.CheckpointError(
        f"there is no file {path}: give a folder with {checkpoint.WEIGHTS}, a .safetensors or a .pth file, or append a tag "
        "to the name"
    )


def _build(name: ModelName, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """The dense model; with `pretrained`, timm and open_clip load its weights. Errors name the arguments it was given."""
    if name.backbone == CONFIGURED:
        return _configured(pretrained, arguments)
    try:
        return _dense(name, pretrained, arguments)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not arguments or isinstance(error, checkpoint.CheckpointError):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise kind(f"{name.backbone} cannot be built with {given}: {error or type(error).__name__}") from error


def _dense(name: ModelName, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    if name.library == "timm":
        timm: Any = importlib.import_module("timm")
        return timm.create_model(_dense_name(name), pretrained=pretrained, **arguments)
    if name.library == "open_clip":
        open_clip: Any = importlib.import_module("open_clip")
        own = {"pretrained_text": False}  # open_clip would fetch those of a text tower of transformers, unasked
        tag = name.tag if pretrained else None
        return open_clip.create_model(name.in_open_clip, pretrained=tag, **{**own, **arguments})
    return backbones[name.backbone](**arguments)


def _configured(pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """open_clip's CLIP by its configuration. ValueError for weights by name: it has none."""
    if pretrained:
        raise ValueError(
            f"{CONFIGURED!r} has no weights of its own: give pretrained=PATH, or let its towers bring theirs with "
            "hf_model_pretrained=True in text_cfg and timm_model_pretrained=True in vision_cfg"
        )
    clip: Any = importlib.import_module(f"{__package__}.clip").clip
    bind(CONFIGURED, clip, arguments)
    return clip(**arguments)


def _recorded(name: ModelName, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as a checkpoint keeps them."""
    if name.backbone == CONFIGURED:
        return importlib.import_module(f"{__package__}.clip").recorded(arguments)
    return dict(arguments)


def _dense_name(name: ModelName) -> str:
    return f"{name.backbone}.{name.tag}" if name.library == "timm" and name.tag else name.backbone
