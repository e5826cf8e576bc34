"""Lookup of hosts: by the exact type of a tower; a library's host module is imported when its model is met."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from torch import nn

from ..registry import hosts
from .base import Composite, Host
from .refusals import dotted, refusal

# a module, or a top-level package -> module of this package
_ROOMS = {
    "timm": "timm",
    "open_clip": "open_clip",
    "open_clip.hf_model": "open_clip_hf",
    "transformers": "transformers",
    "vltprune": "blip",
}


def find_host(tower: nn.Module) -> Host:
    """The host of a tower, by exact type. TypeError, with what is supported, for a type or block we cannot take apart."""
    found = _find(tower)
    if not isinstance(found, Host):
        for base in type(tower).__mro__:
            _load_hosts(base)
        raise refusal(tower, _find, supported)
    found.check(tower)
    return found


def find_composite(model: nn.Module) -> Composite | None:
    """The composite of a model of several towers, None for anything else."""
    found = _find(model)
    return found if isinstance(found, Composite) else None


def supported() -> str:
    """The types that have a host, for messages."""
    for room in _ROOMS.values():
        with contextlib.suppress(ImportError):  # a library that is not there, or too old
            importlib.import_module(f"{__package__}.{room}")
    return ", ".join(hosts.names())


def _find(module: nn.Module) -> Host | Composite | None:
    _load_hosts(type(module))
    name = dotted(type(module))
    if name not in hosts:
        return None
    cls: Any = hosts[name]
    return cls.from_module(module)


def _load_hosts(cls: type) -> None:
    """Register the hosts of the library that a class is from."""
    room = _ROOMS.get(cls.__module__) or _ROOMS.get(cls.__module__.partition(".")[0])
    if room is not None:
        importlib.import_module(f"{__package__}.{room}")
