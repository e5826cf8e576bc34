"""Modes that last for a `with` block: a model in evaluation, and modules that are built without numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .wrappers import unwrapped

_FILLS = {
    getattr(torch.Tensor, name)
    for name in ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "clamp_", "mul_", "add_")
}


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within the `with` block the models, dense or pruned, are in evaluation mode.

    Afterwards each module is in the mode that it was in before, frozen blocks of a model in training as well, and so are
    the modules of the dense model that a pruned one shares. It is so after an error, too.
    """
    before = [(module, module.training) for module in _modules(models)]
    try:
        if any(mode for _, mode in before):
            for model in models:
                model.eval()
        yield
    finally:
        for module, mode in before:  # through `train`, which some modules override; a parent comes before its children
            if module.training != mode:
                module.train(mode)
        for module, mode in before:  # a module may be the child of several
            if module.training != mode:  # setting an attribute of a module takes longer than reading it
                module.training = mode


def _modules(models: tuple[nn.Module, ...]) -> list[nn.Module]:
    """Every module of the models, and of the dense models behind pruned ones, a parent before its children."""
    found: dict[nn.Module, None] = {}
    for model in models:
        host = getattr(getattr(unwrapped(model), "pruning", None), "host", None)
        for root in (model,) if host is None else (model, host):
            _gather(root, found)
    return list(found)


def _gather(module: nn.Module, found: dict[nn.Module, None]) -> None:
    """`Module.modules`, which also spells each one's name, and takes several times as long."""
    if module not in found:
        found[module] = None
        for child in module._modules.values():
            if child is not None:
                _gather(child, found)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Within the `with` block modules are built on the meta device, and nothing is computed to fill their weights.

    What torch does there to draw them takes most of the time that it takes to build a model.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
