"""vltprune chat: a vision-language model's answer to a question about images, and how many visual tokens it read."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.images import SUFFIXES, load_image
from ..data.llava import llava_processor, statement_inputs
from ..io.checkpoint import CONFIG
from ..io.model_files import PRUNING_FILE
from ..io.recipe import original_recipe
from ..models.resolve import is_saved_model
from ..pruning.model import dense_model, is_pruned
from ..pruning.prune import prune_towers
from ..pruning.trace import PruneTrace, collect
from ..utils.files import replacing
from ..viz.prompts import draw_prompt, seen_images
from . import common, options, parts

TINY = "llava_tiny"


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune chat`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser(
        "chat",
        parents=parents,
        help="ask a vision-language model about images",
        description=f"{TINY} takes two images and a statement, and answers true or false; its weights come with the package.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"{TINY}, a saved model's folder, or a folder that transformers' save_pretrained wrote, with its processor",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="images of any size and format")
    parser.add_argument("question", metavar="QUESTION", help="the question about them")
    parser.add_argument(
        "--max-new-tokens",
        type=options.positive,
        default=64,
        metavar="N",
        help="the longest answer (default: %(default)s)",
    )
    parser.add_argument(
        "--picture",
        type=options.output,
        metavar="FILE",
        help="image file to draw what a pruned model read of the images in",
    )
    parser.add_argument("--processor", metavar="DIR", help="folder of the model's processor (default: the model's own)")
    parts.add(parser)
    common.add_device(parser)
    parser.set_defaults(run=run)


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Runs `vltprune chat` with its parsed arguments."""
    for path in args.images:
        load_image(path)
    if args.processor is not None:
        common.check_folder("--processor", args.processor)
    common.use_threads(args.threads)
    if args.picture is not None:
        _check_picture(args.picture)
    model: Any = _load(args)
    if args.picture is not None and not is_pruned(model):
        raise ValueError("--picture draws what a pruned model read, and this one is dense: give --preset")
    processor, inputs = _inputs(args, model)
    weights = common.dtype_of(model)
    inputs = {key: (x.to(weights) if x.is_floating_point() else x).to(args.device) for key, x in inputs.items()}

    with collect(threads=False) as traces:
        said = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    answer = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer)
    _print_tokens(traces)
    if args.picture is not None:
        picture = draw_prompt(_seen(args.images, inputs, processor, traces), traces, args.question, answer)
        with replacing(args.picture) as part:
            picture.save(part)
        print(f"wrote {args.picture}")


def _load(args: argparse.Namespace) -> nn.Module:
    """The model, pruned where its name, its folder or the options say so."""
    replaced = parts.replaced_parts(args)
    parts.check_preset(args)
    if not _is_of_transformers(args.model):
        pretrained = None if is_saved_model(args.model) else True
        return common.load_model(
            args.model, pretrained, preset=args.preset, device=args.device, dtype=args.dtype, **replaced
        )
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, local_files_only=True)
    if args.preset is not None:
        model = prune_towers(model, args.preset, **replaced)
    elif replaced:
        raise TypeError(f"{', '.join(replaced)} given, but {args.model} holds a dense model: give --preset too")
    return model.to(args.device, args.dtype).eval()


def _is_of_transformers(model: str) -> bool:
    """Whether the model argument is a folder with a dense model, as transformers' `save_pretrained` writes it."""
    folder = Path(model)
    if not (folder / CONFIG).is_file() or (folder / PRUNING_FILE).is_file():
        return False
    return "architectures" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def _inputs(args: argparse.Namespace, model: nn.Module) -> tuple[Any, Mapping[str, Tensor]]:
    """The processor, and the inputs of `generate`.

    Raises:
        ValueError: For a model that generates nothing, and for a number of images other than llava_tiny's two.
        OSError: For a folder without a processor.
    """
    if not hasattr(model, "generate") or not hasattr(dense_model(model), "config"):
        raise ValueError(f"chat asks a vision-language model of transformers, and {args.model} is none: use {TINY}")
    if original_recipe(dense_model(model)).backbone == TINY and args.processor is None:
        if len(args.images) != 2:
            raise ValueError(f"{TINY} is asked about two images, a left and a right one, got {len(args.images)}")
        processor = llava_processor()
        return processor, statement_inputs([tuple(args.images)], args.question, processor)
    transformers: Any = importlib.import_module("transformers")
    processor = transformers.AutoProcessor.from_pretrained(args.processor or args.model, local_files_only=True)
    shown = [{"type": "image"} for _ in args.images]
    turn = {"role": "user", "content": [*shown, {"type": "text", "text": args.question}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    images = [load_image(path) for path in args.images]
    return processor, processor(images=images, text=prompt, return_tensors="pt")


def _print_tokens(traces: Sequence[PruneTrace]) -> None:
    if not traces:
        print("this model is dense: the language model reads every visual token")
    for trace in traces:
        for image, entered in enumerate(trace.input_tokens.layout.lengths):
            counts = " ".join(str(lengths[image]) for lengths in trace.lengths)
            print(f"{trace.tower} {image + 1}: {entered} tokens -> {counts}")


def _check_picture(file: str) -> None:
    """ValueError where --picture names no image file, OSError where its folder cannot be written."""
    path = Path(file)
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise ValueError(f"--picture {file}: write an image file, such as {path.stem}.png")
    common.output_folder(path.parent)


def _seen(
    paths: Sequence[str], inputs: Mapping[str, Tensor], processor: Any, traces: Sequence[PruneTrace]
) -> list[Image.Image]:
    """The images as the processor crops them, or their tiles; as they are where the model puts tiles together."""
    image = next(trace for trace in traces if trace.tower == "image")
    is_whole = "image_sizes" in inputs and image.input_tokens.layout.batch == len(paths)
    if is_whole or inputs["pixel_values"].ndim < 4:
        return [load_image(path) for path in paths]
    return seen_images(inputs, processor)
