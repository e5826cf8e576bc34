"""vltprune features: features of a pruned image tower for a folder of images, with its cost and images of what was kept."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.tokens import PackedTokens
from ..cost import describe
from ..cost.macs import Cost, CostMeter
from ..cost.targets import check_targets
from ..data import Loader, Record
from ..data.images import list_images
from ..evaluation.results_log import write_json
from ..hosts.find import find_composite
from ..io.preprocessing import Preprocessing, transforms
from ..pruning.encoder import Pruning
from ..pruning.model import PrunedModel, check_pruned
from ..pruning.trace import PruneTrace, collect
from ..utils.files import replacing
from ..utils.progress import bar
from ..viz import kept_tokens
from . import common, options, parts

_FEATURES, _SUMMARY, _IMAGES = "features.safetensors", "summary.json", "images"


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune features`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser(
        "features",
        parents=parents,
        help="features, cost and images of what was kept, of any model on a folder of images",
    )
    parser.add_argument("model", help=common.MODEL)
    parser.add_argument("folder", type=options.folder, help="a folder of images")
    common.add_output(parser, "features/MODEL")
    parser.add_argument(
        "--reduction",
        type=options.fraction,
        metavar="FRACTION",
        help="calibrate to this fraction of MACs saved, such as 0.5 (default: no calibration)",
    )
    parser.add_argument(
        "--calibrate-on",
        type=options.positive,
        default=16,
        metavar="N",
        help="images to calibrate on (default: %(default)s)",
    )
    common.add_batching(parser, "images", batch_size=8)
    parser.add_argument(
        "--draw",
        type=options.natural,
        default=16,
        metavar="N",
        help="draw what was kept of the first N images (default: %(default)s)",
    )
    parts.add(parser)
    common.add_pretrained(parser)
    common.add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs `vltprune features` with its parsed arguments."""
    files = list_images(args.folder)[: args.limit]
    folder = common.new_folder(
        args.output or common.default_output("features", args.model), (_SUMMARY, _FEATURES, _IMAGES), args.overwrite
    )
    common.use_threads(args.threads)
    loaded = common.load_model(
        args.model,
        args.pretrained,
        preset=args.preset,
        default=parts.PRESET,
        device=args.device,
        dtype=args.dtype,
        **parts.replaced_parts(args),
    )
    loader = Loader(
        [Record(i, (file,)) for i, file in enumerate(files)], common.input_transform(loaded), args.batch_size
    )
    preprocessing, model = transforms(loaded), image_tower(check_pruned(loaded))
    prepared = prepare(model, loader, args)

    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as drawings:
        results = Results(Path(drawings), draw_names(files), args.draw, preprocessing)
        _compute(model, loader, files, args.device, results)
        unreadable = {files[one.index].name: one.reason for one in loader.skipped}
        settings = {"model": args.model, "pruning": model.pruning.config.to_dict(), **prepared}
        results.write(folder, settings, unreadable)
    _print(results, folder, unreadable)


def _compute(model: nn.Module, loader: Loader[Record], files: Sequence[Path], device: str, results: Results) -> None:
    """Run the model on every image. OSError where none can be read."""
    meter = CostMeter(model)
    with bar("images", len(files)) as shown:
        for records, images in loader:
            with torch.no_grad(), collect(threads=False) as traces:
                features = model(images[:, 0].to(device))
            results.add([files[r.index] for r in records], images[:, 0], features, traces[0], meter(traces))
            shown.update(len(records))
    if not results.files:
        raise OSError(f"none of the {len(files)} images could be read: {loader.skipped[0].reason}")


def draw_names(files: Sequence[Path]) -> dict[Path, str]:
    """The name of each file's drawing: "x.png" of x.jpg, and "x-2.png" of x.png or X.jpg in the same folder.

    Names differ by more than case and Unicode form, so that no file system takes one for another.
    """
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file in files:
        name, number = file.stem, 1
        while unicodedata.normalize("NFC", name.casefold()) in taken:
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(unicodedata.normalize("NFC", name.casefold()))
        names[file] = f"{name}.png"
    return names


