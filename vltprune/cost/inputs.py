"""Inputs of the functions that run a model to see what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any] | Callable[[nn.Module], Any]


def run_batch(model: nn.Module, batch: Batch) -> Any:
    """What the model gives for a batch: a tensor, positional inputs, named inputs, or a function that calls the model."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if callable(batch) and not isinstance(batch, Tensor):
        return batch(model)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
