"""The package as a whole: what importing costs, who imports whom, what is documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vltprune as vp

ROOT = Path(vp.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# each room may import from those before it; the same line is one room
FLOORS = [
    ("files", "wrappers"),
    ("checks", "modes", "structure"),
    ("recipe",),
    (
        "frozen",
        "precision",
        "registry",
        "text",
        "caption_metrics",
        "journal",
        "html",
        "charts",
        "progress",
        "savings",
    ),
    ("tokens", "metrics", "pair"),
    (
        "segments",
        "ties",
    ),
    ("attention",),
    ("layers",),
    ("config", "losses", "models", "convert"),
    ("traces", "naming", "record", "turned"),
    ("presets", "checkpoint", "pruner", "data"),
    ("hosts",),
    ("surgery", "fingerprint", "preprocessing", "sources"),
    ("flops", "catalog", "dial"),
    ("budget", "factory", "gauge"),
    ("hub",),
    ("opening",),
    ("visualize", "evaluate", "tasks"),
    ("report", "exam"),
    ("training",),
    ("commands",),
    ("cli",),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Rooms of this package that a file imports when it runs (imports for type checkers alone do not run)."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    package = ("vltprune", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        target = (*base, *(node.module or "").split(".")) if node.module else base
        if target[:1] == ("vltprune",):
            names = [target[1]] if len(target) > 1 else [alias.name for alias in node.names]
            yield from (name for name in names if name in FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = room(path)
    if here in ("__init__", "__main__"):
        return
    assert here in FLOOR, f"give {here} a floor"
    others = {*imports(path)} - {here}
    assert not [other for other in others if FLOOR[other] > FLOOR[here]]
    assert not [other for other in others if FLOOR[other] == FLOOR[here]]


def test_importing_is_lean():
    heavy = ("timm", "open_clip", "transformers", "tokenizers", "vltprune.commands", "vltprune.cli")
    code = f"import sys, vltprune; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    for name in vp.__all__:
        thing = getattr(vp, name)
        if inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing):
            assert inspect.getdoc(thing), name


@pytest.mark.parametrize("registry", [vp.guides, vp.scorers, vp.keepers, vp.reducers, vp.presets], ids=lambda r: r.kind)
def test_every_registered_part_is_documented(registry):
    for name in registry.names():
        assert inspect.getdoc(registry[name]), name


def test_files_hold_one_idea():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 320}
    assert not long


def test_functions_are_short():
    """STYLE: about 25 lines of code; a docstring and a signature do not count."""
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and body[-1].end_lineno - body[0].lineno + 1 > 32:
                    long.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert not long


def test_the_version_is_one():
    import importlib.metadata

    assert importlib.metadata.version("vltprune") == vp.__version__