def _remove_former(folder: Path) -> None:
    """Remove what a former run wrote, and no file that is the user's own."""
    try:
        rows = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))["images"].values()
        drawings = [folder / _IMAGES / row["drawing"] for row in rows if row["drawing"] is not None]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        drawings = []
    for file in (*drawings, folder / _FEATURES, folder / _SUMMARY):
        file.unlink(missing_ok=True)


def image_tower(model: PrunedModel) -> PrunedModel:
    """The image tower of a pruned model, as a pruned model of its own, without a classifier. ValueError for none."""
    if "image" not in model.pruning.towers:
        raise ValueError(f"this model has no image tower: it has {', '.join(model.pruning.towers)}")
    encoder = model.pruning.towers["image"]
    if find_composite(model.pruning.host) is not None:
        record = Pruning(model.pruning.config, encoder.host, model.pruning.guide, {"image": encoder})
        object.__setattr__(encoder, "pruning", record)
    reset_classifier = getattr(encoder.host, "reset_classifier", None)
    if callable(reset_classifier):
        reset_classifier(0)  # what is asked for are features
    return check_pruned(encoder)


def prepare(model: PrunedModel, loader: Loader[Record], args: argparse.Namespace) -> dict[str, object]:
    """Fits an untrained guide and calibrates to --reduction, both on the first images.

    Args:
        model: the pruned image tower.
        loader: the images; of them, the first --calibrate-on are used.
        args: the command's arguments.

    Returns:
        What was done, for summary.json; empty where nothing was.

    Raises:
        ValueError: for a target that the tower cannot be calibrated to.
    """
    if args.reduction is not None:
        check_targets(model, args.reduction)
    untrained = common.has_untrained_guide(model)
    if not untrained and args.reduction is None:
        return {}
    batches = [images[:, 0].to(args.device) for _, images in replace(loader, stop=args.calibrate_on)]
    if not batches:
        return {}
    number = sum(map(len, batches))
    done: dict[str, object] = {}
    if untrained:
        common.fit_guide(model, batches, f"{number} images")
        done["guide_fitted_on"] = number
    if args.reduction is not None:
        found = common.calibrate(model, batches, args.reduction, f"{number} images")
        common.say(f"vltprune: calibrated on {number} images: {found}")
        done |= {"calibrated_on": number, "calibration": asdict(found)}
    return done


