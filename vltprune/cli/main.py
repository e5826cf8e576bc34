"""Command-line entry point: parses arguments, dispatches, maps expected errors to exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from .. import __version__
from ..evaluation.processes import ProcessError
from ..utils.importing import import_module
from . import (
    ablate,
    chat,
    check,
    common,
    compress,
    demo,
    eval,
    export,
    features,
    info,
    listing,
    macs,
    options,
    predict,
    prune,
)

# what the library raises for the user to read
_EXPECTED = (ValueError, LookupError, TypeError, OSError, ImportError, FloatingPointError, ProcessError)
_ABOUT = "Prune tokens of vision-language transformers, per instance and per layer, guided by both modalities."


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vltprune: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. It sets `args.run`, the function to call, unless no command is given."""
    everywhere, compute = _Parser(add_help=False), _Parser(add_help=False)
    everywhere.add_argument("--traceback", action="store_true", help="show where an error comes from")
    everywhere.add_argument(
        "--import",
        action="append",
        metavar="MODULE",
        help="import a module, or the path of a .py file, that registers parts of your own; may be repeated",
    )
    compute.add_argument("--threads", type=options.threads, metavar="N", help="CPU threads (default: torch's choice)")

    parser = _Parser(prog="vltprune", description=_ABOUT)
    parser.add_argument("--version", action="version", version=f"vltprune {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in (demo, predict, chat, listing, info, macs, features, prune, export, compress, eval, ablate, check):
        command.add(commands, (everywhere, compute))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user can mend, 130 for an interrupt.

    As argparse does, --help, --version and unreadable arguments end in SystemExit.
    """
    argv = sys.argv[1:] if argv is None else argv
    with warnings.catch_warnings():
        warnings.showwarning = _warner()
        return _run(argv)


def _run(argv: Sequence[str]) -> int:
    try:
        for module in _imports(argv):
            import_module(module)
        parser = build_parser()  # whose choices are the names that are registered now
        args = parser.parse_args(argv)
        if not hasattr(args, "run"):
            parser.print_help()
            return 0
        status = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe had enough: `vltprune list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _EXPECTED as error:
        if "--traceback" in argv:
            raise
        return _fail(f"error: {_one_line(error)}", 2)
    return status or 0


def _imports(argv: Sequence[str]) -> list[str]:
    """The modules of --import, which are imported before other arguments are checked against registries."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="imports", action="append", default=[])
    return parser.parse_known_args([*argv])[0].imports


def _fail(message: str, code: int) -> int:
    common.say(f"vltprune: {message}")
    return code


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _warner() -> Callable[..., None]:
    """A replacement of `warnings.showwarning` that prints each text once, as one line."""
    printed: set[str] = set()

    def warn(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
        text = " ".join(str(message).split())
        if text not in printed:
            printed.add(text)
            common.say(f"vltprune: warning: {text}")

    return warn
