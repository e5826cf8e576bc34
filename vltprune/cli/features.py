"""vltprune prune: the image tower of any model of timm, open_clip or this library, pruned, on a folder of pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.tokens import PackedTokens
from ..cost import savings
from ..cost.guide_fit import fit_guide
from ..cost.macs import CostMeter
from ..data import Loader, Record
from ..data.images import list_images
from ..evaluation.results_log import write_json
from ..hosts.find import find_composite
from ..io.preprocessing import Preprocessing, transforms
from ..models.factory import PARTS
from ..pruning.encoder import Pruning
from ..pruning.part import KINDS
from ..pruning.trace import PruneTrace, collect
from ..utils.files import replacing
from ..viz import kept_tokens
from . import common, options


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "prune", parents=parents, help="features, cost and pictures of any timm or open_clip model on your pictures"
    )
    parser.add_argument("model", help=common.MODEL)
    parser.add_argument("folder", type=options.folder, help="a folder of pictures")
    parser.add_argument(
        "--output", type=options.output, default="pruned", metavar="DIR", help="folder for the results (pruned)"
    )
    _add_parts(parser)
    parser.add_argument(
        "--reduction", type=options.share, metavar="SHARE", help="calibrate to this share of MACs saved: 0.5"
    )
    common.add_pretrained(parser)
    parser.add_argument("--limit", type=options.positive, help="only the first so many pictures")
    parser.add_argument(
        "--pictures", type=options.natural, default=16, metavar="N", help="draw what was kept of the first N (16)"
    )
    parser.add_argument("--batch-size", type=options.positive, default=8, help="pictures at a time (8)")
    parser.add_argument(
        "--calibrate-on", type=options.positive, default=16, metavar="N", help="pictures to calibrate on (16)"
    )
    parser.set_defaults(run=run)


def _add_parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        type=options.preset,
        metavar="NAME",
        help="where neither the model's name nor what was saved has one (madtp)",
    )
    for name in KINDS:
        none = ", or none" if name == "guide" else ""
        what = f"instead of the preset's, as name, 'name(value)' or 'name(key=value)'{none}"
        parser.add_argument(f"--{name}", type=options.part(name), metavar="PART", help=what)
    where = "depths to prune, such as 3,6,9, or --at=-1 for the last (every one)"
    parser.add_argument("--at", type=options.depths, metavar="DEPTHS", help=where)


def run(args: argparse.Namespace) -> None:
    folder = common.output_folder(args.output)
    common.use_threads(args.threads)
    files = list_images(args.folder)[: args.limit]
    _remove_former(folder)
    asked = _load(args)
    preprocessing = transforms(asked)
    loader = Loader([Record(i, (file,)) for i, file in enumerate(files)], preprocessing, args.batch_size)
    model: Any = image_tower(asked)
    prepared = prepare(model, loader, args)

    results = Results(folder, args.pictures, preprocessing)
    meter = CostMeter(model)
    with common.bar("pictures", len(files)) as bar:
        for records, images in loader:
            with torch.no_grad(), collect(threads=False) as traces:
                features = model(images[:, 0])
            results.add([files[r.index] for r in records], images[:, 0], features, traces[0], meter(traces))
            bar.update(len(records))
    if not results.files:
        raise OSError(f"none of the {len(files)} pictures could be read: {loader.skipped[0].reason}")
    unreadable = {files[one.index].name: one.reason for one in loader.skipped}
    results.write({"model": args.model, "pruning": model.pruning.config.to_dict(), **prepared}, unreadable)
    _print(results, unreadable)


def _remove_former(folder: Path) -> None:
    """Take away what a former run wrote, so that no picture of other files, or of another model, stands beside the new ones."""
    try:
        former = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["pictures"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    for name in former:
        (folder / "pictures" / f"{name}.png").unlink(missing_ok=True)
    for name in ("summary.json", "features.safetensors"):
        (folder / name).unlink(missing_ok=True)


def _load(args: argparse.Namespace) -> nn.Module:
    """The pruned model that was asked for."""
    parts = {name: getattr(args, name) for name in PARTS if getattr(args, name) is not None}
    if parts.get("guide") == "none":
        parts["guide"] = None
    return common.load_model(args.model, args.pretrained, preset=args.preset, default="madtp", **parts)


def image_tower(model: Any) -> nn.Module:
    """The image tower of a pruned model, as a pruned model of its own, without a classifier. ValueError for none."""
    if "image" not in model.pruning.towers:
        raise ValueError(f"this model has no image tower: it has {', '.join(model.pruning.towers)}")
    encoder = model.pruning.towers["image"]
    if find_composite(model.pruning.host) is not None:
        record = Pruning(model.pruning.config, encoder.host, model.pruning.guide, {"image": encoder})
        object.__setattr__(encoder, "pruning", record)
    if hasattr(encoder.host, "reset_classifier"):
        encoder.host.reset_classifier(0)  # what is asked for are features
    return encoder


def prepare(model: Any, loader: Loader[Record], args: argparse.Namespace) -> dict[str, Any]:
    """Place an untrained guide's anchors, and meet the budget, both on the first pictures; says what it did."""
    guide = model.pruning.guide
    untrained = guide is not None and guide.is_untrained
    if not untrained and args.reduction is None:
        return {}
    images = [images[:, 0] for _, images in replace(loader, stop=args.calibrate_on)]
    number = sum(map(len, images))
    if untrained and images:
        common.say(f"vltprune: the guide is untrained: placing its anchors by k-means on tokens of {number} pictures")
        fit_guide(model, images)
    done: dict[str, Any] = {"guide_fitted_on": number} if untrained else {}
    if args.reduction is None or not images:
        return done
    found = common.calibrate(model, images, args.reduction, f"calibrating on {number} pictures")
    common.say(f"vltprune: calibrated on {number} pictures: {found}")
    return {**done, "calibrated_on": number, "calibration": asdict(found)}


