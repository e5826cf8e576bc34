"""Registry: makers by name, one registry for each kind of part, preset, backbone, host and task."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import keyword
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .utils.importing import load_plugins, missing_plugins

# what a maker takes and builds depends on the registry that it is in
Maker = Callable[..., Any]

M = TypeVar("M", bound=Callable[..., object])


class Registry:
    """Makers of one kind, by name. A maker is a class or function that builds a part.

    Asked for all names, or for one that it does not have, it first imports what other packages name as entry points of the
    group "vltprune.parts".

    Args:
        kind: the word for it in error messages.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._makers: dict[str, Maker] = {}
        self._lock = threading.Lock()

    def register(self, name: str) -> Callable[[M], M]:
        """Registers a maker, as a decorator: @vltprune.scorers.register("name").

        Args:
            name: an identifier, or several with dots between.

        Returns:
            The decorator, which returns the maker itself.

        Raises:
            ValueError: for a name that is taken, or that is no identifier.
            TypeError: for a maker that cannot be called.
        """
        if not isinstance(name, str):
            raise TypeError(f"register takes the {self.kind}'s name: write register('name') above it, not {name!r}")
        if not all(word.isidentifier() and not keyword.iskeyword(word) for word in name.split(".")):
            raise ValueError(f"{self.kind} name {name!r} must be an identifier, such as 'my_{self.kind}'")

        def add(maker: M) -> M:
            if not callable(maker):
                raise TypeError(f"{self.kind} {name!r} must be a class or function that makes one, not {maker!r}")
            with self._lock:
                if name in self._makers:
                    raise ValueError(
                        f"{self.kind} {name!r} is already {_described(self._makers[name])}: choose another name"
                    )
                self._makers[name] = maker
            return maker

        return add

    def __getitem__(self, name: str) -> Maker:
        if name not in self:
            raise LookupError(
                f"there is no {self.kind} {name!r}{nearest(str(name), self._makers.copy())}{missing_plugins()}"
            )
        return self._makers[name]

    def __contains__(self, name: object) -> bool:
        if name in self._makers:
            return True
        load_plugins()
        return name in self._makers

    def name_of(self, maker: object) -> str | None:
        """The first registered name of a maker, None for one that is not registered. It loads no plugins."""
        # a copy: other threads may register meanwhile
        return next((name for name, other in self._makers.copy().items() if other is maker), None)

    def names(self, pattern: str = "*") -> list[str]:
        """The registered names that match a shell pattern, sorted."""
        load_plugins()
        return sorted(fnmatch.filter(self._makers.copy(), pattern))


guides = Registry("guide")
scorers = Registry("scorer")
keepers = Registry("keeper")
selectors = Registry("selector")
reducers = Registry("reducer")
presets = Registry("preset")
backbones = Registry("backbone")
hosts = Registry("host")
tasks = Registry("task")


def _described(maker: object) -> str:
    """A maker's own name, or its type's where it has none: "str", "a Backbone"."""
    return getattr(maker, "__qualname__", None) or f"a {type(maker).__qualname__}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the names closest to a wrong one, or all of a short list.

    Args:
        name: the wrong name.
        known: the right names.

    Returns:
        The text, which begins with a semicolon; empty where no name is close and more than 12 are known.
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, 3, 0.5)
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; write one of {', '.join(known)}" if 0 < len(known) <= 12 else ""


def parameters(maker: Callable[..., object]) -> tuple[inspect.Parameter, ...]:
    """The parameters of a maker's signature. They are cached, because every depth of every tower needs them."""
    try:
        return _parameters(maker)
    except TypeError:  # one that has no hash, or that nobody can call
        return _parameters.__wrapped__(maker)


@functools.lru_cache(maxsize=128)  # bounded: makers come and go
def _parameters(maker: Callable[..., object]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(maker).parameters.values())


def name_arguments(
    what: str,
    maker: Callable[..., object],
    values: Sequence[object],
    arguments: Mapping[str, object],
    reserved: tuple[str, ...] = (),
) -> dict[str, object]:
    """Names arguments by position as a maker's signature has them, and adds those that have names.

    Args:
        what: the maker's name in errors.
        maker: a class or function.
        values: the arguments by position.
        arguments: the arguments by name.
        reserved: names of further arguments, which the library passes.

    Returns:
        All arguments by name.

    Raises:
        TypeError: for too many arguments by position, and for one that is given twice.
    """
    if not values:
        return dict(arguments)
    accepted = [p.name for p in parameters(maker) if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in reserved]
    if len(values) > len(accepted):
        accepted_names = f"{', '.join(accepted)}, in this order" if accepted else "no arguments"
        raise TypeError(f"{what} takes {accepted_names}, and {len(values)} were given: {', '.join(map(repr, values))}")
    named = dict(zip(accepted, values, strict=False))
    for name in named.keys() & arguments.keys():
        raise TypeError(f"{what} has {name} twice: write either {named[name]!r} or {name}={arguments[name]!r}")
    return {**named, **arguments}


def bind(
    what: str, maker: Callable[..., object], arguments: Mapping[str, object], reserved: tuple[str, ...] = ()
) -> None:
    """Checks that a maker can be called with keyword arguments.

    Args:
        what: the maker's name in errors.
        maker: a class or function.
        arguments: the keyword arguments.
        reserved: names of further arguments, which the library passes.

    Raises:
        TypeError: for arguments that it does not take, with the nearest that it does, and for missing ones.
    """
    signature = parameters(maker)
    named = [p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in reserved]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature)
    known = [p.name for p in named]
    for name in arguments:
        if name in reserved or (name not in known and not takes_any):
            hint = nearest(name, known) if known else "; it takes none"
            raise TypeError(f"{what} takes no argument {name!r}{hint}")
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if missing:
        raise TypeError(f"{what} needs {', '.join(missing)}: write {missing[0]}=...")
