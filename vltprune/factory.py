"""create_model("blip_nlvr_base_madtp"): names to models. A name is a backbone, then a preset, then a tag of weights."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint, sources
from .config import PruneConfig
from .models import zoo
from .presets import preset
from .registry import backbones, bind, nearest, presets
from .surgery import prune

CONFIGURED = "clip"  # any of open_clip's architectures, by its configuration
_PARTS = ("scorer", "keep", "reducer", "guide", "at")


@dataclass(frozen=True)
class Name:
    """A model's name, read: library is "vltprune", "timm" or "open_clip"."""

    library: str
    backbone: str
    preset: str | None
    tag: str | None

    @classmethod
    def read(cls, text: str) -> Name:
        """ "blip_base_madtp.tag" -> its parts. LookupError, with the nearest names, where no library knows the backbone."""
        arch, _, tag = text.partition(".")
        stem, _, last = arch.rpartition("_")
        if last in presets and stem:
            library = _library(stem)
            if library is not None:
                return cls(library, stem, last, tag or None)
        library = _library(arch)
        if library is not None:
            return cls(library, arch, None, tag or None)
        known = [
            *list_models(),
            *(f"{b}_{p}" for b in (*backbones.names(), stem) for p in presets.names() if _library(b)),
            CONFIGURED,
        ]
        raise LookupError(f"there is no model {text!r}" + nearest(arch, known))


def create_model(
    name: str,
    *,
    pretrained: bool | str | Path = False,
    pruning: PruneConfig | str | None = None,
    **arguments: Any,
) -> nn.Module:
    """A model by name, dense or pruned.

    name: a backbone of this library ("blip_nlvr_base"), of timm under its own name ("vit_base_patch16_224") or of
    open_clip ("clip_vit_b_32" is its "ViT-B-32", and "clip" is what embed_dim=, vision_cfg= and text_cfg= say, as in its
    files of architectures); "_" and a preset prune it ("blip_base_madtp"); "." and a tag choose its weights. pretrained:
    True for the weights that belong to the name (the package's own, or downloaded), or the path of a file or folder: our
    own, BLIP's as Salesforce, the MADTP reference or transformers write it, told apart by their keys.
    pruning: a PruneConfig or preset instead of the one in the name. Arguments named scorer, keep, reducer, guide, at
    replace parts of it; all others go to the backbone.

    Raises LookupError for unknown names, TypeError for arguments nobody takes, CheckpointError for weights that do not fit.
    """
    parts = {key: arguments.pop(key) for key in _PARTS if key in arguments}
    read = Name.read(name)
    if pruning is not None and read.preset is not None:
        raise ValueError(f"{name!r} already names the preset {read.preset!r}: give pruning=... to {read.backbone!r}")

    path = _weights(name, read) if pretrained is True else None if pretrained is False else Path(pretrained)
    config = _config(read, pruning, parts, path)
    model = _build(read, name, pretrained is True and path is None, arguments)
    object.__setattr__(model, "recipe", checkpoint.Recipe(_dense_name(read), _recorded(read, arguments)))
    if config is not None:
        model = prune(model, config)
    if path is not None:
        checkpoint.load_into(model, path)
    return model.eval()


def list_models(pattern: str = "*", *, library: str | None = None) -> list[str]:
    """Names that `create_model` builds and that match a shell pattern, sorted; any preset may be appended to each.

    library: "vltprune", "timm" or "open_clip" to list only its models, None for all. ValueError for another.
    """
    makers = {"vltprune": lambda: backbones.names(), "timm": _timm_names, "open_clip": lambda: sorted(_clip_names())}
    if library is not None and library not in makers:
        raise ValueError(f"library={library!r}: there is {', '.join(makers)}")
    names = [n for key, make in makers.items() if library in (None, key) for n in make()]
    return fnmatch.filter(names, pattern)


def open_clip_name(backbone: str) -> str:
    """open_clip's own spelling of an architecture: "clip_vit_b_32" -> "ViT-B-32". LookupError for none of its."""
    if backbone not in _clip_names():
        raise LookupError(f"open_clip has no {backbone!r}{nearest(backbone, _clip_names())}")
    return _clip_names()[backbone]