@dataclass
class Results:
    """What comes out: features.safetensors, summary.json, and pictures of what was kept."""

    folder: Path
    draw: int
    preprocessing: Preprocessing
    files: list[str] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    dense_macs: float = 0.0

    def add(self, files: list[Path], images: Tensor, features: Any, trace: PruneTrace, cost: Any) -> None:
        if isinstance(features, PackedTokens):  # BLIP's image tower hands on all that is left
            assert features.summary is not None
            features = features.first_where(features.summary)
        if not features.isfinite().all():
            wrong = next(file for file, feature in zip(files, features, strict=True) if not feature.isfinite().all())
            raise FloatingPointError(f"the features of {wrong} are NaN or infinite: check the model's weights")
        lengths = [trace.input_tokens.layout.lengths, *trace.lengths]
        for i, file in enumerate(files):
            feature = features[i] if features.dim() == 2 else features[i, : lengths[-1][i]]
            self.features.append(feature.contiguous().clone())
            self.kept.append([column[i] for column in lengths])
            if len(self.files) < self.draw:
                self._picture(file, images[i], trace, i)
            self.files.append(file.name)
        self.macs += cost.towers["image"].sum(0).tolist()
        self.dense_macs += float(cost.dense["image"].sum())

    def _picture(self, file: Path, image: Tensor, trace: PruneTrace, place: int) -> None:
        seen = self.preprocessing.seen(image)
        target = self.folder / "pictures" / f"{file.name}.png"
        target.parent.mkdir(exist_ok=True)
        with replacing(target) as part:
            kept_tokens.stack_strips([kept_tokens.layer_strip(seen, trace, place, side=160)], [file.name]).save(part)

    @property
    def reduction(self) -> float:
        return 1 - sum(self.macs) / self.dense_macs

    def write(self, settings: dict[str, Any], unreadable: dict[str, str]) -> None:
        rows = {
            file: {"tokens": kept, "macs": macs}
            for file, kept, macs in zip(self.files, self.kept, self.macs, strict=True)
        }
        summary = {
            **settings,
            "mean_macs": sum(self.macs) / len(self.macs),
            "dense_macs": self.dense_macs / len(self.macs),
            "macs_saved": self.reduction,
            "pictures": rows,
            "unreadable": unreadable,
        }
        write_json(self.folder / "summary.json", summary)
        if self.features[0].dim() == 1:
            tensors = {"features": torch.stack(self.features)}
        else:
            names = [name.encode("utf-8", "backslashreplace").decode("utf-8") for name in self.files]
            tensors = dict(zip(names, self.features, strict=True))
        with replacing(self.folder / "features.safetensors") as part:
            save_file(tensors, part, {"files": json.dumps(self.files)})

    def mean_kept(self) -> list[float]:
        """Tokens that entered, then tokens leaving each block, mean over the pictures."""
        return torch.tensor(self.kept, dtype=torch.float64).mean(0).tolist()


def _print(results: Results, unreadable: dict[str, str]) -> None:
    number, (entered, *kept) = len(results.files), results.mean_kept()
    macs, dense = sum(results.macs) / number / 1e9, results.dense_macs / number / 1e9
    print(f"{number} pictures, features {' x '.join(map(str, results.features[0].shape))}")
    print(f"GMACs a picture: {macs:.3f}, {savings.less(macs, dense)} than dense ({dense:.3f})")
    print(f"tokens, layer by layer (mean): {entered:.0f} -> " + " ".join(f"{n:.0f}" for n in kept))
    for reason in unreadable.values():
        common.say(f"vltprune: skipped: {reason}")
    if unreadable:
        print(f"skipped {len(unreadable)} of {number + len(unreadable)} files that could not be read")
    made = ["features.safetensors", "summary.json"] + ["pictures/"] * (results.draw > 0)
    print(f"wrote {', '.join(str(results.folder / name) for name in made)}")
