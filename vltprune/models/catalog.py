"""Names of models and weights: which library knows a name, and which names can be built and pruned."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from ..registry import backbones, nearest, presets
from . import sources, zoo

CONFIGURED = "clip"  # any of open_clip's architectures, by its configuration

# timm's modules whose models are a VisionTransformer or an Eva, and those of them with other blocks or another class
_TIMM_MODULES = ("vision_transformer", "vision_transformer_hybrid", "vitamin", "deit", "eva")
_TIMM_OTHERS = (
    "deit_*_distilled_*",  # VisionTransformerDistilled: two classifiers, on two tokens
    "vit_*_18x2_*",  # ParallelThingsBlock
    "vit_*_xp_*",  # ParallelScalingBlock
    "vit_pwee_*",  # ParallelScalingBlock
    "vit_dpwee_*",  # DiffParallelScalingBlock
    "vit_dwee_*",  # DiffAttention
    "vit_dlittle_*",  # DiffAttention
)


@dataclass(frozen=True)
class ModelName:
    """A model's name, read: library is "vltprune", "timm" or "open_clip"; backbone is in our spelling."""

    library: str
    backbone: str
    preset: str | None
    tag: str | None

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """ "blip_base_madtp.tag" -> its parts. Where timm and open_clip both have a backbone, timm's is meant.

        Raises LookupError, with the nearest names, where no library knows the backbone, TypeError for what is no text.
        """
        if not isinstance(text, str):
            raise TypeError(f"a model's name is text, such as 'blip_nlvr_tiny_madtp', not {text!r}")
        arch, dot, tag = text.partition(".")
        given = tag if dot else None
        for preset in sorted(presets.names(), key=len, reverse=True):
            stem = arch.removesuffix(f"_{preset}")
            found = _backbone(stem) if stem != arch else None
            if found is not None:
                return cls(*found, preset, given)
        found = _backbone(arch)
        if found is not None:
            return cls(*found, None, given)
        raise LookupError(f"there is no model {text!r}{_instead(text, arch)}")

    @property
    def arch(self) -> str:
        """Backbone and preset, without the tag."""
        return f"{self.backbone}_{self.preset}" if self.preset else self.backbone

    def __str__(self) -> str:
        return self.arch if self.tag is None else f"{self.arch}.{self.tag}"

    def tags(self) -> list[str]:
        """The tags of all weights that this name can have."""
        if self.library == "timm":
            return [name.partition(".")[2] for name in _timm().list_pretrained(f"{self.backbone}.*")]
        if self.library == "open_clip":
            return [] if self.backbone == CONFIGURED else _clip().list_pretrained_tags_by_model(self.in_open_clip)
        own = [tag for arch, _, tag in (name.partition(".") for name in zoo.packaged_names()) if arch == self.arch]
        return list(dict.fromkeys([*filter(None, own), *sources.SOURCES.get(self.backbone, {})]))

    @property
    def in_open_clip(self) -> str:
        """open_clip's own spelling of the backbone: "ViT-B-32"."""
        return open_clip_name(self.backbone)

    def check_tag(self) -> None:
        """LookupError, with the tags that there are, for a tag that names no weights."""
        if self.tag is not None and self.tag not in self.tags():
            raise LookupError(f"there is no {str(self)!r}: {self.no_weights()}")

    def no_weights(self) -> str:
        """What to say where weights of this name are asked for and there are none."""
        tags = self.tags()
        there = f"it has {', '.join('.' + tag for tag in tags)}" if tags else "nobody has published any"
        asked = f"{self.backbone}.{self.tag}" if self.tag is not None else self.backbone
        return f"no weights come with {asked!r} ({there}): give pretrained=PATH, a checkpoint of your own"


def list_models(pattern: str = "*", *, library: str | None = None) -> list[str]:
    """Names that `create_model` builds, `prune` prunes, and that match a shell pattern, sorted within each library.

    Any preset may be appended to each. open_clip's are matched in its own spelling too ("ViT-B-*"). library: "vltprune",
    "timm" or "open_clip" to list only its models, None for all. ValueError for another.
    """
    return [name for known in _libraries(library) for name in _LISTS[known]() if _matches(known, name, pattern)]


def list_pretrained(pattern: str = "*", *, library: str | None = None) -> list[str]:
    """Names with weights, which `create_model(name, pretrained=True)` loads: "clip_vit_b_32.openai".

    They are names of `list_models` with each of their tags, and of the weights that come with the package. A pattern
    without "." is of what stands before the tag. library: as in `list_models`.
    """
    return [name for known in _libraries(library) for name in _pretrained(known) if _matches(known, name, pattern)]


