"""Options and checks that several commands have: output folders, data, models and their devices."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..cost import calibration, guide_fit
from ..cost.inputs import Batch
from ..data import shards
from ..evaluation.tasks.base import Images
from ..evaluation.tasks.nlvr import SYNTHETIC
from ..io.preprocessing import transforms
from ..models.catalog import ModelName
from ..models.resolve import has_random_weights, resolve_model
from ..pruning.config import PruneConfig
from ..pruning.model import PrunedModel, is_pruned
from ..utils.progress import say
from . import options

MODEL = "a name, such as vit_base_patch16_224_evit or clip_vit_b_32.openai, a saved model's folder, or hf-hub:org/name"


Subparsers = Any  # argparse has no public name for what add_subparsers returns


def keywords(pairs: Sequence[str]) -> dict[str, Any]:
    """Parses assignments, such as "image_size=96" and "keep=ratio(ratio=0.5)", into a dict."""
    return {name: options.value(text) for name, _, text in (pair.partition("=") for pair in pairs)}


def output_folder(path: str | Path) -> Path:
    """Creates the output folder, and checks that it can be written. OSError that names it otherwise."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "a file is in its way" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise OSError(f"cannot write to the folder {folder}: {reason}; choose another --output") from error
    return folder


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --output and --overwrite.

    Args:
        parser: the command's parser.
        default: the default folder, as the help text shows it.
    """
    parser.add_argument(
        "--output", type=options.output, metavar="DIR", help=f"folder for the results (default: {default})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what a former run left in the folder")


def default_output(command: str, model: str) -> Path:
    """The default folder of a command's results for a model.

    Args:
        command: the command's name, or several folders with slashes between.
        model: the model argument: a name, a folder, or a repository of the hub.

    Returns:
        A relative path, such as "features/vit_tiny_patch16_224".
    """
    name = Path(model).resolve().name if Path(model).is_dir() else model.removeprefix("hf-hub:").replace("/", "-")
    return Path(command, name or "model")


def new_folder(path: str | Path, names: Sequence[str], overwrite: bool) -> Path:
    """Creates the output folder of a run that overwrites nothing unless asked.

    Args:
        path: the folder.
        names: files and folders that the run will write in it.
        overwrite: whether they may exist already.

    Returns:
        The folder.

    Raises:
        FileExistsError: where one of them exists and must not be overwritten.
        OSError: where the folder cannot be written.
    """
    folder = Path(path)
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} holds results already ({', '.join(there)}): add --overwrite to replace them, or choose another --output"
        )
    return output_folder(folder)


def check_annotations(option: str, data: str) -> None:
    """Checks that annotations are a file, synthetic or shards.

    Args:
        option: the option's name, for errors.
        data: the option's value.

    Raises:
        IsADirectoryError: for a folder.
        FileNotFoundError: for a file that does not exist.
    """
    if data.startswith(SYNTHETIC) or shards.is_shard_address(data):
        return
    path = Path(data)
    if path.is_dir():
        raise IsADirectoryError(f"{option}: {data} is a folder: give the annotation file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no annotation file {data}")


def check_folder(option: str, folder: str) -> None:
    """Checks that a folder exists.

    Args:
        option: the option's name, for errors.
        folder: the option's value.

    Raises:
        NotADirectoryError: where there is no such folder.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"{option}: there is no folder {folder}")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds --images, the folders that the paths of annotations begin in."""
    parser.add_argument(
        "--images",
        action="append",
        metavar="DIR",
        help="the folder that the annotations' paths begin in; for vqa also one for each data set, as vg=DIR (default: the "
        "annotations' own)",
    )


def image_folders(args: argparse.Namespace) -> Images:
    """The image folder of --images, or one for each data set. ValueError for a mixture, OSError for no folder."""
    if args.images is None:
        return str(Path(args.data).parent)
    given = args.images
    if len(given) == 1 and (Path(given[0]).is_dir() or "=" not in given[0]):
        check_folder("--images", given[0])
        return given[0]
    if not all("=" in one for one in given):
        raise ValueError(f"--images {' --images '.join(given)}: give one folder, or one for each data set, as vg=DIR")
    folders = {name: folder for name, _, folder in (one.partition("=") for one in given)}
    for folder in folders.values():
        check_folder("--images", folder)
    return folders


def add_batching(parser: argparse.ArgumentParser, what: str, batch_size: int, limit: int | None = None) -> None:
    """Adds --limit and --batch-size, of a command that reads images or records in batches.

    Args:
        parser: The command's parser.
        what: What it reads, as the help text writes it, such as "images".
        batch_size: The default of --batch-size.
        limit: The default of --limit; None for all.
    """
    default = "all" if limit is None else "%(default)s"
    first = f"only the first N {what} (default: {default})"
    parser.add_argument("--limit", type=options.positive, default=limit, metavar="N", help=first)
    at_a_time = f"{what} at a time (default: %(default)s)"
    parser.add_argument("--batch-size", type=options.positive, default=batch_size, metavar="N", help=at_a_time)


def use_threads(threads: int | None) -> None:
    """Sets the number of CPU threads; None leaves it to torch."""
    if threads is not None:
        torch.set_num_threads(threads)


def add_pretrained(parser: argparse.ArgumentParser) -> None:
    """Adds --pretrained, for a model that is given by name."""
    parser.add_argument(
        "--pretrained",
        nargs="?",
        const=True,
        metavar="PATH",
        help="weights of a named model: a file or folder; without PATH, those that belong to the name (default: those of the "
        "name's tag, or random ones)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device, a string, and --dtype, a torch.dtype or None for the model's own."""
    parser.add_argument(
        "--device",
        type=options.device,
        default="cpu",
        help="where the model runs: cpu, cuda, cuda:1, mps (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        type=options.dtype,
        help="dtype of the model and its inputs: float32, bfloat16, float16 (default: the model's own, float32 of a name)",
    )


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights, which its inputs must have."""
    return next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)


def input_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """A model's evaluation transform, from an RGB image to its pixels [3, height, width] in the model's dtype."""
    transform, dtype = transforms(model), dtype_of(model)

    def prepare(image: Image.Image) -> Tensor:
        return transform(image).to(dtype)

    return prepare


def load_model(
    model: str,
    pretrained: str | bool | None = None,
    *,
    preset: str | None = None,
    default: PruneConfig | str | None = None,
    warn_if_dense: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    **arguments: object,
) -> nn.Module:
    """Loads the model of a command's model argument onto its device, and says so where its weights are random.

    Args:
        model: the model argument: a name, a folder that `save` wrote, or a repository of the hub.
        pretrained: the weights of a name: a file or folder; True for those that belong to the name.
        preset: how to prune, where neither the name nor the saved model says.
        default: the preset or PruneConfig where nothing else says how to prune. None leaves the model dense.
        warn_if_dense: whether random weights matter for a dense model too, because its answers are shown.
        device: where the model runs.
        dtype: the dtype of its weights. None leaves it unchanged.
        **arguments: parts of the pruning to replace, and for a name arguments of its backbone.

    Returns:
        The model, in evaluation mode.

    Raises:
        LookupError, TypeError, ValueError, CheckpointError: as `resolve_model` raises them.
    """
    loaded = resolve_model(model, pretrained=pretrained, preset=preset, default=default, arguments=arguments)
    if has_random_weights(model, pretrained) and (warn_if_dense or is_pruned(loaded)):
        say_random(model, "which tokens it keeps, and what it makes of them, means nothing")
    return loaded.to(device, dtype)


def say_random(model: str, consequence: str) -> None:
    """Prints that a named model has random weights, and how to have trained ones.

    Args:
        model: the model's name.
        consequence: what follows for the results, as a clause.
    """
    tags = ModelName.parse(model).tags()
    how = f"append a tag, such as .{tags[0]}" if tags else "give a file of weights with --pretrained PATH"
    say(f"vltprune: {model} has RANDOM weights here: {consequence}. For trained ones, {how}")


def has_untrained_guide(model: PrunedModel) -> bool:
    """Whether a pruned model has a guide whose anchors are still random."""
    guide = model.pruning.guide
    return guide is not None and guide.is_untrained


def fit_guide(model: PrunedModel, batches: Sequence[Batch], what: str) -> None:
    """Fits the guide of a pruned model on batches, and prints that it does.

    Args:
        model: a pruned model with a guide.
        batches: inputs, as `cost.guide_fit.fit_guide` takes them.
        what: the batches in words, such as "16 images".

    Raises:
        ValueError: for fewer tokens than anchors.
    """
    say(f"vltprune: the guide is untrained: placing its anchors by k-means on tokens of {what}")
    guide_fit.fit_guide(model, batches)


def calibrate(
    model: PrunedModel, batches: Sequence[Batch], reduction: float | Mapping[str, float], what: str
) -> calibration.Calibration:
    """Calibrates a pruned model on batches, and prints that it does.

    Args:
        model: a pruned model.
        batches: inputs, as `cost.calibration.calibrate` takes them.
        reduction: the fraction of the dense MACs to save, or one for each tower.
        what: the batches in words, such as "16 images".

    Returns:
        The Calibration.

    Raises:
        BudgetError: for a cost that the keeper cannot reach.
    """
    say(f"vltprune: calibrating on {what}")
    return calibration.calibrate(model, batches, reduction)
