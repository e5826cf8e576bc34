"""Errors for modules that have no host: which part is not supported, and what to prune or register instead."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..registry import hosts

_LIST = "docs/supported.md lists all"
_SUPPORTED = (
    "VisionTransformer and Eva of timm, CLIP of open_clip, BERT, ViT, DINO, CLIP, SigLIP, BLIP and ViLT of transformers, "
    f"BLIP of this library; {_LIST}"
)


def refusal(module: nn.Module, find: Callable[[nn.Module], object]) -> TypeError:
    """Build the error for a module whose type has no host.

    Args:
        module: The module.
        find: Returns a module's host or composite, None without one.

    Returns:
        The error, with the reason and what is supported; the caller raises it.
    """
    reason = _as_subclass(type(module)) or _as_wrapper(module, find) or f"no host runs it. Supported: {_SUPPORTED}"
    return TypeError(f"cannot prune a {dotted(type(module))}: {reason}")


def dotted(cls: type) -> str:
    """The name that a class is registered by, "package.module.Class"."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _as_subclass(cls: type) -> str | None:
    """The reason for a class that inherits from one with a host; None for another."""
    lineage = cls.__mro__[1:]
    base = next((base for base in lineage if dotted(base) in hosts), None)
    if base is None:
        return None
    between = (cls, *lineage[: lineage.index(base)])
    changed = [name for one in between for name in vars(one) if _is_method(name, one) and hasattr(base, name)]
    if changed:
        return (
            f"it overrides {changed[0]} of {dotted(base)}, and no host knows to what effect. Derive one from that type's host, "
            f"vltprune.hosts[...], and register it by vltprune.hosts.register({dotted(cls)!r}). Supported types: {_LIST}"
        )
    return (
        f"hosts are chosen by exact type. It overrides no method of {base.__qualname__}; if it runs as that does, write "
        f"vltprune.hosts.register({dotted(cls)!r})(vltprune.hosts[{dotted(base)!r}]). Supported types: {_LIST}"
    )


def _is_method(name: str, cls: type) -> bool:
    return callable(vars(cls)[name]) and not name.startswith("__")


def _as_wrapper(module: nn.Module, find: Callable[[nn.Module], object]) -> str | None:
    """The reason for a module that holds one with a host, as wrappers of peft and sentence-transformers do; or None."""
    for path, inner in module.named_modules():
        if path and find(inner) is not None:
            place = "model" + "".join(f"[{step}]" if step.isdigit() else f".{step}" for step in path.split("."))
            return (
                f"it wraps one that can be pruned, a {type(inner).__name__}. Prune that: "
                f"{place} = vltprune.prune({place}, ...). Supported types: {_LIST}"
            )
    return None