def unprunable(pattern: str) -> list[str]:
    """Names of timm and open_clip that match a shell pattern and are not listed: they are built, and not pruned."""
    everything = [("timm", name) for name in _timm().list_models()] + [("open_clip", name) for name in _clip_names()]
    listed = {*_timm_prunable(), *_clip_prunable()}
    return [name for known, name in everything if name not in listed and _matches(known, name, pattern)]


def open_clip_name(backbone: str) -> str:
    """open_clip's own spelling of an architecture: "clip_vit_b_32" -> "ViT-B-32". LookupError for none of its."""
    names = _clip_names()
    if backbone not in names:
        raise LookupError(f"open_clip has no {backbone!r}{nearest(backbone, names)}")
    return names[backbone]


def _libraries(library: str | None) -> list[str]:
    if library is not None and library not in _LISTS:
        raise ValueError(f"library={library!r}: there is {', '.join(_LISTS)}")
    return list(_LISTS) if library is None else [library]


def _pretrained(library: str) -> list[str]:
    names = {f"{model}.{tag}" for model in _LISTS[library]() for tag in ModelName(library, model, None, None).tags()}
    return sorted(names | set(zoo.packaged_names())) if library == "vltprune" else sorted(names)


def _matches(library: str, name: str, pattern: str) -> bool:
    arch, _, tag = name.partition(".")
    spellings = [arch, _clip_names()[arch]] if library == "open_clip" else [arch]
    ends = f".{tag}" if tag and "." in pattern else ""
    return any(fnmatch.fnmatchcase(spelling + ends, pattern) for spelling in spellings)


def _backbone(text: str) -> tuple[str, str] | None:
    """The library of a backbone, and its name in our spelling; None where no library knows it."""
    if text in backbones:
        return "vltprune", text
    if text == CONFIGURED or (text.startswith("clip_") and text in _clip_names()):
        return "open_clip", text
    if text and _timm().is_model(text):
        return "timm", text
    native = text.replace("/", "-")  # open_clip takes "ViT-B/32" too
    return next((("open_clip", ours) for ours, theirs in _clip_names().items() if theirs == native), None)


def _instead(text: str, arch: str) -> str:
    """The tail of an error: the names closest to an unknown one, or how to read what seems to be no name."""
    if "/" in text or text.startswith("hf-hub:"):
        return (
            ": read a folder that vltprune.save wrote with vltprune.load(folder), and a repository of the hub with "
            "vltprune.from_pretrained('hf-hub:org/name')"
        )
    stem = arch.rpartition("_")[0]
    presets_of = [stem] if stem and _backbone(stem) is not None else backbones.names()
    known = [*list_models(), *_clip_names().values(), *(f"{b}_{p}" for b in presets_of for p in presets.names())]
    return nearest(arch, [*known, CONFIGURED]) or "; vltprune.list_models() gives the names"


def _timm() -> Any:
    return importlib.import_module("timm")


def _clip() -> Any:
    return importlib.import_module("open_clip")


def _clip_names() -> dict[str, str]:
    """Our spelling of open_clip's architectures: "clip_vit_b_32" -> "ViT-B-32"."""
    return {"clip_" + n.lower().replace("-", "_").replace(".", "_"): n for n in _clip().list_models()}


def _timm_prunable() -> list[str]:
    names = {name for module in _TIMM_MODULES for name in _timm().list_models(module=module)}
    return sorted(name for name in names if not any(fnmatch.fnmatchcase(name, other) for other in _TIMM_OTHERS))


def _clip_prunable() -> list[str]:
    trunks = set(_timm_prunable())
    configs = {ours: _clip().get_model_config(theirs) for ours, theirs in _clip_names().items()}
    return sorted(ours for ours, config in configs.items() if _is_prunable(config, trunks))


def _is_prunable(config: Mapping[str, Any], trunks: Set[str]) -> bool:
    """Whether both towers of one of open_clip's architectures are made of blocks that can be pruned."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    trunk = vision.get("timm_model_name")
    is_vit = trunk in trunks if trunk else isinstance(vision.get("layers", 12), int)  # a ResNet has a list of them
    encoder = text.get("hf_model_name")
    is_encoder = "bert" in encoder if encoder else not text.get("embed_cls")  # the others are T5 and M2M100
    return is_vit and is_encoder and "multimodal_cfg" not in config  # those with one are CoCa


_LISTS: Mapping[str, Callable[[], list[str]]] = {
    "vltprune": backbones.names,
    "timm": _timm_prunable,
    "open_clip": _clip_prunable,
}
