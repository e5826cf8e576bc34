"""Model arguments of commands and configs: `resolve_model` loads a saved folder, a hub repository, or a model by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..io import checkpoint, hub
from ..io.saved_pruning import load_pruning
from ..pruning.config import PruneConfig
from ..pruning.model import is_pruned
from ..pruning.presets import preset as preset_of
from ..pruning.prune import prune_towers
from .catalog import ModelName
from .factory import PARTS, check_same_parts, create_model

_HUB = "hf-hub:"


def resolve_model(
    model: str,
    *,
    pretrained: bool | str | Path | None = None,
    preset: str | None = None,
    default: PruneConfig | str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load or build the model that a command's model argument means.

    What was saved pruned comes pruned as saved, calibration included, whether its folder is `model` or `pretrained`. It warns
    where a name without a preset leaves a saved pruning out.

    Args:
        model: A folder that `save` wrote, a repository of the hub ("hf-hub:org/name"), or a name for `create_model`.
        pretrained: Weights of a name, as `create_model` takes them.
        preset: How to prune, where neither the name nor the saved model says.
        default: The preset or PruneConfig where nothing else says how to prune; None to leave the model dense.
        arguments: Parts that replace the pruning's own (scorer, keep, reducer, guide, at); for a name also its backbone's
            arguments.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: For a preset of other parts than the saved ones, or arguments that contradict the folder.
        LookupError: As `create_model`.
        TypeError: As `create_model`.
        CheckpointError: As `create_model` and `load`.
    """
    arguments = dict(arguments or {})
    if is_saved_model(model):
        return _load_saved(model, pretrained, preset, default, arguments)
    name = _parse(model)
    if preset is not None and name.preset is not None:
        raise ValueError(
            f"--preset {preset}: {model} names a preset already: leave --preset out, or name the dense model"
        )
    saved = _saved_pruning(pretrained)
    if name.preset is None and preset is None and saved is not None:
        if default is not None:
            return create_model(model, pretrained=pretrained, preset=saved, **arguments)
        warnings.warn(
            f"{pretrained} was saved pruned, and {model} names a dense model: the pruning is left out. To have it, give the "
            "folder itself as the model",
            stacklevel=2,
        )
    asked = (preset or default) if name.preset is None else None
    return create_model(model, pretrained=pretrained, preset=asked, **arguments)


def is_saved_model(model: str) -> bool:
    """Whether a model argument is a folder or a repository of the hub, rather than a name."""
    return model.startswith(_HUB) or Path(model).is_dir()


def has_random_weights(model: str, pretrained: bool | str | Path | None = None) -> bool:
    """Whether `resolve_model` would build a model with random weights.

    Args:
        model, pretrained: As in `resolve_model`.

    Returns:
        True for `pretrained=False`, and for a name without a tag where `pretrained` is None; never for a saved model.

    Raises:
        LookupError: For a name that no library knows.
    """
    return not is_saved_model(model) and (pretrained is False or (pretrained is None and _parse(model).tag is None))


def _parse(model: str) -> ModelName:
    try:
        return ModelName.parse(model)
    except LookupError:
        if "/" not in model and os.sep not in model:
            raise
        raise LookupError(
            f"there is no folder {model}, and no model has that name; a repository of the hub is written hf-hub:org/name"
        ) from None


def _load_saved(
    model: str,
    pretrained: bool | str | Path | None,
    preset: str | None,
    default: PruneConfig | str | None,
    arguments: Mapping[str, Any],
) -> nn.Module:
    """The model of a folder or a repository."""
    others = [name for name in arguments if name not in PARTS]
    if pretrained or others:
        what = "--pretrained" if pretrained else ", ".join(f"{name}=" for name in others)
        raise ValueError(f"{what}: the folder {model} says itself what its model is: leave {what} out")
    loaded = hub.from_pretrained(model)
    if is_pruned(loaded):
        if preset is not None:
            check_same_parts(preset, preset_of(preset), loaded.pruning.config, model, arguments)
        return hub.from_pretrained(model, **arguments) if arguments else loaded
    asked = preset or default
    if asked is not None:
        return prune_towers(loaded, asked, **arguments).eval()
    if arguments:
        raise TypeError(f"{', '.join(arguments)} given, but {model} holds a dense model: name a preset too")
    return loaded


def _saved_pruning(pretrained: bool | str | Path | None) -> PruneConfig | None:
    """The pruning that the folder `pretrained` was saved with, None for none and for anything else."""
    if not isinstance(pretrained, (str, os.PathLike)) or not Path(pretrained, checkpoint.CONFIG).is_file():
        return None
    return load_pruning(Path(pretrained))
