"""Lines and progress bars on stderr, for what takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def say(text: str) -> None:
    """A line for the user, beside the result: on stderr, so that stdout can be piped; above a progress bar, if there is one."""
    readable = text.encode("utf-8", "backslashreplace").decode("utf-8")  # names of files may be no UTF-8
    tqdm.write(readable, file=sys.stderr)
    sys.stderr.flush()


def bar(what: str, total: int | None = None, *, disable: bool | None = False) -> tqdm:
    """A progress bar that goes away when it is done. disable: None hides it where stderr is no terminal."""
    pace = 0.2 if sys.stderr.isatty() else 5.0  # a log file needs no animation
    return tqdm(desc=what, total=total, unit="", leave=False, dynamic_ncols=True, mininterval=pace, disable=disable)


def counted(things: Iterable[T], shown: tqdm) -> Iterator[T]:
    """The same things, each noted in a progress bar when it is done with."""
    for thing in things:
        yield thing
        shown.update()
