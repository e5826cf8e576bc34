"""Batches for calibration: selects the part of a batch that the model takes, and moves it to the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..utils.wrappers import unwrapped

Batch = Tensor | Sequence[object] | Mapping[str, object] | Callable[[nn.Module], object]
# a function gets whatever the caller's loader gives
Inputs = int | str | Callable[[Any], Batch] | None

_SELECT = "say which part the model takes: inputs=0, inputs='pixel_values' or inputs=lambda batch: batch[0]"
# what a model raises of arguments that are not its own; errors of the device pass as they are
_REFUSALS = (AttributeError, LookupError, TypeError, ValueError)


def model_inputs(batches: Iterable[object], inputs: Inputs = None) -> Iterator[Batch]:
    """The part of each batch that the model takes.

    Args:
        batches: a DataLoader or another iterable of batches.
        inputs: the position or key of the model's input in a batch, or a function from a batch to the model's inputs. None
            passes whole batches.

    Yields:
        The model's inputs of each batch.

    Raises:
        TypeError: for one batch in place of several, and for a batch that lacks the position or key.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be a DataLoader or a list of batches, not {_described(batches)}: write [batch]")
    for batch in batches:
        yield _selected(batch, inputs)


def run_batch(model: nn.Module, batch: Batch) -> object:
    """Runs a model on a batch, whose tensors are moved to the model's device and floating-point type.

    Args:
        model: the model, dense or pruned.
        batch: a tensor is the model's input, a sequence its positional inputs, a mapping its named inputs. A function is
            called with the model.

    Returns:
        The model's output, or what the function returned.

    Raises:
        TypeError, ValueError: where the model does not take several inputs, with the argument that selects among them.
    """
    if isinstance(batch, Tensor):
        return model(_like(batch, model))
    if isinstance(batch, Mapping):
        return _run(model, batch, (), {name: _like(value, model) for name, value in batch.items()})
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return _run(model, batch, [_like(value, model) for value in batch], {})
    return batch(model) if callable(batch) else model(batch)


def _run(
    model: nn.Module,
    batch: Sequence[object] | Mapping[str, object],
    positional: Sequence[object],
    named: Mapping[str, object],
) -> object:
    try:
        return model(*positional, **named)
    except _REFUSALS as error:
        if len(batch) < 2:
            raise
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(
            f"{type(unwrapped(model)).__name__} does not take a batch of {_described(batch)}: {error}. Where a batch holds "
            f"more than the model's inputs, such as labels, {_SELECT}"
        ) from error


def _selected(batch: Any, inputs: Inputs) -> Batch:
    if inputs is None:
        return batch
    if callable(inputs):
        return inputs(batch)
    try:
        return batch[inputs]
    except (LookupError, TypeError) as error:
        raise TypeError(f"inputs={inputs!r} is no part of a batch of {_described(batch)}: {_SELECT}") from error


def _like(value: object, model: nn.Module) -> object:
    """A tensor on the model's device, in its floating-point type where it is floating-point; other values as they are."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if not isinstance(value, Tensor) or weight is None:
        return value
    return value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)


def _described(batch: object) -> str:
    """A batch in words: "image (float32 [8, 3, 224, 224]), label (int64 [8])"."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{name} ({_described(value)})" for name, value in batch.items()) or "nothing"
    if isinstance(batch, (list, tuple)) and any(isinstance(value, Tensor) for value in batch):
        return ", ".join(map(_described, batch))
    return f"a {type(batch).__name__}"
