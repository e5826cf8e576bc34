"""The package as a whole: what importing costs, who imports whom, what is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vltprune as vp

ROOT = Path(vp.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A module may import from the lines above its own, and from its own line; the longest name that begins its name counts.
FLOORS = (
    "utils",
    "core registry",
    "layers",
    "models data select",
    "pruning",
    "parts",
    "checks",
    "hosts.base",
    "pruning.tower pruning.trace pruning.losses pruning.block_attention pruning.encoder pruning.model pruning.current_config",
    "io",
    "hosts",
    "pruning.prune",
    "cost",
    "io.preprocessing io.hub models.catalog models.sources models.pretrained models.factory models.resolve",
    "deploy",
    "viz evaluation",
    "demo training",
    "cli",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def floor_of(module):
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(FLOOR[name] for name in names if name in FLOOR)


def imports(module):
    """Modules of this package that a module imports, wherever in it, for type checkers alone as well."""
    path = MODULES[module]
    package = ["vltprune", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = [*base, *(node.module or "").split(".")]
            if target[0] == "vltprune":
                for alias in node.names:
                    full = ".".join(filter(None, [*target[1:], alias.name]))
                    module = full if full in MODULES else full.rpartition(".")[0]
                    if module:  # else a name of the package itself
                        yield module


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("", "__main__")])
def test_imports_run_one_way(module):
    assert not [other for other in imports(module) if floor_of(other) > floor_of(module)]


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: {*imports(module)} - {module} for module in MODULES}
    while free := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph


def test_importing_is_lean():
    heavy = ("timm", "open_clip", "transformers", "tokenizers", "triton", "vltprune.cli", "vltprune.cli.main")
    code = f"import sys, vltprune; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    for name in vp.__all__:
        thing = getattr(vp, name)
        if inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing):
            assert inspect.getdoc(thing), name


@pytest.mark.parametrize(
    "registry", [vp.guides, vp.scorers, vp.keepers, vp.selectors, vp.reducers, vp.presets], ids=lambda r: r.kind
)
def test_every_registered_part_is_documented(registry):
    for name in registry.names():
        assert inspect.getdoc(registry[name]), name


PAGES = [*ROOT.parent.glob("docs/*.md"), ROOT.parent / "README.md"]
NO_NAMES = {"vltprune.json", "vltprune.git", "vltprune.egg"}


@pytest.mark.parametrize("path", [*FILES, *PAGES], ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_names_that_texts_give_exist(path):
    """Errors, docstrings and pages say what to write, and what they say is there."""
    given = re.findall(r"(?<![\w/.-])(?:vltprune|vp)(?:\.[A-Za-z_]\w*)+", path.read_text())
    for name in {re.sub(r"^vp\.", "vltprune.", name) for name in given} - NO_NAMES:
        assert _exists(name), name


def _exists(name):
    """Whether a dotted name is a module, or an attribute of one; what a value has is not looked into."""
    parts = name.split(".")
    thing = vp
    for n, part in enumerate(parts[1:], start=2):
        if hasattr(thing, part):
            thing = getattr(thing, part)
        elif inspect.ismodule(thing):
            try:
                thing = importlib.import_module(".".join(parts[:n]))
            except ImportError:
                return False
        else:
            return not inspect.isclass(thing)
    return True


def test_an_installed_package_has_all_files():
    """Weights, sources of kernels, marks: what pyproject.toml names covers every file that is no module."""
    project = (ROOT.parent / "pyproject.toml").read_text()
    patterns = re.search(r"package-data\]\nvltprune = \[(.*)\]", project)[1].replace('"', "").split(", ")
    named = {file for pattern in patterns for file in ROOT.glob(pattern) if file.is_file()}
    there = {file for file in ROOT.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert there and there == named
