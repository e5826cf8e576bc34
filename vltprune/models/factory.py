"""Model factory: `create_model` builds a dense or pruned model from a name of backbone, preset and tag of weights."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, overload

from torch import nn

from ..io import checkpoint
from ..io.recipe import Recipe
from ..io.saved_pruning import load_pruning
from ..io.tensor_files import saved_temperature
from ..pruning.config import PruneConfig
from ..pruning.model import PrunedModel
from ..pruning.presets import preset as preset_of
from ..pruning.prune import prune_towers
from ..registry import backbones, bind, nearest, presets
from ..utils.structure import Structure
from .catalog import CONFIGURED, ModelName
from .pretrained import given_weights, own_weights

PARTS = ("scorer", "keep", "selector", "reducer", "guide", "at", "place", "modality", "then")


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
    """Create a model by name, dense or pruned, in evaluation mode.

    A name is a backbone, then "_" and a preset for a pruned model, then "." and a tag for its weights:
    "vit_base_patch16_224" is dense, "vit_base_patch16_224_attention" is pruned, and "clip_vit_b_32_attention.openai" is pruned
    with pretrained weights. `list_models` gives the backbones, `list_pretrained` the tags.

    Args:
        name: A backbone of this library ("blip_nlvr_base"), of timm ("vit_base_patch16_224"), or of open_clip in its own
            spelling or in ours ("ViT-B-32", "clip_vit_b_32"). "clip" builds the open_clip architecture that `embed_dim`,
            `vision_cfg` and `text_cfg` describe, as in its own configuration files.
        pretrained: None for the weights of the tag, or random ones without a tag. True for the weights that belong to the name
            (packaged, or downloaded), False for random ones. A path loads a file or folder: one that `save` wrote, or BLIP's
            weights as Salesforce, the MADTP reference or transformers write them; which one, its keys tell.
        preset: A preset's name or a PruneConfig, instead of a preset in the name. If the folder `pretrained` was saved with
            the parts of the named preset, the model is pruned as saved, calibration included.
        **arguments: `scorer`, `keep`, `reducer`, `guide` and `at` replace those parts of the preset. All others go to the
            backbone, such as `num_classes` or `img_size` of timm's models.

    Returns:
        A `PrunedModel` if the name or `preset` prunes it, the dense model otherwise.

    Raises:
        LookupError: For a backbone, preset, tag or part that does not exist; with the nearest names.
        TypeError: For arguments that neither the preset nor the backbone takes.
        ValueError: For two presets, for values that the backbone refuses, and for a preset that contradicts the saved pruning.
        CheckpointError: For weights that cannot be had or do not fit.

    Example:
        >>> import torch, vltprune as vp
        >>> model = vp.create_model("vit_tiny_patch16_224_attention", num_classes=10, at=(3, 6, 9))
        >>> model(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 10])
        >>> model.pruning.config.at
        (3, 6, 9)
        >>> trained = vp.create_model("blip_nlvr_tiny_madtp.p80")
    """
    parts = {key: arguments.pop(key) for key in PARTS if key in arguments}
    parsed = ModelName.parse(name)
    parsed.check_tag()
    _check_arguments(parsed, preset, parts, arguments)

    wants_own = parsed.tag is not None if pretrained is None else pretrained is True
    path = own_weights(parsed) if wants_own else given_weights(parsed, pretrained)
    config = _prune_config(parsed, preset, parts, path, is_own_choice=not wants_own)
    # timm and open_clip load their weights as they build
    is_library_pretrained = wants_own and path is None
    model = _build(parsed, is_library_pretrained, arguments)
    recorded = _recorded(parsed, arguments)
    preprocessing: Any = getattr(getattr(model, "visual", None), "preprocess_cfg", None)
    if is_library_pretrained and preprocessing is not None:
        # it came with the weights
        recorded.setdefault("force_preprocess_cfg", dict(preprocessing))
    recipe = Recipe(_dense_name(parsed), recorded, Structure.from_model(model), partial(create_model, pretrained=False))
    object.__setattr__(model, "recipe", recipe)
    if config is not None:
        model = prune_towers(model, config)
    if path is not None:
        checkpoint.load_weights(model, path)
    return model.eval()


def _check_arguments(
    name: ModelName, preset: PruneConfig | str | None, parts: Mapping[str, Any], arguments: Mapping[str, Any]
) -> None:
    """TypeError or ValueError for pruning arguments that contradict the name, or belong elsewhere."""
    if preset is not None and not isinstance(preset, (str, PruneConfig)):
        raise TypeError(f"preset={preset!r}: give the name of a preset, {', '.join(presets.names())}, or a PruneConfig")
    if preset is not None and name.preset is not None:
        raise ValueError(
            f"{str(name)!r} already names the preset {name.preset!r}: leave preset= out, or name the model {name.backbone!r}"
        )
    if parts and preset is None and name.preset is None:
        raise TypeError(
            f"{', '.join(parts)} given, but {name.backbone!r} is dense: append a preset to the name, or give preset="
        )
    if "reduction" in arguments:
        raise TypeError(
            "create_model takes no reduction, which is measured on data: create the dense model, then call "
            "vltprune.prune(model, preset, reduction=0.5, data=batches)"
        )


def _prune_config(
    name: ModelName, preset: PruneConfig | str | None, parts: Mapping[str, Any], path: Path | None, is_own_choice: bool
) -> PruneConfig | None:
    """The pruning that was asked for: the given one, or the named one as `path` was saved with it; single parts replaced.

    is_own_choice: whether the user chose `path`, which may contradict the name; the folder of a tag cannot.
    """
    pruning = preset if name.preset is None else name.preset
    if isinstance(pruning, str):
        saved = load_pruning(path) if path is not None else None
        if saved is not None and is_own_choice:
            check_same_parts(pruning, preset_of(pruning), saved, path, parts)
        config = saved or _as_stored(preset_of(pruning), path)
    else:
        config = pruning
    return config.replace(**parts) if config is not None and parts else config


def check_same_parts(
    preset: str, config: PruneConfig, saved: PruneConfig, path: object, replaced: Mapping[str, Any]
) -> None:
    """Check that a preset has the parts that a folder was saved with.

    Args:
        preset: Name of the preset, for the message.
        config: Its config.
        saved: The pruning of the folder.
        path: The folder, for the message.
        replaced: Parts that are replaced anyway, by kind.

    Raises:
        ValueError: For a part of another name.
    """
    for kind in ("scorer", "keep", "selector", "reducer", "guide"):
        preset_names, saved_names = ({part.name for part in one.parts(kind)} for one in (config, saved))
        if kind not in replaced and preset_names != saved_names:
            raise ValueError(
                f"{path} was saved with {kind}={saved.describe(kind)!r}, and the preset {preset!r} has "
                f"{kind}={config.describe(kind)!r}: to prune as saved, give that folder as the model; to prune otherwise, say "
                f"{kind}=... too"
            )


def _as_stored(config: PruneConfig, path: Path | None) -> PruneConfig:
    """The config, with the threshold's temperature that a file of the MADTP reference was trained at."""
    keep = config.part("keep")
    temperature = saved_temperature(path) if path is not None and keep.name == "threshold" else None
    if temperature is None:
        return config
    first, *others = config.stages
    return config.with_stages([dataclasses.replace(first, keep=keep.replace(temperature=temperature)), *others])


