"""MkDocs hooks: README, CONTRIBUTING and CHANGELOG become pages of the site, with their links as seen from docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand at the root of the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_seen_from_docs((ROOT / source).read_text())))
    return files


def _seen_from_docs(text: str) -> str:
    for source, page in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    return re.sub(r"\]\(docs/", "](", text)
