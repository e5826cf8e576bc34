"""The catalog of model names: which library knows a name, and which models can be built and pruned."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from ..registry import backbones, nearest, presets
from . import sources, zoo

CONFIGURED = "clip"  # any of open_clip's architectures, by its configuration
_MOST_TAGS = 12  # in an error

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
    """The parts of a model's name: "blip_nlvr_tiny_madtp.p80" is a backbone, a preset and a tag of weights.

    Attributes:
        library: Who builds the backbone: "vltprune", "timm" or "open_clip".
        backbone: The dense model, in this library's spelling ("clip_vit_b_32" for open_clip's "ViT-B-32").
        preset: How it is pruned; None for a dense model.
        tag: Which weights it has; None for none in particular.
    """

    library: str
    backbone: str
    preset: str | None
    tag: str | None

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Split a name into its parts. Where timm and open_clip both have a backbone, timm's is meant.

        Raises:
            LookupError: If no library knows the backbone, or no preset has the name behind it; with the nearest names.
            TypeError: If `text` is no text.
        """
        if not isinstance(text, str):
            raise TypeError(f"a model's name is text, such as 'blip_nlvr_tiny_madtp', not {text!r}")
        arch, dot, tag = text.partition(".")
        tag_or_none = tag if dot else None
        for preset in sorted(presets.names(), key=len, reverse=True):
            stem = arch.removesuffix(f"_{preset}")
            found = _find_backbone(stem) if stem != arch else None
            if found is not None:
                return cls(*found, preset, tag_or_none)
        found = _find_backbone(arch)
        if found is not None:
            return cls(*found, None, tag_or_none)
        raise LookupError(f"there is no model {text!r}{_suggestion(text, arch)}")

    @property
    def arch(self) -> str:
        """Backbone and preset, without the tag."""
        return f"{self.backbone}_{self.preset}" if self.preset else self.backbone

    def __str__(self) -> str:
        return self.arch if self.tag is None else f"{self.arch}.{self.tag}"

    def tags(self) -> list[str]:
        """The tags of all weights that this backbone and preset can have."""
        if self.library == "timm":
            return [name.partition(".")[2] for name in _timm().list_pretrained(f"{self.backbone}.*")]
        if self.library == "open_clip":
            return [] if self.backbone == CONFIGURED else _clip().list_pretrained_tags_by_model(self.open_clip_name)
        packaged = [tag for arch, _, tag in (name.partition(".") for name in zoo.packaged_names()) if arch == self.arch]
        return list(dict.fromkeys([*filter(None, packaged), *sources.SOURCES.get(self.backbone, {})]))

    @property
    def open_clip_name(self) -> str:
        """open_clip's own spelling of the backbone: "ViT-B-32"."""
        return open_clip_name(self.backbone)

    def check_tag(self) -> None:
        """Check that the name's tag exists.

        Raises:
            LookupError: If it names no weights; with the tags that there are.
        """
        if self.tag is not None and self.tag not in self.tags():
            raise LookupError(self.no_weights())

    def no_weights(self) -> str:
        """The message for weights that do not exist: which were asked for, which there are, and what to write."""
        problem = (
            f"there are no weights {str(self)!r}" if self.tag is not None else f"no weights come with {str(self)!r}"
        )
        tags = self.tags()
        close = difflib.get_close_matches(self.tag or "", tags, 3, 0.5) if len(tags) > _MOST_TAGS else tags
        if close:
            advice = f"{self.arch} has {', '.join('.' + tag for tag in close)}"
        elif tags:
            advice = f"vltprune.list_pretrained({self.backbone!r}) gives the {len(tags)} that there are"
        else:
            advice = "nobody has published any"
        return f"{problem}: {advice}; pretrained=PATH loads a checkpoint of your own"


def list_models(pattern: str = "*", *, library: str | None = None) -> list[str]:
    """List the dense models that `create_model` builds and `prune` prunes.

    Any preset may be appended to a name: "vit_small_patch16_224_attention" is the pruned model.

    Args:
        pattern: Shell pattern of names, upper or lower case. open_clip's models also match in its own spelling ("ViT-B-*").
        library: "vltprune", "timm" or "open_clip" for its models alone; None for all.

    Returns:
        Names, sorted within each library.

    Raises:
        ValueError: For another library.

    Example:
        >>> import vltprune as vp
        >>> vp.list_models("blip_nlvr_*")
        ['blip_nlvr_base', 'blip_nlvr_large', 'blip_nlvr_tiny']
        >>> vp.list_models("ViT-B-32", library="open_clip")
        ['clip_vit_b_32']
    """
    return [name for known in _libraries(library) for name in _LISTS[known]() if _matches(known, name, pattern)]


