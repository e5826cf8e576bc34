"""vltprune prune: writes a pruned model that is calibrated to a cost, without training; `vltprune.load` reads it."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..cost.describe import format_change
from ..cost.inputs import Batch
from ..cost.savings import Calibration
from ..cost.targets import check_targets
from ..data import Loader, Record, shards
from ..data.images import list_images
from ..data.records import with_one_text
from ..evaluation import tasks
from ..hosts.find import find_composite
from ..io.checkpoint import CONFIG, WEIGHTS, save
from ..models.factory import check_same_parts
from ..models.wordpiece import BERT
from ..pruning.model import PrunedModel, check_pruned, get_pruning
from ..pruning.presets import preset
from ..utils.table import table
from . import common, options, parts

_MORE = "--data captions.json --images DIR"


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune prune`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser(
        "prune",
        parents=parents,
        help="write a pruned model, calibrated to a cost without training, for vltprune.load and every command",
        description="A folder of images calibrates the image tower, and leaves a text tower as it is. Annotations, as "
        "`vltprune eval` reads them, calibrate all towers.",
    )
    parser.add_argument("model", help=common.MODEL)
    parser.add_argument(
        "--reduction",
        type=options.reduction,
        required=True,
        metavar="FRACTION",
        help="fraction of the dense MACs to save, such as 0.5, or one of each tower's own: image=0.5,text=0.3",
    )
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="a folder of images, or annotations, or synthetic:train (nlvr)"
    )
    common.add_images(parser)
    parser.add_argument(
        "--task", choices=tasks.tasks.names(), help="what the annotations are of (default: what the model is made for)"
    )
    vocabulary = "for BLIP: vocab.txt or tokenizer.json (default: the hub's %(default)s)"
    parser.add_argument("--vocabulary", type=options.vocabulary, default=BERT, metavar="PATH", help=vocabulary)
    common.add_batching(parser, "images or records", batch_size=16, limit=64)
    common.add_output(parser, "pruned/MODEL")
    parts.add(parser)
    common.add_pretrained(parser)
    common.add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs `vltprune prune` with its parsed arguments."""
    files = _check_data(args)
    folder = common.new_folder(
        args.output or common.default_output("pruned", args.model), (CONFIG, WEIGHTS), args.overwrite
    )
    common.use_threads(args.threads)
    model = _load(args, images_only=files is not None)
    reduction = args.reduction
    if files is not None and len(model.pruning.towers) > 1 and not isinstance(reduction, Mapping):
        reduction = {"image": reduction}
    check_targets(model, reduction)
    batches = (
        _record_batches(args, model) if files is None else image_batches(model, files, args.batch_size, args.device)
    )
    number = f"{sum(count for count, _ in batches)} {'records' if files is None else 'images'}"
    inputs = [batch for _, batch in batches]

    if common.has_untrained_guide(model):
        common.fit_guide(model, inputs, number)
    found = common.calibrate(model, inputs, reduction, number)
    save(model, folder)
    print(f"calibrated on {number}: {found}")
    _print_towers(found, model)
    print(f"wrote {folder}. To use it:\n\n    import vltprune as vp\n    model = vp.load({str(folder)!r})")


def _check_data(args: argparse.Namespace) -> list[Path] | None:
    """The images of a folder, None for annotations. OSError or ValueError, before any work, for what cannot be read."""
    if not Path(args.data).is_dir():
        common.check_annotations("--data", args.data)
        if shards.is_shard_address(args.data):
            raise ValueError(f"--data {args.data}: prune reads no shards: give a folder of images, or annotations")
        common.image_folders(args)
        return None
    if args.images or args.task:
        option = "--images" if args.images else "--task"
        raise ValueError(f"{option} goes with annotations, and --data {args.data} is a folder of images: leave it out")
    others = [tower for tower in args.reduction if tower != "image"] if isinstance(args.reduction, Mapping) else []
    if others:
        raise ValueError(
            f"--reduction {others[0]}=...: a folder of images calibrates the image tower alone: give {_MORE}"
        )
    return list_images(args.data)[: args.limit]


def _load(args: argparse.Namespace, images_only: bool) -> PrunedModel:
    """The pruned model; a dense one is pruned by --preset, with `images_only` in its image tower alone.

    ValueError for a --preset of other parts than the model's own.
    """
    replaced = parts.replaced_parts(args)
    config = preset(args.preset or parts.PRESET)
    if images_only:
        config = config.in_tower("image")
        if "at" in replaced:
            replaced["at"] = {"image": replaced["at"]}
    parts.check_preset(args)
    loaded = common.load_model(
        args.model, args.pretrained, default=config, device=args.device, dtype=args.dtype, **replaced
    )
    model = check_pruned(loaded)
    if args.preset:
        check_same_parts(args.preset, config, model.pruning.config, args.model, replaced)
    return model


