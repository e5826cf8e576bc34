"""Argument types for argparse: each parses one value, or refuses it with what to write instead."""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..pruning.config import PruneConfig
from ..pruning.part import Part
from ..pruning.presets import preset as preset_of
from ..registry import nearest
from ..utils.devices import check_device

_MOST_THREADS = 1024
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_Wrong = argparse.ArgumentTypeError


def positive(text: str) -> int:
    """An integer from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise _Wrong(f"{text!r} is no whole number above 0: write 1 or more, such as 8")
    return value


def natural(text: str) -> int:
    """An integer from 0 on."""
    return 0 if text == "0" else positive(text)


def seed(text: str) -> int:
    """A seed of torch's generators."""
    value = -1 if not text.isdecimal() else int(text)
    if not 0 <= value < 2**63:
        raise _Wrong(f"{text!r} is no seed: write a whole number from 0 to 2**63 - 1, such as 0")
    return value


def threads(text: str) -> int:
    """A number of CPU threads."""
    value = positive(text)
    if value > _MOST_THREADS:
        raise _Wrong(f"{text} threads are too many: write 1 to {_MOST_THREADS}, such as {os.cpu_count()}")
    return value


def fraction(text: str) -> float:
    """A number between 0 and 1, both excluded."""
    value = _number(text)
    if not 0 < value < 1:
        raise _Wrong(f"{text!r} is no fraction: write a number between 0 and 1, such as 0.5")
    return value


def fraction_or_zero(text: str) -> float:
    """A number from 0 to 1, 1 excluded."""
    return 0.0 if _number(text) == 0 else fraction(text)


def quantile(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise _Wrong(f"{text!r} is no quantile: write a number from 0 to 1, such as 0.9")
    return value


def target(text: str) -> float | dict[str, float]:
    """A fraction of the MACs to save, 0 included, or one for each tower: "0.5", "image=0.5,text=0.3"."""
    if "=" not in text:
        return fraction_or_zero(text)
    found: dict[str, float] = {}
    for one in text.split(","):
        tower, equals, value = (part.strip() for part in one.partition("="))
        if not equals or not tower.isidentifier() or tower in found:
            raise _Wrong(
                f"cannot read {text!r}: write one fraction of the MACs, such as 0.5, or one for each tower, such as "
                "image=0.5,text=0.3"
            )
        found[tower] = fraction(value)
    return found


def reduction(text: str) -> float | dict[str, float]:
    """A fraction of the MACs to save, above 0, or one for each tower, as `target`."""
    return target(text) if "=" in text else fraction(text)


def file(text: str) -> str:
    """The path of a file that can be read."""
    path = Path(text)
    if path.is_dir():
        raise _Wrong(f"{text} is a folder: give a file in it")
    if not path.is_file():
        raise _Wrong(f"there is no file {text!r}")
    if not os.access(path, os.R_OK):
        raise _Wrong(f"{text} cannot be read: its permissions forbid it")
    return text


def folder(text: str) -> str:
    """The path of a folder that can be read."""
    path = Path(text)
    if not path.is_dir():
        raise _Wrong(f"there is no folder {text!r}" + (": it is a file" if path.is_file() else ""))
    if not os.access(path, os.R_OK | os.X_OK):
        raise _Wrong(f"{text} cannot be read: its permissions forbid it")
    return text


def output(text: str) -> str:
    """The path of an output; `common.output_folder` checks that it can be written."""
    if not text.strip():
        raise _Wrong("it is empty: write the path of a folder")
    return text


def vocabulary(text: str) -> str:
    """A file or folder, or a name on the hub, which is org/name."""
    if text.count("/") == 1 and not text.startswith((".", "/")) and Path(text).suffix not in (".txt", ".json"):
        return text
    return text if Path(text).is_dir() else file(text)


def device(text: str) -> str:
    """A device that torch can use here."""
    try:
        check_device(text)
    except ValueError as error:
        raise _Wrong(str(error)) from None
    return text


def dtype(text: str) -> torch.dtype:
    """A floating-point type that models run in."""
    if text not in _DTYPES:
        raise _Wrong(f"there is no dtype {text!r}{nearest(text, _DTYPES)}")
    return _DTYPES[text]


def assignment(text: str) -> str:
    """ "name=value", as text."""
    name, equals, _ = text.partition("=")
    if not equals or not name.isidentifier():
        raise _Wrong(f"cannot read {text!r}: write name=value, such as image_size=96")
    return text


def value(text: str) -> object:
    """Parse a Python literal, such as "12", "(3, 6)" or "None"; other text is returned as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def depths(text: str) -> object:
    """ "3,6,9" -> (3, 6, 9)."""
    given = value(f"({text},)")
    how = (
        "write depths counted from 0, from the end (--at=-1), or fractions of the depth, such as --at 3,6,9, "
        f"not --at {text!r}"
    )
    if not isinstance(given, tuple) or not given:
        raise _Wrong(how)
    try:
        return PruneConfig("random", "ratio", at=given).at
    except (TypeError, ValueError) as error:
        raise _Wrong(f"{how} ({error})") from None


def preset(text: str) -> str:
    """A registered preset, with arguments where it takes some."""
    try:
        preset_of(text)
    except (LookupError, TypeError, ValueError) as error:
        raise _Wrong(str(error)) from None
    return text


def part(kind: str) -> Callable[[str], Part | str]:
    """An argparse type: a registered part of a kind, as name, name(value) or name(key=value)."""

    def parse(text: str) -> Part | str:
        if kind == "guide" and text.lower() == "none":
            return "none"
        try:
            return Part.from_spec(text, kind)
        except LookupError as error:
            raise _Wrong(f"{error}; one of your own needs --import MODULE") from None
        except (TypeError, ValueError) as error:
            raise _Wrong(str(error)) from None

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
