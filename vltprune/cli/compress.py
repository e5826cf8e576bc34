"""vltprune compress: trains a pruned model to a budget, and resumes where it was stopped."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cost import describe
from ..evaluation import tasks
from ..models.resolve import has_random_weights
from ..utils.table import table
from . import common, options

if TYPE_CHECKING:
    from ..training import CompressConfig

_NEEDED = ("task", "model", "data", "val")
_FIELDS = ("task", "model", "pretrained", "data", "images", "val", "val_images", "preset", "reduction")


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune compress`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser(
        "compress",
        parents=parents,
        help="train a pruned model to a cost; the same command resumes where it was stopped",
    )
    parser.add_argument(
        "--config", type=options.file, metavar="FILE", help="a YAML or JSON file of fields; what is given here wins"
    )
    parser.add_argument("--task", choices=tasks.tasks.names(), help="what the model is trained to do")
    parser.add_argument("--model", help=f"the dense model: {common.MODEL}")
    common.add_pretrained(parser)
    parser.add_argument("--data", metavar="FILE", help="annotations or shards to train on, or synthetic:train:16000x8")
    parser.add_argument("--images", metavar="DIR", help="folder that the paths in --data begin in (its own)")
    parser.add_argument(
        "--val", metavar="FILE", help="annotations that the knob is chosen on, and scores are of; never the test split"
    )
    parser.add_argument("--val-images", metavar="DIR", help="folder that the paths in --val begin in (--images)")
    parser.add_argument(
        "--preset",
        type=options.preset,
        metavar="NAME",
        help="how to prune (madtp; after training madtp_decay answers better)",
    )
    reduction = "share of the dense MACs to save (0.5), or one of each tower's own: image=0.5,text=0.3"
    parser.add_argument("--reduction", type=options.target, metavar="SHARE", help=reduction)
    parser.add_argument(
        "--device",
        type=options.device,
        help="where the model trains: cpu, cuda, cuda:1, mps (default: a GPU where there is one, as Accelerate chooses)",
    )
    parser.add_argument(
        "--dtype",
        type=options.dtype,
        help="dtype in which products are computed: float32, bfloat16, float16; weights stay float32 (default: float32)",
    )
    parser.add_argument(
        "--output", type=options.output, default="compress", metavar="DIR", help="folder of the run (%(default)s)"
    )
    fields = "other fields of CompressConfig: steps=2000 lr=1e-4 distill=1.0 parts={'reducer':'drop'}"
    parser.add_argument(
        "--set",
        type=options.assignment,
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help=fields,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs `vltprune compress` with its parsed arguments."""
    common.say("vltprune: loading Accelerate ...")
    from ..training import compress  # accelerate is of the extra `train`

    config = config_of(args)
    common.output_folder(args.output)
    common.use_threads(args.threads)
    if has_random_weights(config.model, config.pretrained):
        common.say_random(config.model, "it learns from nothing")
    result = compress(config, args.output, device=args.device)
    if result is not None:
        _print(result.rows)
        for note in result.skipped[:5]:
            common.say(f"vltprune: skipped: {note}")
        if result.skipped:
            print(f"others were trained on in place of {len(result.skipped)} records; skipped.json lists them")
        print(f"wrote {os.path.join(result.folder, 'model')}, and its report, {result.page} (open it in a browser)")


def config_of(args: argparse.Namespace) -> CompressConfig:
    """The config of the options and of the file of --config. Errors name the option of a wrong field."""
    from ..training.config import CompressConfig, load_fields

    given = {name: getattr(args, name) for name in _FIELDS if getattr(args, name) is not None}
    if args.dtype is not None:
        given["dtype"] = str(args.dtype).removeprefix("torch.")
    from_file = load_fields(args.config) if args.config else {}
    assigned = common.keywords(args.set)
    fields = {**from_file, **given, **assigned}
    missing = [name for name in _NEEDED if fields.get(name) is None]
    if missing:
        raise TypeError(
            f"a compression config needs {', '.join(missing)}: give {_example_of(missing[0])}, or a --config file"
        )
    try:
        config = CompressConfig.from_dict(fields)
    except (LookupError, TypeError, ValueError) as error:
        name = str(error).partition("=")[0]
        where = "--set" if name in assigned else _option(name) if name in given else f"--config {args.config}"
        raise type(error)(f"{where}: {error}" if name in fields else str(error)) from None
    for name in ("data", "val"):
        common.check_annotations(_option(name), getattr(config, name))
    for name in ("images", "val_images"):
        if getattr(config, name) is not None:
            common.check_folder(_option(name), getattr(config, name))
    return config


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _example_of(field: str) -> str:
    """An option that is missing, as it may be written."""
    written = {"task": "|".join(tasks.tasks.names()), "model": "blip_nlvr_base", "data": "FILE", "val": "FILE"}
    return f"{_option(field)} {written[field]}"


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    from ..training.report import tables

    names = [f"{describe.format_target(row['reduction'], '%')} asked" if row["reduction"] else "dense" for row in rows]
    print(table(tables.results(names, rows)))
    if "matching" in rows[0]:
        print(f"\nsecond stage, the nearest {rows[0]['matching']['k_test']} judged by the matching head:")
        print(table(tables.matching(names, rows)))
