"""Lookup of hosts by the exact type of a module. A library's host module is imported when one of its models is met."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import nn

from ..registry import hosts
from .base import Composite, Host
from .refusals import dotted, refusal

# a module, or a top-level package -> module of this package
_HOST_MODULES = {
    "timm": "timm",
    "open_clip": "open_clip",
    "open_clip.hf_model": "open_clip_hf",
    "transformers": "transformers",
    "vltprune": "blip",
}


def find_host(tower: nn.Module) -> Host:
    """Find the host of a tower, by its exact type.

    Raises:
        TypeError: For a type or block that no host runs; with what is supported and what to write.
        ValueError: For an option of the tower that its host does not support.
    """
    found = _find(tower)
    if not isinstance(found, Host):
        for base in type(tower).__mro__:
            _import_hosts(base)
        raise refusal(tower, _find)
    found.check(tower)
    return found


def lookup_host(tower: nn.Module) -> Host | None:
    """Look up the host of a tower, by its exact type, and check nothing; None where no host runs it."""
    found = _find(tower)
    return found if isinstance(found, Host) else None


def find_composite(model: nn.Module) -> Composite | None:
    """Find the composite of a model of several towers, by its exact type; None for any other module.

    A library may have a composite for models without one of their own, `generic_composite` of its host module.

    Raises:
        TypeError: For a model that a library's generic composite is for and cannot run, with the reason.
    """
    found = _find(model)
    if found is None:
        generic = getattr(_import_hosts(type(model)), "generic_composite", None)
        return None if generic is None else generic(model)
    return found if isinstance(found, Composite) else None


def _find(module: nn.Module) -> Host | Composite | None:
    _import_hosts(type(module))
    name = dotted(type(module))
    if name not in hosts:
        return None
    cls: Any = hosts[name]
    return cls.from_module(module)


def _import_hosts(cls: type) -> ModuleType | None:
    """Import the host module of the library that a class is from, which registers its hosts; None for another library."""
    module_name = _HOST_MODULES.get(cls.__module__) or _HOST_MODULES.get(cls.__module__.partition(".")[0])
    return None if module_name is None else importlib.import_module(f"{__package__}.{module_name}")