def _config(
    name: Name, pruning: PruneConfig | str | None, parts: Mapping[str, Any], path: Path | None
) -> PruneConfig | None:
    """The pruning that was asked for: the saved one of `path`, else the given or named one, with single parts replaced."""
    config = preset(pruning) if isinstance(pruning, str) else pruning
    if name.preset is not None:
        saved = checkpoint.saved_pruning(path) if path is not None else None
        config = saved or _as_stored(preset(name.preset), path)
    if config is None and parts:
        raise TypeError(
            f"{', '.join(parts)} given, but {name.backbone!r} is dense: append a preset or give pruning=..."
        )
    return config.replace(**parts) if config is not None and parts else config


def _as_stored(config: PruneConfig, path: Path | None) -> PruneConfig:
    """The config, with the threshold's temperature that a file of the MADTP reference was trained at."""
    keep = config.part("keep")
    temperature = checkpoint.saved_temperature(path) if path is not None and keep.name == "threshold" else None
    return config if temperature is None else config.replace(keep=keep.replace(temperature=temperature))


def _weights(full: str, name: Name) -> Path | None:
    """The file or folder of a name's own weights: the package's, or what was published; None where its library knows."""
    folder = zoo.packaged(full)
    if folder is not None or name.library != "vltprune":
        return folder
    return sources.fetch(sources.published(name.backbone, name.tag))


def _build(name: Name, full: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    if name.library == "timm":
        timm = importlib.import_module("timm")
        return timm.create_model(_dense_name(name), pretrained=pretrained, **arguments)
    if name.backbone == CONFIGURED:
        return _configured(pretrained, arguments)
    if name.library == "open_clip":
        open_clip = importlib.import_module("open_clip")
        tag = name.tag if pretrained else None
        if pretrained and tag is None:
            tags = open_clip.list_pretrained_tags_by_model(_clip_names()[name.backbone])
            raise ValueError(f"{full!r} has several weights: append a tag, one of {', '.join('.' + t for t in tags)}")
        own = {"pretrained_text": False}  # open_clip would fetch those of a text tower of transformers, unasked
        return open_clip.create_model(_clip_names()[name.backbone], pretrained=tag, **{**own, **arguments})
    return backbones[name.backbone](**arguments)


def _configured(pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """open_clip's CLIP by its configuration. ValueError for weights by name: it has none."""
    if pretrained:
        raise ValueError(
            f"{CONFIGURED!r} has no weights of its own: give pretrained=PATH, or let its towers bring theirs with "
            "hf_model_pretrained=True in text_cfg and timm_model_pretrained=True in vision_cfg"
        )
    clip: Any = importlib.import_module(f"{__package__}.models.clip").clip
    bind(CONFIGURED, clip, arguments)
    return clip(**arguments)


def _recorded(name: Name, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as a checkpoint keeps them."""
    if name.backbone == CONFIGURED:
        return importlib.import_module(f"{__package__}.models.clip").recorded(arguments)
    return dict(arguments)


def _dense_name(name: Name) -> str:
    return f"{name.backbone}.{name.tag}" if name.library == "timm" and name.tag else name.backbone


def _library(backbone: str) -> str | None:
    if backbone in backbones:
        return "vltprune"
    if backbone == CONFIGURED or (backbone.startswith("clip_") and backbone in _clip_names()):
        return "open_clip"
    return "timm" if importlib.import_module("timm").is_model(backbone) else None


def _timm_names() -> list[str]:
    timm = importlib.import_module("timm")
    return sorted(n for module in ("vision_transformer", "eva") for n in timm.list_models(module=module))


def _clip_names() -> dict[str, str]:
    """Our spelling of open_clip's architectures: "clip_vit_b_32" -> "ViT-B-32"."""
    open_clip = importlib.import_module("open_clip")
    return {"clip_" + n.lower().replace("-", "_").replace(".", "_"): n for n in open_clip.list_models()}
