"""Immutable plain values, which configs hold, compare, hash and write as JSON."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn


def _refuse(*_: object, **__: object) -> NoReturn:
    raise TypeError("this mapping belongs to a config and cannot be changed: make another config with replace(...)")


class FrozenDict(dict[str, Any]):
    """An immutable dict with a hash, for frozen dataclasses. It can be copied and pickled."""

    _refused: Any = _refuse  # `dict` overloads what follows
    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refused

    def __hash__(self) -> int:  # a dict has none
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[object, ...]:
        return FrozenDict, (dict(self),)


def frozen(value: object, what: str) -> Any:
    """Converts a value to immutable plain data.

    Lists, arrays and tensors become tuples, mappings FrozenDicts, scalars of numpy and torch Python's numbers, paths text.

    Args:
        value: any value that JSON has a form for.
        what: the value's name, for errors.

    Returns:
        The value as immutable plain data.

    Raises:
        TypeError: for a value that JSON has no form for.
        ValueError: for a number that is not finite.
    """
    if value is None or isinstance(value, (bool, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays and scalars of numpy, tensors of torch
        return frozen(value.tolist(), what)
    if isinstance(value, numbers.Real):
        return _number(value, what)
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"{what}: keys are text, {wrong[0]!r} is not")
        return FrozenDict({str(key): frozen(entry, what) for key, entry in value.items()})
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        entries = tuple(frozen(entry, what) for entry in value)
        return tuple(sorted(entries, key=repr)) if isinstance(value, (set, frozenset)) else entries
    raise TypeError(f"{what} is {value!r}: give numbers, text, None, or lists and dicts of them")


def thawed(value: object) -> Any:
    """The inverse of `frozen`: lists and dicts, as JSON reads them."""
    if isinstance(value, Mapping):
        return {key: thawed(entry) for key, entry in value.items()}
    return [thawed(entry) for entry in value] if isinstance(value, tuple) else value


def _number(value: numbers.Real, what: str) -> int | float:
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}: give a finite number")
    return number
