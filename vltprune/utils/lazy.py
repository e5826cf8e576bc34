"""Lazy attributes: computed when they are first read, and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from typing_extensions import Self

T = TypeVar("T")


class lazy(Generic[T]):
    """A method read as an attribute, whose value is kept with the object.

    As functools.cached_property, without the lock of Python before 3.12, which torch.compile cannot record.

    Args:
        compute: computes the value.
    """

    def __init__(self, compute: Callable[[Any], T]):
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...

    @overload
    def __get__(self, owner: object, kind: type | None = None) -> T: ...

    def __get__(self, owner: object | None, kind: type | None = None) -> T | Self:
        if owner is None:
            return self
        value = self.compute(owner)
        object.__setattr__(owner, self.name, value)  # past the descriptor from now on; frozen dataclasses too
        return value