def _build(name: ModelName, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """The dense model; with `pretrained`, timm and open_clip load its weights. Errors name the arguments it was given."""
    if name.backbone == CONFIGURED:
        return _build_configured(pretrained, arguments)
    try:
        return _build_named(name, pretrained, arguments)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not arguments or isinstance(error, checkpoint.CheckpointError):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        reason = f"{error or type(error).__name__}{_did_you_mean(name, str(error))}"
        raise kind(f"{name.backbone} cannot be built with {given}: {reason}") from error


def _build_named(name: ModelName, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    if name.library == "timm":
        timm: Any = importlib.import_module("timm")
        return timm.create_model(_dense_name(name), pretrained=pretrained, **arguments)
    if name.library == "open_clip":
        open_clip: Any = importlib.import_module("open_clip")
        # open_clip would fetch the weights of a text tower of transformers, unasked
        defaults = {"pretrained_text": False}
        tag = name.tag if pretrained else None
        return open_clip.create_model(name.open_clip_name, pretrained=tag, **{**defaults, **arguments})
    return backbones[name.backbone](**arguments)


def _did_you_mean(name: ModelName, error: str) -> str:
    """The tail of timm's and open_clip's errors for an unknown argument: the nearest that there are."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", error)
    if unknown is None:
        return ""
    if name.library == "timm":
        vision_transformer: Any = importlib.import_module("timm.models.vision_transformer")
        takes = inspect.signature(vision_transformer.VisionTransformer).parameters
    else:
        takes = inspect.signature(importlib.import_module("open_clip").create_model).parameters
    return nearest(unknown[1], [*takes, *PARTS, "pretrained", "preset"])


def _build_configured(pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """open_clip's CLIP by its configuration. ValueError for weights by name: it has none."""
    if pretrained:
        raise ValueError(
            f"{CONFIGURED!r} has no weights of its own: give pretrained=PATH, or let its towers bring theirs with "
            "hf_model_pretrained=True in text_cfg and timm_model_pretrained=True in vision_cfg"
        )
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in arguments]
    if missing:
        raise TypeError(
            f"{CONFIGURED!r} needs {', '.join(missing)}: write create_model({CONFIGURED!r}, embed_dim=512, "
            "vision_cfg={...}, text_cfg={...}), as in open_clip's files of architectures"
        )
    clip = importlib.import_module(f"{__package__}.clip")
    bind(CONFIGURED, clip.build_clip, arguments)
    return clip.build_clip(**arguments)


def _recorded(name: ModelName, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as a checkpoint keeps them."""
    if name.backbone == CONFIGURED:
        return importlib.import_module(f"{__package__}.clip").recordable(arguments)
    return dict(arguments)


def _dense_name(name: ModelName) -> str:
    return f"{name.backbone}.{name.tag}" if name.library == "timm" and name.tag else name.backbone
