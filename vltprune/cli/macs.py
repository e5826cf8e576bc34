"""vltprune macs: MACs of a model on one instance of noise, dense and pruned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import describe
from ..cost.macs import Cost, count_macs
from ..cost.sample_cost import keep_all
from ..hosts.find import find_composite
from ..io.preprocessing import image_size
from ..models.catalog import ModelName
from ..models.resolve import is_saved_model
from ..pruning.model import is_pruned
from . import common, options

_COUNTED = (
    "Counted: multiply-accumulates (MACs) of all matrix products, attention and the pruners' own scoring included, of one\n"
    "instance ({instance}); norms, activations and softmax are not. Dense is\n"
    "what the dense model spends on the tokens that are there; padding is given beside it. FLOPs are twice as many."
)
_ANSWER = 5  # tokens; BLIP's answers are short
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
    cost = count_macs(pruned, *example_for(pruned.pruning.host, args.tokens))
    print_cost(cost, pruned.pruning.host, dense)
    if not dense:
        print("What is pruned depends on the input: this one was noise. Measure your own with vltprune.count_macs.")


def example_for(host: nn.Module, tokens: int | None = None) -> tuple[Tensor, ...]:
    """One instance of noise on the device and in the dtype of a dense model.

    Args:
        host: the dense model.
        tokens: the length of the sentence, as in `example`.

    Returns:
        The model's positional inputs.

    Raises:
        ValueError: as `example`.
    """
    device, dtype = next(host.parameters()).device, common.dtype_of(host)
    return tuple(one.to(device, dtype if one.is_floating_point() else None) for one in example(host, tokens))


def example(host: Any, tokens: int | None = None) -> tuple[Tensor, ...]:
    """One instance of noise that a dense model takes.

    Args:
        host: the dense model.
        tokens: the length of the sentence. None for the model's own: at most 35 of BLIP, the whole context of CLIP.

    Returns:
        The model's positional inputs, on the CPU in single precision: images, and a sentence where it reads one.

    Raises:
        ValueError: for a sentence that the model does not read, or that is too long for it.
    """
    generator = torch.Generator().manual_seed(0)
    composite = find_composite(host)
    towers = {"image": host} if composite is None else {t: m for t, (m, _) in composite.towers(host).items()}
    images = torch.randn(1, 3, *image_size(towers["image"]), generator=generator)
    if composite is None:
        if tokens is not None:
            raise ValueError(f"--tokens: a {type(host).__name__} reads no sentence: leave the option out")
        return (images,)
    if hasattr(host, "images_per_sentence"):
        images = images if host.images_per_sentence == 1 else images.repeat(2, 1, 1, 1)[None]
        reader = host.text if hasattr(host, "text") else host.decoder.body
        longest, vocabulary = reader.position.num_embeddings, reader.word.num_embeddings
        length = tokens or min(35, max(longest // 2, 1))
        ids = torch.randint(1, vocabulary, (1, length), generator=generator)
        answers = (torch.ones_like(ids), ids[:, :_ANSWER]) if hasattr(host, "rank") else ()
        return images, ids, *answers
    return images, _clip_text(towers["text"], tokens, generator)


def _clip_text(tower: Any, tokens: int | None, generator: torch.Generator) -> Tensor:
    """A sentence for open_clip: noise, then its end, which has the highest id, then padding."""
    length: int = getattr(tower, "context_length", None) or 77
    vocabulary: int = getattr(tower, "vocab_size", None) or 49408
    tokens = tokens or length
    if tokens > length:
        raise ValueError(f"--tokens {tokens}: this model reads sentences of at most {length} tokens")
    text = torch.zeros(1, length, dtype=torch.long)
    text[0, :tokens] = torch.randint(1, vocabulary - 1, (tokens,), generator=generator)
    text[0, tokens - 1] = vocabulary - 1
    return text


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
        _print_macs("decoder", cost.dense_decoder, cost.decoder, cost.decoder_padding, dense)
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
    if find_composite(host) is None:
        return "an image"
    if hasattr(host, "rank"):
        return f"an image, a question and an answer of {_ANSWER} tokens"
    return "two images and a sentence" if getattr(host, "images_per_sentence", 1) == 2 else "an image and a sentence"
