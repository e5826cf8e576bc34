"""vltprune check: holds a part of one's own to the invariants of its kind."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..checks.check import EXAMPLES, check_part
from ..checks.maker import parse_maker
from . import common, options


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune check`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser(
        "check",
        parents=parents,
        help="hold a part of your own to the invariants of its kind",
        description="Calls a guide, scorer, keeper, selector or reducer on random batches, and says which invariants it "
        "breaks, on which batch, and what to change. It need not be registered. Exit status 1 where one is broken.",
    )
    parser.add_argument(
        "part",
        help="my_module:MyScorer, path/to/file.py:MyKeeper or scorer:distinct, with arguments as in "
        "'my_module:MyScorer(width=0.1)'",
    )
    parser.add_argument("--args", metavar="ARGS", help="the part's arguments, such as 'width=0.1'")
    parser.add_argument(
        "--examples",
        type=options.positive,
        default=EXAMPLES,
        metavar="N",
        help="how many random batches (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=options.seed, default=0, help="of the first batch; each further one has the next (default: 0)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Checks the part and prints the report.

    Args:
        args: the parsed arguments.

    Returns:
        The exit status: 1 where an invariant is broken.
    """
    common.use_threads(args.threads)
    if args.args is not None and "(" in args.part:
        raise ValueError(f"--args {args.args}: {args.part} has arguments already: write them in one place")
    maker, arguments = parse_maker(args.part if args.args is None else f"{args.part}({args.args})")
    report = check_part(maker, examples=args.examples, first_seed=args.seed, **arguments)
    print(report)
    return 0 if report.passed else 1
