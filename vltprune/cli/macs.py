"""vltprune macs: MACs of a model on one instance of noise, dense and pruned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import nn

from ..cost import describe
from ..cost.macs import Cost, count_macs
from ..cost.sample_cost import keep_all
from ..models.catalog import ModelName
from ..models.resolve import is_saved_model
from ..pruning.model import is_pruned
from . import common, example, options

_COUNTED = (
    "Counted: multiply-accumulates (MACs) of all matrix products, attention and the pruners' own scoring included, of one\n"
    "instance ({instance}); norms, activations and softmax are not. Dense is\n"
    "what the dense model spends on the tokens that are there; padding is given beside it. FLOPs are twice as many."
)
_SIZE_ARGUMENT = {"vltprune": "image_size", "timm": "img_size", "open_clip": "force_image_size"}


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune macs`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser("macs", parents=parents, help="MACs of a model, dense and pruned")
    parser.add_argument("model", help=common.MODEL)
    common.add_pretrained(parser)
    common.add_device(parser)
    parser.add_argument("--image-size", type=options.positive, metavar="N", help="pixels (default: the model's own)")
    parser.add_argument(
        "--tokens",
        type=options.positive,
        metavar="N",
        help="length of the sentence (default: 35, or what the model takes)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs `vltprune macs` with its parsed arguments."""
    common.use_threads(args.threads)
    if args.image_size and is_saved_model(args.model):
        raise ValueError(
            f"--image-size {args.image_size}: the folder {args.model} says itself what its model is: leave the option out"
        )
    size = {_SIZE_ARGUMENT[ModelName.parse(args.model).library]: args.image_size} if args.image_size else {}
    model = common.load_model(args.model, args.pretrained, device=args.device, dtype=args.dtype, **size)
    dense = not is_pruned(model)
    pruned = model if is_pruned(model) else keep_all(model)
    cost = count_macs(pruned, *example.instance_for(pruned.pruning.host, args.tokens))
    print_cost(cost, pruned.pruning.host, dense)
    if not dense:
        print("What is pruned depends on the input: this one was noise. Measure your own with vltprune.count_macs.")


def print_cost(cost: Cost, host: nn.Module, dense: bool) -> None:
    """Prints the MACs of each tower, of a decoder and of all, which tower saves most, and what is counted.

    Args:
        cost: the Cost of one instance.
        host: the dense model, for what the instance is.
        dense: whether to print dense MACs alone.
    """
    for tower, macs in cost.towers.items():
        before, after, padding = (float(one.sum()) for one in (cost.dense[tower], macs, cost.padding[tower]))
        share = "" if dense else describe.format_tower_saving(tower, cost.saving_by_tower)
        _print_macs(f"{tower} tower", before, after, padding, dense, share)
    if cost.dense_decoder:
        _print_macs("decoder", cost.dense_decoder, cost.decoder_total, cost.decoder_padding, dense)
    _print_macs("all", cost.dense_total, cost.total, cost.padding_total, dense)
    note = "" if dense else describe.note_on_towers(cost.saving_by_tower, cost.reductions, cost.reduction)
    if note:
        print(note)
    print(_COUNTED.format(instance=_instance(host)))


def _print_macs(what: str, before: float, after: float, padding: float, dense: bool, share: str = "") -> None:
    saved = "" if dense else f"   pruned {after / 1e9:9.3f} GMACs   ({describe.format_change(after, before)}{share})"
    beside = f"   and {padding / 1e9:.3f} on padding{'' if dense else ', skipped'}" if padding > 0 else ""
    print(f"{what:12} dense {before / 1e9:9.3f} GMACs{saved}{beside}")


def _instance(host: nn.Module) -> str:
    if hasattr(host, "rank"):
        return f"an image, a question and an answer of {example.ANSWER} tokens"
    images = "two images" if getattr(host, "images_per_sentence", 1) == 2 else "an image"
    inputs = example.instance(host)
    return " and ".join(dict.fromkeys(images if one.is_floating_point() else "a sentence" for one in inputs))
