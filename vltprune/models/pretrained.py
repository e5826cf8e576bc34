"""Pretrained weights of a name: which file or folder `create_model` fills a model from."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from ..io.checkpoint import WEIGHTS, CheckpointError
from . import sources, zoo
from .catalog import CONFIGURED, ModelName


def own_weights(name: ModelName) -> Path | None:
    """Find the weights that belong to a name, and download those of our own backbones.

    Args:
        name: A model's name, with a tag that exists (`ModelName.check_tag`) or without one.

    Returns:
        A file or folder; None where timm or open_clip load the weights as they build the model.

    Raises:
        LookupError: If there are none.
        ValueError: If there are several and the name does not say which.
        CheckpointError: If they cannot be downloaded.
    """
    if name.library == "timm":
        # an outdated name is not listed, and may have weights
        if not name.tags() and importlib.import_module("timm").list_models(name.backbone):
            raise LookupError(name.no_weights())
        return None
    if name.library == "open_clip":
        if name.tag is None and name.backbone != CONFIGURED:
            raise _ambiguous(name, name.tags())
        return None
    folder = zoo.packaged(str(name))
    if folder is None and name.tag is None:
        pruned = [tag for tag in name.tags() if name.preset is not None and zoo.packaged(f"{name.arch}.{tag}")]
        if pruned:
            raise _ambiguous(name, pruned)
        folder = zoo.packaged(name.backbone)
    if folder is not None:
        return folder
    published = sources.SOURCES.get(name.backbone, {})
    if not published:
        raise LookupError(name.no_weights())
    return sources.download(published[name.tag or next(iter(published))])


def given_weights(name: ModelName, pretrained: str | os.PathLike[str] | bool | None) -> Path | None:
    """Check the path that a user gave as `pretrained`.

    Args:
        name: The model's name, for messages.
        pretrained: A path; None or False for no weights.

    Returns:
        The path; None for no weights.

    Raises:
        TypeError: For anything but a path, None or False.
        ValueError: For a tag, or a repository of the hub.
        CheckpointError: If there is no such file.
    """
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
        raise ValueError(f"pretrained={pretrained!r}: load it with vltprune.from_pretrained({pretrained!r})")
    raise CheckpointError(
        f"there is no file {path}: give a folder with {WEIGHTS}, a .safetensors or a .pth file, or append a tag to the name"
    )


def _ambiguous(name: ModelName, tags: list[str]) -> Exception:
    """The error for a name that has several weights and does not say which, or has none."""
    if not tags:
        return LookupError(name.no_weights())
    return ValueError(
        f"{str(name)!r} does not say which weights: append a tag, one of {', '.join('.' + tag for tag in tags)}"
    )