def image_batches(model: PrunedModel, files: Sequence[Path], batch_size: int, device: str) -> list[tuple[int, Batch]]:
    """Batches of images for the image tower of a model.

    Args:
        model: The pruned model, whose evaluation transform prepares the images.
        files: The images. Those that cannot be read are left out, and it is said.
        batch_size: Images a batch.
        device: Where the model is.

    Returns:
        The batches, each with its number of images.

    Raises:
        OSError: Where none can be read.
    """
    loader = Loader([Record(i, (file,)) for i, file in enumerate(files)], common.input_transform(model), batch_size)
    tensors = [images[:, 0].to(device) for _, images in loader]
    if not tensors:
        raise OSError(f"none of the {len(files)} images could be read: {loader.skipped[0].reason}")
    for one in loader.skipped:
        common.say(f"vltprune: skipped: {one.reason}")
    alone = find_composite(model.pruning.host) is None
    return [(len(images), images if alone else partial(_run_image_tower, images=images)) for images in tensors]


def _run_image_tower(model: nn.Module, images: Tensor) -> object:
    return get_pruning(model).towers["image"](images)


def _record_batches(args: argparse.Namespace, model: PrunedModel) -> list[tuple[int, Batch]]:
    """Calls of the model on annotated records as its task makes them, each with their number, one text a record."""
    task = _task(args, model)
    records = task.load_records(args.data, common.image_folders(args), False)[: args.limit]
    return record_batches(task, records, model, args.batch_size, f"--data {args.data}")


def record_batches(
    task: tasks.Task[Any], records: Sequence[Record], model: nn.Module, batch_size: int, source: str
) -> list[tuple[int, Batch]]:
    """Calls of a model on records as its task makes them, for calibration.

    Args:
        task: The task, set to the model.
        records: The records. Those that the model cannot read are left out, and one text of each is taken.
        model: The model, dense or pruned, whose images are prepared for it.
        batch_size: Records a call.
        source: Where the records are from, for errors.

    Returns:
        The calls, each with its number of records.

    Raises:
        ValueError: Where no record can be read.
    """
    device = next(model.parameters()).device
    records = [with_one_text(record) for record in records]
    readable = [record for record in records if _is_readable(task, record)]
    loader = Loader(readable, common.input_transform(model), batch_size)
    batches: list[tuple[int, Batch]] = []
    for batch, images in loader:
        texts = tuple(text.to(device) for text in task.tokenize(batch)[0])
        call = partial(task.predict, records=batch, images=images.to(device), texts=texts)
        batches.append((len(batch), call))
    if not batches:
        reason = f": {loader.skipped[0].reason}" if loader.skipped else ", for the model does not know their words"
        raise ValueError(f"{source}: none of the {len(records)} records could be read{reason}")
    return batches


def _task(args: argparse.Namespace, model: nn.Module) -> tasks.Task[Any]:
    """The task that a model is made for. ValueError for none."""
    kinds: Any = tasks.tasks
    settings = tasks.Options(args.vocabulary)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores that cannot be had; none are asked for
        if args.task:
            return kinds[args.task].from_model(model, settings)
        for name in kinds.names():
            try:
                return kinds[name].from_model(model, settings)
            except ValueError:
                continue
    raise ValueError(
        f"no task reads annotations for {args.model}; --task NAME says why one does not. A folder of images calibrates the "
        "image tower alone: --data DIR"
    )


def _is_readable(task: tasks.Task[Any], record: Record) -> bool:
    """Whether the model knows the words of a record."""
    try:
        task.tokenize([record])
    except ValueError:
        return False
    return True


def _print_towers(found: Calibration, model: PrunedModel) -> None:
    """A table of MACs, dense and pruned, of each tower that was calibrated, and a line for each that was not."""
    rows = [["GMACs", "dense", "pruned", "change"]]
    costs = {name: (tower.macs, tower.dense_macs) for name, tower in found.towers.items()}
    others = [name for name in model.pruning.towers if name not in costs]
    if not others and len(costs) > 1:
        costs["all"] = (found.macs, found.dense_macs)
    for name, (macs, dense) in costs.items():
        rows.append([name, f"{dense / 1e9:.3f}", f"{macs / 1e9:.3f}", format_change(macs, dense)])
    print(table(rows))
    for name in others:
        how = "keeps the pruning that it had" if model.pruning.towers[name].pruners else "stays dense"
        print(f"The {name} tower {how}: images do not run it. To calibrate it too, give {_MORE}")
