"""Documentation: all code in the pages runs, links lead somewhere, and the site builds without a warning."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vltprune as vp
import vltprune.registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REGISTRIES = [thing for thing in vars(vltprune.registry).values() if isinstance(thing, vp.Registry)]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for registry in REGISTRIES:  # what a page registers stays on the page
        monkeypatch.setattr(registry, "_makers", dict(registry._makers))
    names = {"__name__": "page"}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_changelog_names_the_version():
    assert f"[{vp.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_site_builds_without_a_warning_and_has_every_public_name(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "reference" / "vltprune.html").read_text()
    public = [n for n in vp.__all__ if inspect.isclass(getattr(vp, n)) or inspect.isfunction(getattr(vp, n))]
    assert [name for name in public if f'id="vltprune.{name}"' not in reference] == []
