"""Progress messages: what a run is doing, with a bar while it takes long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tqdm import tqdm

from ..utils.progress import bar, say


@contextlib.contextmanager
def announced(what: str, show: bool = True, total: int | None = None) -> Iterator[tqdm]:
    """Prints what begins, and gives a progress bar for it.

    Args:
        what: the work that begins.
        show: whether anything is shown.
        total: number of the bar's steps, where it is known.

    Yields:
        The bar; nothing is drawn where `show` is false.
    """
    if show:
        say(f"vltprune: {what} ...")
    with bar(what, total, disable=not show) as shown:
        yield shown
