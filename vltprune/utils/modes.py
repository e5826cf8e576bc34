"""Context managers: models in evaluation mode, and modules built on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Puts models, dense or pruned, into evaluation mode within the `with` block.

    Afterwards, also after an error, each module is in its own former mode. That includes frozen blocks of a model in
    training, and the modules of the dense model behind a pruned one.

    Args:
        *models: the models, wrapped or not.
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
    """Builds modules on the meta device within the `with` block, and skips the initialization of their weights.

    Initialization takes most of the time of building a model, on the meta device too.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
