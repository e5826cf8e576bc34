"""What the libraries around a host read of a model: the attributes and methods of the dense tower that a pruned one has, too.

They are declared, each library's in a subclass of `PrunedEncoder`, and everything else of the dense tower is `pruned.host`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..pruning.encoder import PrunedEncoder

E = TypeVar("E", bound=type[PrunedEncoder])


class HostAttribute:
    """An attribute of the dense tower, read through the pruned one; AttributeError where the dense tower has none.

    A method acts on the dense tower, whose modules and parameters are the pruned one's. What is set on the pruned tower is its
    own from then on.
    """

    def __init__(self, name: str):
        self.name = name

    def __get__(self, pruned: PrunedEncoder | None, owner: type) -> Any:
        return self if pruned is None else getattr(pruned.host, self.name)


def forwards(*names: str) -> Callable[[E], E]:
    """Class decorator: instances have these attributes of their dense tower."""

    def declare(cls: E) -> E:
        for name in names:
            setattr(cls, name, HostAttribute(name))
        return cls

    return declare


def of_host(parameters: Any) -> set[str]:
    """Names of a dense tower's parameters as the pruned tower has them."""
    return {f"host.{name}" for name in parameters}
