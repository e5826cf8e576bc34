"""parse_maker: the part that a text names, by module and name, by path and name, or by kind and registered name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..pruning.part import parse_short_form
from ..registry import name_arguments, nearest
from ..utils.importing import import_module
from .kinds import KINDS


def parse_maker(text: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The maker and the arguments that a text names.

    Args:
        text: "my_module:MyScorer", "path/to/file.py:MyScorer" or "scorer:distinct", with arguments in parentheses or without.

    Returns:
        The class or function, and its arguments by name.

    Raises:
        ValueError: for text of another form.
        ImportError: for a module that cannot be imported.
        LookupError: for a name that the module or the registry does not have.
        TypeError: for arguments by position that its signature does not have.
    """
    named, parenthesis, arguments = text.partition("(")
    module, colon, name = named.rpartition(":")
    if not colon or not module or not name:
        raise ValueError(
            f"cannot read the part {text!r}: write module:Name, path/to/file.py:Name or kind:name, such as "
            "my_parts:MyScorer or scorer:distinct"
        )
    _, values, args = parse_short_form(f"part{parenthesis}{arguments}", positional=True)
    maker = KINDS[module].registry[name] if module in KINDS else _attribute(module, name)
    reserved = tuple({kind.passed for kind in KINDS.values()})
    return maker, name_arguments(name, maker, values, args, reserved) if values else args


def _attribute(module: str, name: str) -> Any:
    loaded = import_module(module)
    if not hasattr(loaded, name):
        makers = [key for key, value in vars(loaded).items() if callable(value) and not key.startswith("_")]
        raise LookupError(f"{module} has no {name!r}{nearest(name, makers)}")
    return getattr(loaded, name)
