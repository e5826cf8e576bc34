"""Copies of models that share every parameter with the original: with one child exchanged, or with modules of their own."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def with_submodule(model: M, name: str, new: nn.Module) -> M:
    """Copy a model with one child exchanged. The copy shares every other parameter; `model` stays as it is.

    Args:
        model: The model to copy.
        name: Name of a direct child.
        new: The child in its place.

    Returns:
        The copy.
    """
    out = shallow_copy(model)
    out._modules[name] = new
    return out


def with_descendant(model: M, name: str, new: nn.Module) -> M:
    """Copy a model with one descendant exchanged. The copy shares every other parameter; `model` stays as it is.

    Args:
        model: The model to copy.
        name: Dotted name of a descendant, which need not be there.
        new: The module in its place.

    Returns:
        The copy, in which the modules on the way to the descendant are copies too.
    """
    child, _, rest = name.partition(".")
    return with_submodule(model, child, with_descendant(model.get_submodule(child), rest, new) if rest else new)


def copy_modules(model: M) -> M:
    """Copy a model's modules, not its parameters: hooks on the copy do not act on `model`."""
    out = shallow_copy(model)
    for name, child in model._modules.items():
        out._modules[name] = child if child is None else copy_modules(child)
    return out


def shallow_copy(model: M) -> M:
    """Copy one module; it shares its parameters, buffers and children with the original. Hooks on the copy act on it alone.

    Parameters and buffers stay in the same tables: one that is replaced (`to`, `load_state_dict(assign=True)`) is replaced in
    both.
    """
    out = copy.copy(model)
    shared = ("_parameters", "_buffers")
    out.__dict__ = {
        key: value.copy() if isinstance(value, dict) and key not in shared else value
        for key, value in model.__dict__.items()
    }
    return out
