"""Progress messages: what a run is doing, with a bar while it takes long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tqdm import tqdm

from ..utils.progress import bar, say


@contextlib.contextmanager
def announced(what: str, show: bool = True, total: int | None = None) -> Iterator[tqdm]:
    """Prints what begins, and gives a progress bar for it; nothing is shown unless `show`."""
    if show:
        say(f"vltprune: {what} ...")
    with bar(what, total, disable=not show) as shown:
        yield shown
