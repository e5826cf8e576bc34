"""PrunedModel: the type of what `prune` returns, and the record that each pruned model has of its pruning."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn

from ..utils.wrappers import unwrapped
from .encoder import Pruning


class _Declared(type):
    """Makes isinstance ask for a `Pruning` in place of a base class: a pruned composite keeps the class of its host."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, nn.Module) and isinstance(getattr(instance, "pruning", None), Pruning)


class PrunedModel(nn.Module, metaclass=_Declared):
    """A model whose towers prune their tokens, as `vltprune.prune` returns it.

    The type is declared and never built: a pruned tower is a `PrunedEncoder`, and a pruned composite has the class of its
    host. isinstance(model, PrunedModel) holds for both.

    Attributes:
        pruning: how the model is pruned: its config, the dense model, the guide and the pruned towers.
        host: the dense model, unchanged, which shares its weights with this one.
    """

    pruning: Pruning
    host: nn.Module

    def __init__(self) -> None:
        raise TypeError("PrunedModel is a type alone: vltprune.prune(model, preset) makes a pruned model")


def is_pruned(model: object) -> TypeGuard[PrunedModel]:
    """Whether an object is a pruned model, which has `.pruning` and `.host`.

    Args:
        model: any object. A wrapper, such as DistributedDataParallel, is no pruned model: ask about
            `vltprune.unwrapped(model)`.

    Returns:
        Whether the model is pruned, which narrows its type to PrunedModel.
    """
    return isinstance(model, PrunedModel)


def find_pruning(model: nn.Module) -> Pruning | None:
    """How a model is pruned, wrapped (compiled, in parallel) or not; None for a dense one."""
    inner = unwrapped(model)
    return inner.pruning if is_pruned(inner) else None


def dense_model(model: nn.Module) -> nn.Module:
    """The dense model behind a pruned one, wrapped or not; a dense one without its wrappers."""
    pruning = find_pruning(model)
    return unwrapped(model) if pruning is None else pruning.host


def get_pruning(model: nn.Module) -> Pruning:
    """How a model is pruned, wrapped (compiled, in parallel) or not. TypeError for a dense one."""
    return check_pruned(unwrapped(model)).pruning


def check_pruned(model: nn.Module) -> PrunedModel:
    """The model itself, which must be pruned. TypeError for a dense one."""
    if not is_pruned(model):
        raise TypeError(f"this {type(model).__name__} is not pruned: give it to vltprune.prune first")
    return model
