"""Progress bars and messages on stderr, for operations that take long."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def say(text: str) -> None:
    """Prints a message to stderr, above any progress bar, so that stdout can be piped."""
    readable = text.encode("utf-8", "backslashreplace").decode("utf-8")  # names of files may be no UTF-8
    tqdm.write(readable, file=sys.stderr)
    sys.stderr.flush()


def bar(what: str, total: int | None = None, *, disable: bool | None = False) -> tqdm:
    """A progress bar on stderr that disappears when it is done.

    Args:
        what: the text before the bar.
        total: the number of steps. None where it is not known.
        disable: whether to hide the bar. None hides it where stderr is no terminal.

    Returns:
        The bar, a context manager whose `update` advances it.
    """
    pace = 0.2 if sys.stderr.isatty() else 5.0  # a log file needs no animation
    return tqdm(desc=what, total=total, unit="", leave=False, dynamic_ncols=True, mininterval=pace, disable=disable)


def counted(items: Iterable[T], shown: tqdm) -> Iterator[T]:
    """Yields items, and advances a progress bar after each.

    Args:
        items: the items.
        shown: the progress bar.

    Yields:
        Each item, in order.
    """
    for item in items:
        yield item
        shown.update()
