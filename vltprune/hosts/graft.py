"""Models with one child exchanged, or with modules of their own, that share every parameter with the original."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def with_submodule(model: M, name: str, new: nn.Module) -> M:
    """The same model with one child exchanged; it shares every parameter, and `model` stays as it is."""
    out = _shallow_copy(model)
    out._modules[name] = new
    return out


def sharing(model: M) -> M:
    """A model of the same parameters in modules of its own: what is hooked to them, the modules of `model` do not notice."""
    out = _shallow_copy(model)
    for name, child in model._modules.items():
        out._modules[name] = child if child is None else sharing(child)
    return out


def _shallow_copy(model: M) -> M:
    """The same module once more, which shares its parameters, buffers and children.

    Parameters and buffers stand in the same tables, so that one that is replaced (`to`, `load_state_dict(assign=True)`) is
    replaced in both.
    """
    out = copy.copy(model)
    shared = ("_parameters", "_buffers")
    out.__dict__ = {
        key: value.copy() if isinstance(value, dict) and key not in shared else value
        for key, value in model.__dict__.items()
    }
    return out
