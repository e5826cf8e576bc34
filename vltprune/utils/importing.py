"""Modules that register parts: imported by name or path, or named by other packages in their entry points."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType

GROUP = "vltprune.parts"  # of entry points
_lock = threading.RLock()
_failed: dict[str, str] | None = None  # per plugin that could not be imported, the reason; None before any was


class PluginWarning(UserWarning):
    """A package names a module that registers parts in its entry points, and the module cannot be imported."""


def import_module(text: str) -> ModuleType:
    """Imports a module by its name, from the working directory too, or by the path of a .py file.

    Args:
        text: "my_parts", "my_package.parts" or "path/to/my_parts.py". A file is imported as the module of its name, and
            imports others from its own folder.

    Returns:
        The module.

    Raises:
        ImportError: for a module that does not exist or whose import fails, and for a file whose name another module has.
    """
    path = Path(text)
    if path.suffix != ".py":
        return _import(text, text, os.getcwd())
    if not path.is_file():
        raise ImportError(f"there is no file {text}")
    if not path.stem.isidentifier():
        raise ImportError(f"{text} cannot be imported: rename it, {path.stem!r} is no name of a module")
    module = _import(path.stem, text, str(path.resolve().parent))
    if module.__file__ is None or not path.samefile(module.__file__):
        raise ImportError(
            f"{text} cannot be imported: {module.__file__ or 'another module'} has its name; rename the file"
        )
    return module


def _import(name: str, text: str, folder: str) -> ModuleType:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the module does
        raise ImportError(f"cannot import {text}: {type(error).__name__}: {error}") from error


def load_plugins() -> None:
    """Imports, once, what other packages name as entry points of the group "vltprune.parts".

    An entry point is a module, or a function in one, which is called without arguments. One that fails is left out, with a
    PluginWarning.
    """
    global _failed
    with _lock:
        if _failed is not None:
            return
        _failed = {}  # what is imported may ask a registry itself
        for entry in importlib.metadata.entry_points(group=GROUP):
            try:
                loaded = entry.load()
                if callable(loaded) and not isinstance(loaded, type):
                    loaded()
            except Exception as error:
                package = entry.dist.name if entry.dist is not None else "an unknown package"
                _failed[f"{entry.name} of {package}"] = f"{type(error).__name__}: {error}"
        failed = dict(_failed)
    for plugin, reason in failed.items():
        warnings.warn(f"the parts {plugin} are missing, for {reason}", PluginWarning, stacklevel=3)


def missing_plugins() -> str:
    """The end of an error message for a name that is not registered: plugins that could not be imported, if any."""
    plugins = ", ".join(_failed or ())
    return f"; the parts {plugins} are missing, because their import failed" if plugins else ""
