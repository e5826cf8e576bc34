"""vltprune predict: whether a sentence is true of two images, what the answer cost, and which tokens were kept."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..cost import describe
from ..cost.macs import CostMeter
from ..data.images import SUFFIXES, load_image, load_tensor
from ..data.synthetic import SyntheticPairs
from ..data.word_tokenizer import NLVR_WORDS, WordTokenizer
from ..io.preprocessing import transforms
from ..pruning.model import dense_model
from ..pruning.trace import PruneTrace, collect
from ..utils.files import replacing
from ..viz import kept_tokens
from . import common, options

_RESULT, _LEFT, _RIGHT = "prediction.png", "left.png", "right.png"
_SAMPLE = 34  # of the synthetic test split: a white cross and a green square, on the left


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune predict`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser(
        "predict",
        parents=parents,
        help="is a sentence true of two images, yours or a sample?",
        usage="vltprune predict [options] LEFT RIGHT SENTENCE\n       vltprune predict [options] --sample",
    )
    parser.add_argument("left", nargs="?", metavar="LEFT", help="the left image, of any size and format")
    parser.add_argument("right", nargs="?", metavar="RIGHT", help="the right image")
    parser.add_argument("sentence", nargs="?", metavar="SENTENCE", help='such as "both images contain a red circle"')
    parser.add_argument(
        "--sample",
        action="store_true",
        help="draw two images of colored shapes and take a sentence about them; the images are written beside the result",
    )
    parser.add_argument(
        "--model", default="blip_nlvr_tiny_madtp.p80", help="a blip_nlvr_tiny, dense or pruned (default: %(default)s)"
    )
    common.add_pretrained(parser)
    common.add_device(parser)
    parser.add_argument(
        "--output",
        type=options.output,
        metavar="PATH",
        help=f"image file, or a folder for it (default: {_RESULT}, with a number where that exists; sample/{_RESULT})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Question:
    """Two images and a sentence about them.

    Attributes:
        images: the left and the right image, each by path or as pixels [height, width, 3].
        sentence: the sentence.
        answer: whether the sentence of a sample is true. None where that is not known.
    """

    images: tuple[str | np.ndarray, str | np.ndarray]
    sentence: str
    answer: bool | None = None


def run(args: argparse.Namespace) -> None:
    """Runs `vltprune predict` with its parsed arguments."""
    question = _question(args)
    input_ids, mask = _token_ids(question.sentence)
    output = _output(args)
    common.use_threads(args.threads)
    model = common.load_model(args.model, args.pretrained, warn_if_dense=True, device=args.device, dtype=args.dtype)
    _check_model(model, args.model)
    prepare = transforms(model)
    pair = torch.stack([load_tensor(image, prepare) for image in question.images])

    with torch.no_grad(), collect(threads=False) as traces:
        texts = (input_ids.to(args.device), mask.to(args.device))
        chance = float(model(pair[None].to(args.device, common.dtype_of(model)), *texts).softmax(-1)[0, 1])
    if not math.isfinite(chance):
        raise FloatingPointError(
            f"the logits of {args.model} are NaN or infinite, which is no answer: check its weights"
        )
    if args.sample:
        _write_sample(question, output.parent)
    print(f"{str(chance > 0.5).lower()}  (probability of true: {chance:.1%})")
    _print_cost(model, traces)
    with replacing(output) as part:
        _draw([prepare.to_image(image) for image in pair], traces, question.sentence, chance).save(part)
    print(f"wrote {output}")
    if args.sample:
        left, right = output.parent / _LEFT, output.parent / _RIGHT
        print(f'Ask about them yourself: vltprune predict {left} {right} "both images contain a circle"')


def _question(args: argparse.Namespace) -> Question:
    """The question of the arguments. ValueError where a part is missing, OSError for images that cannot be read."""
    given = [one for one in (args.left, args.right, args.sentence) if one is not None]
    if args.sample:
        if given:
            raise ValueError(f"--sample brings its own images and sentence: leave {given[0]!r} out")
        pair = SyntheticPairs("test", _SAMPLE + 1)[_SAMPLE]
        return Question(tuple(pair.images), pair.sentences[0], bool(pair.labels[0]))
    if len(given) < 3:
        raise ValueError("predict needs two images and a sentence, LEFT RIGHT SENTENCE, or --sample")
    for path in (args.left, args.right):
        load_image(path)
    return Question((args.left, args.right), args.sentence)


def _token_ids(sentence: str) -> tuple[Tensor, Tensor]:
    """Tokenize a sentence to input_ids and attention_mask [1, length]. ValueError, with all known words, for unknown ones."""
    tokenizer = WordTokenizer()
    try:
        return tokenizer.encode(sentence)
    except ValueError as error:
        if "unknown words" not in str(error):
            raise
        raise ValueError(f"{error}. The words that the model knows: {' '.join(NLVR_WORDS)}") from None


def _output(args: argparse.Namespace) -> Path:
    """The file to write, its folder proved writable. FileExistsError where it, or the sample's images, exist already."""
    if args.output is None and not args.sample:
        return common.output_folder(".") / _free_name()
    path = Path(args.output or "sample")
    is_file = path.suffix.lower() in SUFFIXES and not path.is_dir()
    if path.suffix[1:].isalpha() and not is_file and not path.is_dir():
        raise ValueError(f"--output {path}: write an image file, such as {path.stem}.png, or a folder")
    file = path if is_file else path / _RESULT
    common.new_folder(file.parent, (file.name, *((_LEFT, _RIGHT) if args.sample else ())), args.overwrite)
    return file


