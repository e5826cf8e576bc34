"""Docstrings of the public interface: a one-line summary, and every argument and result described."""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import re

import pytest

import vltprune as vp
from vltprune.cost.savings import Calibration, Cost

MAIN_CLASSES = (
    vp.PruneConfig,
    vp.PackedTokens,
    vp.PruneTrace,
    vp.CostMeter,
    vp.Pruning,
    Calibration,
    Cost,
)


def _public_callables():
    """Functions and classes of `vltprune.__all__`, and public methods of the main classes, by dotted name."""
    callables = {}
    for name in vp.__all__:
        thing = getattr(vp, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            callables[name] = thing
    for cls in MAIN_CLASSES:
        callables |= {cls.__name__: cls, **_public_methods(cls)}
    return callables


def _package_callables():
    """Public functions, classes and methods of all modules of the package, by dotted name."""
    callables = {}
    for module in pkgutil.walk_packages(vp.__path__, "vltprune."):
        if module.name.endswith("__main__"):
            continue
        for name, thing in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.name:
                continue
            if inspect.isfunction(thing) or inspect.isclass(thing):
                callables[f"{module.name}.{name}"] = thing
            if inspect.isclass(thing):
                callables |= {f"{module.name}.{key}": value for key, value in _public_methods(thing).items()}
    return callables


def _public_methods(cls):
    """Public methods that a class defines, class methods and static methods too, by `Class.method`."""
    return {
        f"{cls.__name__}.{name}": getattr(cls, name)
        for name, method in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(method) or isinstance(method, classmethod | staticmethod))
    }


PUBLIC = _public_callables()
PACKAGE = _package_callables()


def _parameters(thing):
    """Names of the arguments that a caller gives; not those that a base class leaves to its subclasses (*args, **kwargs)."""
    is_plain_error = inspect.isclass(thing) and issubclass(thing, BaseException) and "__init__" not in vars(thing)
    if is_plain_error or (inspect.isclass(thing) and issubclass(thing, enum.Enum)):
        return []
    try:
        parameters = inspect.signature(thing).parameters.values()
    except ValueError:  # a class that has the constructor of a built-in one, such as dict
        return []
    if inspect.isclass(thing):
        parameters = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in parameters if p.name != "self"]


def _sections(thing):
    """A docstring's Google sections by title."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises|Example):$", _docstring(thing), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _names(section):
    """Names that a section describes: "name: ..." or "name, name: ..."."""
    lists = re.findall(r"^ *((?:\**\w+, )*\**\w+):", section, flags=re.M)
    return {name.strip("* ") for names in lists for name in names.split(",")}


def _docstring(thing):
    """The docstring of a callable; of a class, its own with that of its constructor."""
    if not inspect.isclass(thing):
        return inspect.getdoc(thing) or ""
    constructor = vars(thing).get("__init__")
    texts = (vars(thing).get("__doc__"), constructor and constructor.__doc__)
    return "\n\n".join(inspect.cleandoc(text) for text in texts if text)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_begins_with_a_sentence_of_one_line(name):
    first, *rest = _docstring(PUBLIC[name]).splitlines()
    assert re.search(r"[.?]$", first), first
    assert not rest or not rest[0], rest[0]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_describes_each_argument(name):
    sections = _sections(PUBLIC[name])
    described = _names(sections.get("Args", "")) | _names(sections.get("Attributes", ""))
    assert not [arg for arg in _parameters(PUBLIC[name]) if arg not in described]


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isroutine(thing)])
def test_a_public_docstring_describes_the_result(name):
    returned = inspect.signature(PUBLIC[name]).return_annotation
    if returned not in ("None", inspect.Signature.empty):
        assert {"Returns", "Yields"} & set(_sections(PUBLIC[name]))


@pytest.mark.parametrize("folder", sorted({name.split(".")[1] for name in PACKAGE}))
def test_functions_of_several_arguments_describe_each_of_them(folder):
    """Everywhere in the package; a method without a docstring of its own has that of the method it overrides."""
    undescribed = {}
    for name, thing in PACKAGE.items():
        if name.split(".")[1] != folder:
            continue
        own = _docstring(thing) if inspect.isclass(thing) else inspect.cleandoc(thing.__doc__ or "")
        parameters = _parameters(thing)
        if own and len(parameters) > 1:
            described = _names(_sections(thing).get("Args", "")) | _names(_sections(thing).get("Attributes", ""))
            undescribed[name] = [parameter for parameter in parameters if parameter not in described]
    assert not {name: missing for name, missing in undescribed.items() if missing}
