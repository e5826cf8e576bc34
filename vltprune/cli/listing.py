"""vltprune list: names of models, weights, presets, parts of a pruner and tasks."""

from __future__ import annotations

import argparse
import fnmatch
import inspect
import textwrap
from collections.abc import Callable, Sequence

from .. import registry
from ..evaluation import tasks
from ..models.catalog import list_models, list_pretrained, open_clip_name, unprunable
from . import common

_LIBRARIES = ("vltprune", "timm", "open_clip")
_REGISTRIES = {
    "presets": registry.presets,
    "scorers": registry.scorers,
    "keepers": registry.keepers,
    "selectors": registry.selectors,
    "reducers": registry.reducers,
    "guides": registry.guides,
    "tasks": tasks.tasks,
}
_KINDS = ("models", "tags", *_REGISTRIES)
_HEADINGS = {
    "models": "models (any preset may follow, as in vit_tiny_patch16_224_attention)",
    "tags": "weights (a model's name with a tag)",
}
_WIDTH = 100  # characters of a part's description


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune list`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser(
        "list",
        parents=parents[:1],
        help="names of models, weights, presets, parts of a pruner and tasks",
        description="Names that match, under a heading for each kind. With one of --models, --tags, --presets and so on: "
        "the names of that kind alone, one a line.",
    )
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        help="a part of the name, or a shell pattern such as 'vit_*_384'; case does not matter (default: all names)",
    )
    parser.add_argument("--library", choices=_LIBRARIES, help="only models and weights of this library (default: all)")
    only = parser.add_mutually_exclusive_group()
    for kind in _KINDS:
        what = "names with weights, by their tags" if kind == "tags" else f"names of {kind}"
        only.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=f"only {what}, one a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs `vltprune list` with its parsed arguments."""
    kinds = (args.kind,) if args.kind else _KINDS[:2] if args.library else _KINDS
    found = {kind: _matching(kind, args.pattern, args.library) for kind in kinds}
    if not any(found.values()):
        raise LookupError(f"no name matches {args.pattern!r}{_instead(args, kinds)}")
    if args.kind:
        print("\n".join(found[args.kind]))
        return
    sections = [_section(kind, names) for kind, names in found.items() if names]
    print("\n\n".join(sections))


def _matching(kind: str, pattern: str, library: str | None) -> list[str]:
    """The names of a kind that match, sorted within each library."""
    matches = _matcher(pattern)
    if kind in _REGISTRIES:
        return [name for name in _REGISTRIES[kind].names() if matches(name)]
    libraries = _LIBRARIES if library is None else (library,)
    return [name for one in libraries for name in _names(kind, one) if any(map(matches, _spellings(name, one)))]


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches, whatever its case. A pattern without wildcards may stand anywhere in the name."""
    shell = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return lambda name: fnmatch.fnmatchcase(name.lower(), shell.lower())


def _names(kind: str, library: str) -> list[str]:
    """A library's models, or its names with weights."""
    return (list_pretrained if kind == "tags" else list_models)(library=library)


def _spellings(name: str, library: str) -> list[str]:
    """Ours, and open_clip's own of its models."""
    if library != "open_clip":
        return [name]
    backbone, dot, tag = name.partition(".")
    return [name, f"{open_clip_name(backbone)}{dot}{tag}"]


def _section(kind: str, names: Sequence[str]) -> str:
    """A heading with the names below it; parts with what they are."""
    lines = [_HEADINGS.get(kind, kind)]
    width = max(map(len, names))
    for name in names:
        lines.append(f"  {name.ljust(width)}  {_description(kind, name)}".rstrip())
    return "\n".join(lines)


def _description(kind: str, name: str) -> str:
    """The first line of a registered part's docstring."""
    if kind not in _REGISTRIES:
        return ""
    text = inspect.getdoc(_REGISTRIES[kind][name]) or ""
    return textwrap.shorten(text.partition("\n")[0], _WIDTH, placeholder=" ...")


def _instead(args: argparse.Namespace, kinds: Sequence[str]) -> str:
    """The tail of the error where nothing was found: what there is instead."""
    if args.kind == "tags" and _matching("models", args.pattern, args.library):
        return ": there are such models, and no weights of them"
    others = unprunable(args.pattern.lower()) or unprunable(f"*{args.pattern.lower()}*")
    if others and {"models", "tags"} & {*kinds}:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        return f" of those that can be pruned; {', '.join(others[:3])}{more} cannot"
    return registry.nearest(
        args.pattern.lower(), [name for kind in kinds for name in _matching(kind, "*", args.library)]
    )