def _free_name() -> str:
    """The first of prediction.png, prediction-2.png, ... that does not exist here."""
    name, number = Path(_RESULT), 1
    while name.exists():
        number += 1
        name = Path(_RESULT).with_stem(f"{Path(_RESULT).stem}-{number}")
    return name.name


def _write_sample(question: Question, folder: Path) -> None:
    """Write a sample's images, and print what it is."""
    for name, image in zip((_LEFT, _RIGHT), question.images, strict=True):
        with replacing(folder / name) as part:
            load_image(image).save(part)
    print(
        f"sample: two images of shapes, drawn here, {folder / _LEFT} and {folder / _RIGHT}; the model has not seen them"
    )
    print(f'sentence: "{question.sentence}", which is {str(question.answer).lower()}. The model says:')


def _check_model(model: nn.Module, name: str) -> None:
    """Check that a model reads two images and the words of the tiny models. ValueError otherwise."""
    host: Any = dense_model(model)
    if getattr(host, "images_per_sentence", 0) != 2:
        raise ValueError(f"predict asks about two images and a sentence, and {name} does not: use a blip_nlvr_tiny")
    words, known = host.text.word.num_embeddings, len(WordTokenizer())
    if words != known:
        raise ValueError(
            f"predict knows the {known} words of blip_nlvr_tiny, and {name} has {words}: tokenize the sentence with that "
            "model's own tokenizer and call model(images, input_ids, attention_mask) in Python"
        )


def _print_cost(model: nn.Module, traces: Sequence[PruneTrace]) -> None:
    if not traces:
        print("this model is dense: every token stays at every layer")
        return
    cost = CostMeter(model)(traces)
    print(describe.format_saving(cost.total, cost.dense_total, cost.padding_total))
    print("tokens kept, layer by layer:")
    for trace in traces:
        for instance, entered in enumerate(trace.input_tokens.layout.lengths):
            side = ("left ", "right ")[instance] if trace.tower == "image" else ""
            counts = " ".join(str(lengths[instance]) for lengths in trace.lengths)
            print(f"  {side + trace.tower:12}{entered} -> {counts}")


def _draw(images: Sequence[Image.Image], traces: Sequence[PruneTrace], sentence: str, chance: float) -> Image.Image:
    title = f'"{sentence}": {str(chance > 0.5).lower()}, probability of true {chance:.1%}'
    trace = next((trace for trace in traces if trace.tower == "image"), None)
    if trace is None:
        strips = [image.resize((256, 256), Image.Resampling.BICUBIC) for image in images]
    else:
        strips = [kept_tokens.layer_strip(image, trace, side) for side, image in enumerate(images)]
    return kept_tokens.stack_strips(strips, [title], legend=trace is not None)
