"""Documentation: all code in the pages runs, links lead somewhere, and the site builds without a warning."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from pages import FENCED, PAGES, ROOT

import vltprune as vp
from vltprune.cli.main import build_parser
from vltprune.models.catalog import ModelName


# one page runs where its own package is tested
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "sentence_transformers.md"], ids=lambda p: p.name)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pages.run(page):
        pass


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", FENCED.sub("", page.read_text())):
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


def test_messages_of_troubleshooting_exist():
    """Each piece of a message stands in the package's source, string literals joined as Python joins them."""
    source = "\n".join(path.read_text() for path in (ROOT / "vltprune").rglob("*.py"))
    source = re.sub(r'"\s*\+?\s*f?"', "", source)
    page = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Symptoms")[0]
    messages = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    pieces = [piece.strip() for message in messages for piece in message.split("...")]
    assert [piece for piece in pieces if piece not in source] == []
    assert len(messages) > 15


SHELL = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page, tmp_path, monkeypatch):
    """Each command has the arguments that it is given, and each target of make exists. Folders end with a slash."""
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(SHELL.findall(page.read_text())).replace("\\\n", " ").splitlines()
    for words in filter(None, (shlex.split(line, comments=True) for line in lines)):
        for word in words:
            if re.fullmatch(r"\w+/", word):
                Path(word).mkdir(exist_ok=True)
            if word.endswith(".yaml"):
                Path(word).touch()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif "vltprune" in words and words[0] != "pip":
            build_parser().parse_args(words[words.index("vltprune") + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_scripts_exist(page):
    for script in re.findall(r"python (benchmarks/\w+\.py)", page.read_text()):
        assert (ROOT / script).exists(), script


def test_architecture_names_every_folder():
    page = (ROOT / "docs" / "architecture.md").read_text()
    folders = [path.parent.name for path in (ROOT / "vltprune").glob("*/__init__.py")]
    assert [name for name in folders if f"\n  {name}/ " not in page] == []


def test_choose_and_concepts_name_every_preset_and_part():
    choose, concepts = ((ROOT / "docs" / f"{page}.md").read_text() for page in ("choose", "concepts"))
    assert [name for name in vp.presets.names() if f"`{name}`" not in choose] == []
    parts = [
        name
        for registry in (vp.guides, vp.scorers, vp.keepers, vp.selectors, vp.reducers)
        for name in registry.names()
        if registry[name].__module__.startswith("vltprune.")  # and not of a script that another test has run
    ]
    assert [name for name in parts if f"`{name}`" not in concepts] == []


def test_extend_lists_every_statistic_with_its_cost():
    page = (ROOT / "docs" / "extend.md").read_text()
    rows = re.findall(r"^\| (`[A-Z_`, ]+) \|.*\| \S[^|]* \|$", page, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == {stat.name for stat in vp.Stat}


@pytest.mark.parametrize("library", ["timm", "open_clip", "open_clip_hf", "blip", "transformers"])
def test_supported_names_every_type_that_a_host_runs(library):
    importlib.import_module(f"vltprune.hosts.{library}")
    page = (ROOT / "docs" / "supported.md").read_text()
    assert [name for name in vp.hosts.names() if f"`{name.rpartition('.')[2]}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_model_names_are_known(page):
    text = page.read_text()
    names = re.findall(r'create_model\(\s*"([\w.-]+)"', text)
    names += re.findall(r"vltprune .*--model ([\w.-]+)", text) + re.findall(
        r"vltprune (?:prune|features|info) ([a-z]\w+)", text
    )
    for name in names:
        ModelName.parse(name).check_tag()