def list_pretrained(pattern: str = "*", *, library: str | None = None) -> list[str]:
    """List the weights that `create_model(name)` loads: names of models with a tag, and names of packaged weights.

    Args:
        pattern: Shell pattern of names, upper or lower case. A pattern without "." is matched with the part before the tag.
        library: "vltprune", "timm" or "open_clip" for its weights alone; None for all.

    Returns:
        Names, sorted within each library. `create_model(name)` loads those with a tag; those without, which come with the
        package, need `pretrained=True`.

    Raises:
        ValueError: For another library.

    Example:
        >>> import vltprune as vp
        >>> vp.list_pretrained("blip_caption_*")
        ['blip_caption_base.coco', 'blip_caption_large.coco']
        >>> vp.list_pretrained("ViT-B-32.openai")
        ['clip_vit_b_32.openai']
    """
    return [name for known in _libraries(library) for name in _pretrained(known) if _matches(known, name, pattern)]


def unprunable(pattern: str) -> list[str]:
    """List names of timm and open_clip that match a shell pattern and can be built, but not pruned."""
    everything = [("timm", name) for name in _timm().list_models()] + [("open_clip", name) for name in _clip_names()]
    listed = {*_timm_prunable(), *_clip_prunable()}
    return [name for known, name in everything if name not in listed and _matches(known, name, pattern)]


def open_clip_name(backbone: str) -> str:
    """open_clip's own spelling of an architecture: "clip_vit_b_32" -> "ViT-B-32".

    Raises:
        LookupError: If it is none of open_clip's.
    """
    names = _clip_names()
    if backbone not in names:
        raise LookupError(f"open_clip has no {backbone!r}{nearest(backbone, names)}")
    return names[backbone]


def _libraries(library: str | None) -> list[str]:
    if library is not None and library not in _LISTS:
        raise ValueError(f"library={library!r} is not supported: write one of {', '.join(_LISTS)}")
    return list(_LISTS) if library is None else [library]


def _pretrained(library: str) -> list[str]:
    names = {f"{model}.{tag}" for model in _LISTS[library]() for tag in ModelName(library, model, None, None).tags()}
    return sorted(names | set(zoo.packaged_names())) if library == "vltprune" else sorted(names)


def _matches(library: str, name: str, pattern: str) -> bool:
    arch, _, tag = name.partition(".")
    spellings = [arch, _clip_names()[arch]] if library == "open_clip" else [arch]
    ending = f".{tag}" if tag and "." in pattern else ""
    return any(fnmatch.fnmatchcase((spelling + ending).lower(), pattern.lower()) for spelling in spellings)


def _find_backbone(text: str) -> tuple[str, str] | None:
    """The library of a backbone, and its name in our spelling; None where no library knows it."""
    if text in backbones:
        return "vltprune", text
    if text == CONFIGURED or (text.startswith("clip_") and text in _clip_names()):
        return "open_clip", text
    if text and _timm().is_model(text):
        return "timm", text
    native = text.replace("/", "-")  # open_clip takes "ViT-B/32" too
    return next((("open_clip", ours) for ours, theirs in _clip_names().items() if theirs == native), None)


def _suggestion(text: str, arch: str) -> str:
    """The tail of an error for an unknown name: what to write instead."""
    last = text.rpartition("/")[2]
    if "/" in text and _find_backbone(last.partition(".")[0]) is not None:
        return f"; write {last!r}"
    if "/" in text or text.startswith("hf-hub:"):
        return (
            ": load a folder that vltprune.save wrote with vltprune.load(folder), and a repository of the hub with "
            "vltprune.from_pretrained('hf-hub:org/name')"
        )
    stem, ending = _split_unknown_ending(arch)
    known = [*list_models(), *_clip_names().values()]
    if stem is None:
        pruned = [f"{own}_{preset}" for own in (*backbones.names(), CONFIGURED) for preset in presets.names()]
        return nearest(arch, [*known, *pruned, CONFIGURED]) or "; vltprune.list_models() gives the names"
    endings = [*presets.names(), *(name.removeprefix(f"{stem}_") for name in known if name.startswith(f"{stem}_"))]
    close = difflib.get_close_matches(ending, endings, 3, 0.5)
    if close:
        return f"; did you mean {', '.join(f'{stem}_{one}' for one in close)}?"
    return f": {stem!r} is one, and the presets that may follow it are {', '.join(presets.names())}"


def _split_unknown_ending(arch: str) -> tuple[str | None, str]:
    """The longest backbone that an unknown name begins with, and what follows its "_"; None where it begins with none."""
    stem = arch
    while "_" in stem:
        stem = stem.rpartition("_")[0]
        if stem != CONFIGURED and _find_backbone(stem) is not None:
            return stem, arch[len(stem) + 1 :]
    return None, ""


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
