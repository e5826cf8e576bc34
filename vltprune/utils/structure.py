"""Structure: the modules of a model, their plain attributes, and the shapes of its tensors.

A saved model is built again from a name and arguments, and its weights are loaded. Modules that were replaced after building
would be lost, so the structure is compared when a model is saved.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .wrappers import plain_name, unwrapped

# attributes that say how a model is run, and not what it computes
_RUNNING = {"training", "forward", "grad_checkpointing", "gradient_checkpointing", "fused_attn", "soft_temperature"}
_ABSENT = object()
_MOST = 8

# shape, kind and the key that it is tied to; of an entry that is no tensor, its type and that key
TensorDescription = tuple[tuple[int, ...], str, str] | tuple[str, str]


@dataclass(frozen=True)
class Structure:
    """The modules and tensors of a model, without the values of its weights.

    Attributes:
        modules: for each path of a module, the type's name and the plain attributes.
        tensors: for each key of the state dict, the shape, the kind, and the key that it is tied to.
    """

    modules: Mapping[str, tuple[str, Mapping[str, object]]]
    tensors: Mapping[str, TensorDescription]

    @classmethod
    def from_model(cls, model: nn.Module) -> Structure:
        """The structure of a model, wrapped or not."""
        model = unwrapped(model)
        first: dict[int, str] = {}
        tensors = {}
        for key, value in model.state_dict(keep_vars=True).items():
            name = plain_name(key)
            # tied tensors bear the first one's name
            tensors[name] = _described_tensor(value, first.setdefault(id(value), name))
        return cls(modules_of(model), tensors)

    def differences(self, other: Structure) -> list[str]:
        """The differences of another structure from this one, in words.

        An attribute that only the other one has is no difference, because users set attributes on modules.

        Args:
            other: the structure of the model as it is now.

        Returns:
            One text per difference, such as "head.eps is 1e-05 and was 1e-06"; none where both are equal.
        """
        found = []
        for path in {**self.modules, **other.modules}:
            before, after = self.modules.get(path), other.modules.get(path)
            if before is None or after is None or before[0] != after[0]:
                found.append(f"{path or 'the model'} is {_type(after, before)} and was {_type(before, after)}")
                continue
            for name, value in before[1].items():
                changed = after[1].get(name, _ABSENT)
                if not _same(value, changed):
                    found += _changes(f"{path + '.' if path else ''}{name}", value, changed)
        for key in {**self.tensors, **other.tensors}:
            before, after = self.tensors.get(key), other.tensors.get(key)
            if before != after and not any(key.startswith(f"{path}.") for path in _only_in_one(self, other)):
                found.append(f"{key} is {_tensor(after)} and was {_tensor(before)}")
        return found


def modules_of(model: nn.Module) -> dict[str, tuple[str, dict[str, object]]]:
    """For each path of a module, the type's name and the plain attributes."""
    return {plain_name(path): _described(module) for path, module in model.named_modules()}


def listed(differences: list[str]) -> str:
    """The first differences, for a message."""
    more = len(differences) - _MOST
    return "; ".join(differences[:_MOST]) + (f"; and {more} more" if more > 0 else "")


def attributes(module: nn.Module) -> dict[str, object]:
    """The plain attributes of a module: numbers, strings, and functions by name, also in lists and dicts."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in _RUNNING:
            continue
        converted = plain(value)
        if converted is not _ABSENT:
            found[name] = converted
    return found


def _described(module: nn.Module) -> tuple[str, dict[str, object]]:
    inner = unwrapped(module)
    return f"{type(inner).__module__}.{type(inner).__qualname__}", attributes(inner)


def plain(value: object) -> object:
    """A value as plain data; _ABSENT for tensors, modules and other values that are no configuration."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return str(value)
    if isinstance(value, (tuple, list)):
        items = tuple(plain(item) for item in value)
        return _ABSENT if any(item is _ABSENT for item in items) else items
    if isinstance(value, Mapping):
        return {str(key): converted for key, item in value.items() if (converted := plain(item)) is not _ABSENT}
    if isinstance(value, partial):
        return ("partial", plain(value.func), plain(value.args), plain(value.keywords))
    if inspect.ismethod(value) or isinstance(value, (Tensor, nn.Module)):
        return _ABSENT
    name = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{name}" if name is not None else _ABSENT


def _described_tensor(value: object, tied_to: str) -> TensorDescription:
    """A tensor's description. All floating-point tensors are of one kind, because `save` and `load` convert between dtypes."""
    if not isinstance(value, Tensor):
        return type(value).__name__, tied_to
    kind = "float" if value.is_floating_point() else str(value.dtype)
    plain = type(value.data) is Tensor
    return tuple(value.shape), kind if plain else f"{kind} in a {type(value.data).__name__}", tied_to


def _same(a: object, b: object) -> bool:
    return (
        a is b
        or (type(a) is type(b) and a == b)
        or (isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == b)
    )


def _only_in_one(first: Structure, second: Structure) -> list[str]:
    """Modules that only one of them has. Their tensors are not listed again."""
    return [path for path in first.modules.keys() ^ second.modules.keys() if path]


def _type(described: tuple[str, object] | None, other: tuple[str, object] | None) -> str:
    """The type's name, with its module where two types have the same name."""
    if described is None:
        return "nothing"
    name = described[0].rpartition(".")[2]
    return described[0] if other is not None and other[0].rpartition(".")[2] == name else name


def _changes(name: str, before: object, now: object) -> list[str]:
    """The change of an attribute in words; of a dict, only the entries that differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [key for key in {**before, **now} if not _same(before.get(key, _ABSENT), now.get(key, _ABSENT))]
        return [
            line
            for key in keys
            for line in _changes(f"{name}[{key!r}]", before.get(key, _ABSENT), now.get(key, _ABSENT))
        ]
    return [f"{name} is {_shown(now)} and was {_shown(before)}"]


def _tensor(described: TensorDescription | None) -> str:
    if described is None:
        return "nothing"
    return " ".join([str(list(described[0])), *described[1:-1]]) if len(described) > 2 else str(described[0])


def _shown(value: object) -> str:
    return "nothing" if value is _ABSENT else repr(value)
