"""vltprune predict: is a sentence true of the user's own two pictures? The answer, what it cost, and what was kept."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..cost import describe
from ..cost.macs import CostMeter
from ..data.images import SUFFIXES, load_image, load_tensor
from ..data.word_tokenizer import WordTokenizer
from ..io.preprocessing import transforms
from ..pruning.trace import PruneTrace, collect
from ..utils.files import replacing
from ..viz import kept_tokens
from . import common, options

_PICTURE = "prediction.png"


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("predict", parents=parents, help="is a sentence true of two pictures of yours?")
    parser.add_argument("left", help="the left picture, of any size and format")
    parser.add_argument("right", help="the right picture")
    parser.add_argument("sentence", help='such as "both images contain a red circle"')
    parser.add_argument(
        "--model", default="blip_nlvr_tiny_madtp.p80", help="a blip_nlvr_tiny, dense or pruned (%(default)s)"
    )
    common.add_pretrained(parser)
    common.add_device(parser)
    parser.add_argument(
        "--output",
        type=options.output,
        default=_PICTURE,
        metavar="PATH",
        help="picture file, or a folder for it (%(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    output = _output(args.output)
    common.use_threads(args.threads)
    for path in (args.left, args.right):
        load_image(path)  # before a model is built
    input_ids, mask = WordTokenizer().encode(args.sentence)
    model = common.load_model(args.model, args.pretrained, judged=True, device=args.device, dtype=args.dtype)
    _check(model, args.model)
    prepare = transforms(model)
    pair = torch.stack([load_tensor(path, prepare) for path in (args.left, args.right)])

    with torch.no_grad(), collect(threads=False) as traces:
        texts = (input_ids.to(args.device), mask.to(args.device))
        chance = float(model(pair[None].to(args.device, common.dtype_of(model)), *texts).softmax(-1)[0, 1])
    if not math.isfinite(chance):
        raise FloatingPointError(
            f"the logits of {args.model} are NaN or infinite, which is no answer: check its weights"
        )
    print(f"{str(chance > 0.5).lower()}  (probability of true: {chance:.1%})")
    _report(model, traces)
    with replacing(output) as part:
        _draw([prepare.seen(image) for image in pair], traces, args.sentence, chance).save(part)
    print(f"wrote {output}")


def _output(text: str) -> Path:
    """The file to write, its folder proved writable."""
    path = Path(text)
    if path.suffix[1:].isalpha() and path.suffix.lower() not in SUFFIXES and not path.is_dir():
        raise ValueError(f"--output {text}: write a picture file, such as {path.stem}.png, or a folder")
    file = path if path.suffix.lower() in SUFFIXES and not path.is_dir() else path / _PICTURE
    common.output_folder(file.parent)
    return file


def _check(model: Any, name: str) -> None:
    """ValueError for a model that does not speak of pairs in our words."""
    host = model.pruning.host if hasattr(model, "pruning") else model
    if getattr(host, "images_per_sentence", 0) != 2:
        raise ValueError(f"predict asks about two images and a sentence, and {name} does not: use a blip_nlvr_tiny")
    words, known = host.text.word.num_embeddings, len(WordTokenizer())
    if words != known:
        raise ValueError(
            f"predict knows the {known} words of blip_nlvr_tiny, and {name} has {words}: tokenize the sentence with that "
            "model's own tokenizer and call model(images, input_ids, attention_mask) in Python"
        )


def _report(model: nn.Module, traces: Sequence[PruneTrace]) -> None:
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
        films = [image.resize((256, 256), Image.Resampling.BICUBIC) for image in images]
    else:
        films = [kept_tokens.layer_strip(image, trace, side) for side, image in enumerate(images)]
    return kept_tokens.stack_strips(films, [title], legend=trace is not None)
