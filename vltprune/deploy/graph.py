"""Graph: the call of a model with its example inputs, traced by torch.export into a program of tensors alone."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from ..cost.inputs import Batch
from ..pruning.pruner import Pruner

_IMAGES = 4  # dimensions, from which on an input is images


class ExportError(ValueError):
    """A model that cannot be exported, or a file that does not compute what the model does. Nothing was written."""


@dataclass(frozen=True)
class Value:
    """An input or an output of an exported graph.

    Attributes:
        name: its name.
        dtype: its type, as "float32".
        shape: its sizes; None for the batch, where it may be any.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Call(nn.Module):
    """The call of a model as a module from tensors to tensors, which is what torch.export traces.

    Args:
        model: the model.
        inputs: its inputs: a tensor, a sequence of positional inputs or a mapping of named ones. What is no tensor is a
            constant of the graph.
        method: the method that is called. None calls the model.

    Attributes:
        names: the names of the tensors among the inputs, in order.
        tensors: these tensors.

    Raises:
        TypeError: for inputs of another type, without a tensor, and for a model without the method.
        ValueError: for tensors of different batches.
    """

    def __init__(self, model: nn.Module, inputs: Batch, method: str | None = None):
        super().__init__()
        self.model, self._method = model, method
        if method is not None and not callable(getattr(model, method, None)):
            raise TypeError(f"method={method!r}: a {type(model).__name__} has no such method")
        if isinstance(inputs, Tensor):
            inputs = (inputs,)
        if not isinstance(inputs, (Mapping, Sequence)) or isinstance(inputs, str):
            raise TypeError(
                f"inputs must be a tensor, a tuple of tensors or a mapping of named ones, not a {type(inputs).__name__}"
            )
        named = inputs if isinstance(inputs, Mapping) else dict(zip(self._parameters_of_call(), inputs, strict=False))
        self._positional = not isinstance(inputs, Mapping)
        if len(named) < len(inputs):
            raise TypeError(f"a {type(model).__name__} takes {len(named)} inputs, not {len(inputs)}")
        self._values = {name: None if isinstance(value, Tensor) else value for name, value in named.items()}
        found = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if not found:
            raise TypeError("inputs hold no tensor: give an example of what the model will get")
        self._keys = tuple(found)
        self.tensors = tuple(found.values())
        self.names = tuple("images" if key == "x" and one.dim() >= _IMAGES else key for key, one in found.items())
        sizes = {len(one) if one.dim() else 0 for one in self.tensors}
        if len(sizes) > 1 or 0 in sizes:
            shapes = ", ".join(f"{name} {list(one.shape)}" for name, one in zip(self.names, self.tensors, strict=True))
            raise ValueError(f"inputs must have the same batch as their first dimension, at least 1; got {shapes}")

    def _parameters_of_call(self) -> list[str]:
        """The names of the positional inputs: those of the dense model, where a pruned one takes any."""
        model: Any = self.model
        called = getattr(model, self._method) if self._method else model.forward
        if self._method is None and hasattr(model, "host"):
            called = model.host.forward
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [name for name, one in inspect.signature(called).parameters.items() if one.kind in kinds]

    def outputs(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The model's output tensors by name. TypeError for an output without tensors."""
        model: Any = self.model
        called = model if self._method is None else getattr(model, self._method)
        named = {**self._values, **dict(zip(self._keys, tensors, strict=True))}
        output = called(*named.values()) if self._positional else called(**named)
        found = dict(_named_tensors(output))
        if not found:
            raise TypeError(
                f"this {type(self.model).__name__} returns a {type(output).__name__}, and an engine returns tensors: "
                "give method=, the name of a method that returns tensors"
            )
        return found

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.outputs(*tensors).values())


def is_adaptive(model: nn.Module) -> bool:
    """Whether some layer of a model, dense or pruned, keeps a number of tokens that depends on what they hold."""
    return bool(_adaptive_layers(model))


def runs_adaptive(call: Call) -> bool:
    """Whether a call runs such a layer. A method of a model of two towers may run one of them alone."""
    ran: list[nn.Module] = []
    with contextlib.ExitStack() as stack:
        for pruner in _adaptive_layers(call.model):
            stack.enter_context(pruner.register_forward_hook(lambda layer, *_: ran.append(layer)))
        call(*call.tensors)
    return bool(ran)


def _adaptive_layers(model: nn.Module) -> list[Pruner]:
    """The pruners whose number of tokens depends on what they hold."""
    pruners = (module for module in model.modules() if isinstance(module, Pruner))
    return [pruner for pruner in pruners if not pruner.keeper.fixed or not pruner.selector.fixed]


def trace(call: Call, tensors: Sequence[Tensor], any_batch: bool) -> ExportedProgram:
    """Traces a call by torch.export.

    Args:
        call: the call, of a model in evaluation mode.
        tensors: the example inputs, of at least two instances for any batch.
        any_batch: whether the first dimension of all inputs may be any. Otherwise it is that of the example.

    Returns:
        The program.

    Raises:
        ExportError: where torch.export cannot trace the call, with what to do instead.
    """
    batch = {0: Dim("batch")} if any_batch else None
    shapes = (tuple(batch for _ in tensors),)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch about itself, as what it prints of a graph that fails
            return torch.export.export(call, tuple(tensors), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the traced code meets
        raise cannot_export(call.model, error, "torch.export") from error


def cannot_export(model: nn.Module, error: Exception, tool: str) -> ExportError:
    """The error for a model that cannot be exported, with what to do instead.

    Args:
        model: the model.
        error: what was raised.
        tool: what raised it, for readers.
    """
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("Exception from")]
    reason = next(iter(lines), type(error).__name__)
    if is_adaptive(model):
        advice = (
            f"its counts depend on what the tokens hold, in a way that {tool} cannot take. Fix them first, "
            "vltprune.freeze(model, batches).model, or `vltprune export --data DIR`"
        )
    else:
        advice = (
            f"{tool} cannot take it. Where texts have lengths of their own, write batch=1, or leave the attention mask out and "
            "give texts of one length; export one tower alone by method='encode_image'"
        )
        if tool == "OpenVINO":
            advice += "; or write a file for ONNX Runtime, format='onnx'"
    return ExportError(f"cannot export this {type(model).__name__}: {advice} ({reason})")


def _named_tensors(output: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output with their names: keys and positions, joined by dots; "output" for a tensor by itself."""
    for path, leaf in _pytree.tree_flatten_with_path(output)[0]:
        if isinstance(leaf, Tensor):
            keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
            yield (".".join(keys) if keys and not keys[0].isdigit() else "_".join(["output", *keys])), leaf
