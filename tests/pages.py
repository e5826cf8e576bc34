"""Code blocks of the documentation, run as a reader would run them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import vltprune as vp
import vltprune.registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
REGISTRIES = [thing for thing in vars(vltprune.registry).values() if isinstance(thing, vp.Registry)]


@contextlib.contextmanager
def run(page: Path, until: str | None = None):
    """Run a page's Python blocks in order, up to a heading; yields their names. What they register goes at the end."""
    names: dict[str, Any] = {"__name__": "page"}
    text = page.read_text().partition(until)[0] if until else page.read_text()
    try:
        for block in BLOCK.findall(text):
            exec(compile(block, page.name, "exec", dont_inherit=True), names)
        yield names
    finally:
        for registry in REGISTRIES:
            makers = registry._makers
            for name in [n for n, maker in makers.items() if n.startswith("page.") or maker.__module__ == "page"]:
                del makers[name]
