"""vltprune export: writes a model for ONNX Runtime, OpenVINO or torch.export, and checks the file against the model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.images import list_images
from ..deploy.engines import ENGINES, find_format
from ..deploy.export import export
from ..deploy.freeze import freeze
from ..deploy.graph import is_adaptive
from ..pruning.model import check_pruned, dense_model, is_pruned
from ..pruning.prune import composite_of
from . import common, example, options, prune

# how the libraries call the method that embeds what a tower reads
_METHODS = ("encode_{}", "get_{}_features", "{}_features")


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune export`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser(
        "export",
        parents=parents,
        help="write a model, dense or pruned, for ONNX Runtime, OpenVINO or torch.export",
        description="The file takes the batch of any size where all counts are fixed, and one instance at a time where they "
        "are per instance. It is compared with the model before it is put in its place. A JSON file beside it has the "
        "preprocessing and the names of the classes.",
    )
    parser.add_argument("model", help=common.MODEL)
    parser.add_argument("--format", choices=sorted(ENGINES), help="(default: that of the output's suffix, or onnx)")
    suffixes = ", ".join(engine.suffix for engine in ENGINES.values())
    parser.add_argument(
        "--output",
        type=options.output,
        metavar="FILE",
        help=f"the file to write: {suffixes} (default: exported/MODEL with the suffix of the format)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--tower", metavar="NAME", help="of CLIP or BLIP, the features of one tower: image or text")
    parser.add_argument(
        "--batch", type=options.positive, metavar="N", help="instances of a call (default: any number, where it can be)"
    )
    parser.add_argument(
        "--data",
        type=options.folder,
        metavar="DIR",
        help="a folder of images: fix counts per instance to those that each layer keeps of them, as vltprune.freeze",
    )
    parser.add_argument(
        "--quantile",
        type=options.quantile,
        metavar="Q",
        help="with --data, this quantile of the counts over the images, such as 0.9 (default: their mean)",
    )
    common.add_batching(parser, "images of --data", batch_size=16, limit=64)
    common.add_pretrained(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs `vltprune export` with its parsed arguments."""
    file, form = _output(args)
    files = None if args.data is None else list_images(args.data)[: args.limit]
    if args.quantile is not None and files is None:
        raise ValueError(f"--quantile {args.quantile:g} is over the images of --data DIR: give them, or leave it out")
    common.use_threads(args.threads)
    model = common.load_model(args.model, args.pretrained, warn_if_dense=True)
    model, method, inputs = _example(args, model)
    if files is not None:
        model = _frozen(args, model, files)
    print(export(model, file, inputs, form, batch=args.batch, method=method))


def _output(args: argparse.Namespace) -> tuple[Path, str]:
    """The file to write and its format; its folder is proved writable, and the packages installed."""
    suffix = ENGINES[args.format or "onnx"].suffix
    default = common.default_output("exported", args.model)
    file = Path(args.output or default.with_name(default.name + suffix))
    form = find_format(file, args.format)
    ENGINES[form].check_installed()
    beside = [
        file.name,
        *(file.with_suffix(one).name for one in (".bin", ".json") if form == "openvino" or one != ".bin"),
    ]
    common.new_folder(file.parent, beside, args.overwrite)
    return file, form


def _example(args: argparse.Namespace, model: nn.Module) -> tuple[nn.Module, str | None, tuple[Tensor, ...]]:
    """The model or tower to export, its method, and an example of inputs, of noise. ValueError for a tower that it lacks."""
    host: Any = dense_model(model)
    composite = composite_of(model)
    towers = [] if composite is None else [*composite.towers(host)]
    if args.tower is not None and args.tower not in towers:
        has = f"has {', '.join(towers)}" if towers else "is one tower: leave --tower out"
        raise ValueError(f"--tower {args.tower}: {args.model} {has}")
    alone = None if composite is None else composite.exported_alone(host)
    if alone is not None and args.tower in alone:
        name = alone[args.tower]
        return model.get_submodule(name), None, example.instance_for(host.get_submodule(name))
    if alone is not None and (args.batch != 1 or is_pruned(model)):
        # which `export` refuses, and says what there is
        return model, None, ()
    try:
        inputs = example.instance_for(host)
    except (AttributeError, LookupError):
        raise ValueError(
            f"no example of inputs is known for {args.model}: give some in Python, vltprune.export(model, path, inputs)"
        ) from None
    if args.tower is None:
        return model, None, inputs
    named = [name.format(args.tower) for name in _METHODS]
    method = next((name for name in named if callable(getattr(model, name, None))), None)
    if method is None:
        raise ValueError(f"--tower {args.tower}: {args.model} has none of the methods {', '.join(named)}: leave it out")
    images, *texts = inputs
    # of a model that reads several images at once, each is one input of the tower
    return model, method, (images.reshape(-1, *images.shape[-3:]),) if args.tower == "image" else tuple(texts[:1])


def _frozen(args: argparse.Namespace, model: nn.Module, files: Sequence[Path]) -> nn.Module:
    """The model with the counts of its layers fixed on images. ValueError for one without counts per instance."""
    if not is_pruned(model) or not is_adaptive(model):
        raise ValueError(f"--data fixes counts per instance, and {args.model} has none: leave --data out")
    pruned = check_pruned(model)
    batches = prune.image_batches(pruned, files, args.batch_size, "cpu")
    fixed = freeze(pruned, [batch for _, batch in batches], args.quantile)
    print(fixed)
    return fixed.model