@dataclass
class Results:
    """Results of a run: features, tokens kept and MACs of each image, and drawings of what was kept.

    Attributes:
        drawings: the folder that drawings are written to.
        names: per image file, the name of its drawing.
        draw: how many images are drawn.
        preprocessing: the model's transform, which drawings invert.
        files: the image files that were read, in order.
        features: per file, its features [dim], or [tokens, dim] of a tower without pooling.
        kept: per file, the tokens that entered, then those leaving each block.
        macs: per file, MACs of the pruned tower.
        dense_macs: MACs of the dense tower, summed over the files.
    """

    drawings: Path
    names: dict[Path, str]
    draw: int
    preprocessing: Preprocessing
    files: list[Path] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    dense_macs: float = 0.0

    def add(
        self, files: list[Path], images: Tensor, features: Tensor | PackedTokens, trace: PruneTrace, cost: Cost
    ) -> None:
        """Adds the results of a batch, and draws its images while fewer than `draw` are drawn.

        Args:
            files: the image files of the batch.
            images: their pixels, [batch, 3, height, width].
            features: the tower's output: [batch, dim] or [batch, tokens, dim], or tokens, whose summary tokens are taken.
            trace: the trace of the tower's call.
            cost: the Cost of the same call.

        Raises:
            FloatingPointError: for features that are not finite.
        """
        if isinstance(features, PackedTokens):  # BLIP's image tower hands on all that is left
            features = features.summaries()
        if not features.isfinite().all():
            wrong = next(file for file, feature in zip(files, features, strict=True) if not feature.isfinite().all())
            raise FloatingPointError(f"the features of {wrong} are NaN or infinite: check the model's weights")
        lengths = [trace.input_tokens.layout.lengths, *trace.lengths]
        for i, file in enumerate(files):
            feature = features[i] if features.dim() == 2 else features[i, : lengths[-1][i]]
            self.features.append(feature.cpu().contiguous().clone())
            self.kept.append([column[i] for column in lengths])
            if len(self.files) < self.draw:
                strip = kept_tokens.layer_strip(self.preprocessing.to_image(images[i]), trace, i, side=160)
                kept_tokens.stack_strips([strip], [file.name]).save(self.drawings / self.names[file])
            self.files.append(file)
        self.macs += cost.towers["image"].sum(0).tolist()
        self.dense_macs += float(cost.dense["image"].sum())

    @property
    def reduction(self) -> float:
        return 1 - sum(self.macs) / self.dense_macs

    def write(self, folder: Path, settings: Mapping[str, object], unreadable: dict[str, str]) -> None:
        """Writes all results into a folder in place of a former run's, summary.json last.

        Args:
            folder: the output folder.
            settings: entries of summary.json that describe the run.
            unreadable: per file that could not be read, the reason.

        Raises:
            OSError: where a file cannot be written.
        """
        _remove_former(folder)
        for number, file in enumerate(self.files[: self.draw]):
            if number == 0:
                (folder / _IMAGES).mkdir(exist_ok=True)
            os.replace(self.drawings / self.names[file], folder / _IMAGES / self.names[file])
        if self.features[0].dim() == 1:
            tensors = {"features": torch.stack(self.features)}
        else:
            names = [file.name.encode("utf-8", "backslashreplace").decode("utf-8") for file in self.files]
            tensors = dict(zip(names, self.features, strict=True))
        with replacing(folder / _FEATURES) as part:
            save_file(tensors, part, {"files": json.dumps([file.name for file in self.files])})
        summary = {
            **settings,
            "mean_macs": sum(self.macs) / len(self.macs),
            "dense_macs": self.dense_macs / len(self.macs),
            "macs_saved": self.reduction,
            "images": {file.name: self._row(number) for number, file in enumerate(self.files)},
            "unreadable": unreadable,
        }
        write_json(folder / _SUMMARY, summary)

    def _row(self, number: int) -> dict[str, object]:
        drawing = self.names[self.files[number]] if number < self.draw else None
        return {"tokens": self.kept[number], "macs": self.macs[number], "drawing": drawing}

    def mean_kept(self) -> list[float]:
        """Tokens that entered, then tokens leaving each block, mean over the images."""
        return torch.tensor(self.kept, dtype=torch.float64).mean(0).tolist()


def _print(results: Results, folder: Path, unreadable: dict[str, str]) -> None:
    number, (entered, *kept) = len(results.files), results.mean_kept()
    macs, dense = sum(results.macs) / number / 1e9, results.dense_macs / number / 1e9
    print(f"{number} images, features {' x '.join(map(str, results.features[0].shape))}")
    print(f"GMACs an image: {macs:.3f}, {describe.format_change(macs, dense)} than dense ({dense:.3f})")
    print(f"tokens, layer by layer (mean): {entered:.0f} -> " + " ".join(f"{n:.0f}" for n in kept))
    for reason in unreadable.values():
        common.say(f"vltprune: skipped: {reason}")
    if unreadable:
        print(f"skipped {len(unreadable)} of {number + len(unreadable)} files that could not be read")
    outputs = [_FEATURES, _SUMMARY] + [f"{_IMAGES}/"] * (results.draw > 0)
    print(f"wrote {', '.join(str(folder / name) for name in outputs)}")
