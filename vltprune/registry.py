"""Names to makers: one small class, one instance per kind of part. The only mutable globals of the library."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

M = TypeVar("M", bound=Callable[..., Any])


class Registry:
    """Makers of one kind, by name. `kind` is the word that error messages use."""

    def __init__(self, kind: str):
        self.kind = kind
        self._makers: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[M], M]:
        """Decorator. ValueError if the name is taken or is no identifier."""

        def add(maker: M) -> M:
            if name in self._makers:
                raise ValueError(
                    f"{self.kind} {name!r} is already {self._makers[name].__qualname__}: choose another name"
                )
            if not all(word.isidentifier() for word in name.split(".")):
                raise ValueError(f"{self.kind} name {name!r} must be an identifier, so that it can stand in a config")
            self._makers[name] = maker
            return maker

        return add

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._makers:
            raise LookupError(f"there is no {self.kind} {name!r}" + nearest(name, self._makers))
        return self._makers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def names(self, pattern: str = "*") -> list[str]:
        """Registered names that match a shell pattern, sorted."""
        return sorted(fnmatch.filter(self._makers, pattern))

    @contextlib.contextmanager
    def temporarily(self, **makers: Callable[..., Any]) -> Iterator[Registry]:
        """Within the `with` block, these names too (or instead)."""
        before = dict(self._makers)
        self._makers.update(makers)
        try:
            yield self
        finally:
            self._makers = before


guides = Registry("guide")
scorers = Registry("scorer")
keepers = Registry("keeper")
reducers = Registry("reducer")
presets = Registry("preset")
backbones = Registry("backbone")
hosts = Registry("host")
tasks = Registry("task")


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an error message: the names closest to a wrong one, or all of a short list."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, 3, 0.5)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; there is {', '.join(known)}" if 0 < len(known) <= 12 else ""


def bind(what: str, maker: Callable[..., Any], arguments: Mapping[str, Any], given: tuple[str, ...] = ()) -> None:
    """TypeError unless `maker` can be called with these keyword arguments besides the `given` ones we pass ourselves.

    The message names `what`, the argument, and what there is to write instead.
    """
    signature = inspect.signature(maker)
    known = [name for name in signature.parameters if name not in given]
    for name in arguments:
        if name not in known:
            there = nearest(name, known) if known else "; it takes none"
            raise TypeError(f"{what} takes no argument {name!r}{there}")
    missing = [n for n in known if signature.parameters[n].default is inspect.Parameter.empty and n not in arguments]
    if missing:
        raise TypeError(f"{what} needs {', '.join(missing)}: write {what}({missing[0]}=...)")
