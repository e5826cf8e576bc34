"""Attributes of the dense tower that its library expects of a model, declared on the pruned tower.

Each library's are declared in a subclass of `PrunedEncoder`; all others are those of `pruned.host`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ..pruning.encoder import PrunedEncoder

E = TypeVar("E", bound=type[PrunedEncoder])


class HostAttribute:
    """Descriptor that forwards an attribute to the dense tower; AttributeError where that has none.

    A method acts on the dense tower, whose modules and parameters are the pruned one's. An attribute that is set on the pruned
    tower is its own from then on.

    Args:
        name: Name of the attribute.
    """

    def __init__(self, name: str):
        self.name = name

    def __get__(self, pruned: PrunedEncoder | None, owner: type) -> Any:
        return self if pruned is None else getattr(pruned.host, self.name)


def forward_attributes(*names: str) -> Callable[[E], E]:
    """Class decorator of pruned towers: forward these attributes to the dense tower."""

    def declare(cls: E) -> E:
        for name in names:
            setattr(cls, name, HostAttribute(name))
        return cls

    return declare


def host_names(parameters: Iterable[str]) -> set[str]:
    """Names of a dense tower's parameters as the pruned tower has them."""
    return {f"host.{name}" for name in parameters}
