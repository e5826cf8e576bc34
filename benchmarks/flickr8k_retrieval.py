"""What pruning loses in image-text retrieval, without training and with it: Flickr8k, by a dual encoder.

    python benchmarks/flickr8k_retrieval.py --real REAL --data FLICKR8K --work WORK dense
    python benchmarks/flickr8k_retrieval.py --real REAL --data FLICKR8K --work WORK free
    python benchmarks/flickr8k_retrieval.py --real REAL --data FLICKR8K --work WORK trained --reduction 0.5
    python benchmarks/flickr8k_retrieval.py --real REAL --data FLICKR8K --work WORK ablate --variant "without MAG" --seed 1

REAL holds the encoders' weights, as `photo_towers.py` says; FLICKR8K train.json, dev.json and images/. `dense` trains the
projections and the upper halves of both encoders on the 6,000 training photographs at 112 px, contrastively, one of the
five captions drawn a step. `free` prunes that model without training: anchors by k-means on training photographs, the knob
calibrated. `trained` trains it pruned, to one cost, its dense self as teacher; `ablate` does so for a shorter time, at
70 % or `--reduction`, with one thing changed (`variants.py`). With `--short`, which is for two cores, `dense` takes 300 steps,
and the others 140 of 48 pairs, or `--steps`, judged on the first 500 records of dev: 25 minutes of two cores, and 10 to 30 of
one core a run; `--dtype bfloat16` saves a fifth of that on cores with AMX. `--size 224` takes photographs of 256 patches and
not of 64; its `dense` is the other's, with its positions resampled, and is not trained.
Thresholds, anchors and weights learn from train.json; the knob is set on the first 256 records of dev.json, and R@1, 5, 10
both ways are of all its 1,000 photographs and 5,000 captions. Test captions are not read. Runs resume. Results go to
benchmarks/results/flickr8k_retrieval.json; `table` prints R@1, 5, 10 of the first three stages, and the mean of the six
recalls of the ablations, with differences seed by seed, and what they keep; with a run's options those of such runs.

A GPU is used where there is one. On one H200, beside a dozen other runs, `dense` took 86 s, `trained` 215 s, `ablate` 90 to
130 s, and each score of `free` 46 to 117 s; two cores take hours. The photographs were stored at 128 px there. Text to image
R@1, 5, 10 of `dense`: 21.1, 45.6, 58.6 %; image to text 24.8, 50.5, 60.9 %. With `--short --size 224`, on two CPU cores,
`dense` takes a minute (mean recall 53.1 %), a score of `free` fifteen of one core, `trained --reduction 0.7` 45 (47.2 %).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import photo_runs
import torch
import variants
from photo_towers import dual_encoder, resized

import vltprune as vp
from vltprune.cost.guide_fit import fit_guide
from vltprune.data import Loader, captions
from vltprune.evaluation.evaluator import Evaluator, summarize
from vltprune.evaluation.results_log import ResultsLog
from vltprune.evaluation.tasks import Retrieval
from vltprune.io.preprocessing import transforms
from vltprune.training.data.calibration import calibration_batches

RESULTS = Path(__file__).parent / "results" / "flickr8k_retrieval.json"
REDUCTIONS = (0.3, 0.5, 0.7, 0.8)
AT = {"image": (0, 2, 4, 6), "text": (0, 2, 4)}
_WORDS = (
    "visual.trunk.cls_token",
    "visual.trunk.pos_embed",
    "visual.trunk.patch_embed.*",
    "text.transformer.embeddings.*",
)
_LOWER = ("visual.trunk.blocks.[0-5].*", "text.transformer.encoder.layer.[0-2].*")  # stay as they were trained before
_SIZE = 112  # of images, in pixels, where nothing else is said
_LITTLE = ", short"
_ABLATED = 0.7  # fewer MACs, where nothing else is said
_SHORT = {"steps": 140, "batch_size": 48, "val_limit": 500}
_FREE = {
    "madtp": {"guide": "codebook(anchors=100)", "keep": "ratio"},
    "madtp, DTP": {"guide": "codebook(anchors=100)", "keep": "threshold(knob='temperature')"},
    "self_attention": {"guide": None, "scorer": "self_attention", "keep": "ratio"},
    "distortion": {"guide": None, "scorer": "self_attention", "keep": "distortion"},
    "distinct_attention": {"guide": None, "scorer": "distinct_attention", "keep": "ratio"},
    "attention": {"guide": None, "scorer": "distinct_attention", "keep": "distortion"},
    "random": {"guide": None, "scorer": "random", "keep": "ratio", "reducer": "drop"},
}
_BASES = (
    "madtp",
    "static count",
    "madtp that fades",
    "madtp by temperature",
    "madtp without maps",
    "static count without maps",
)
_TRAINED = ("trained", "ablate", "table")  # stages of pruned models that are trained
_STAGES = ("dense", "trained", "trained without maps", *(f"free, {score}" for score in _FREE))  # all but ablations


def main() -> None:
    parser = photo_runs.parser(__doc__, ["dense", "free", "trained", "ablate", "table"])
    parser.set_defaults(reduction=None)  # as the stage has it
    parser.add_argument("--short", action="store_true", help="in little time; `table`: of such runs")
    parser.add_argument("--size", type=int, default=_SIZE, help="of images, in pixels, a multiple of 14")
    parser.add_argument("--steps", type=int, default=_SHORT["steps"], help="of `trained` and `ablate`, with --short")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of `trained` and `ablate`")
    parser.add_argument("--score", choices=_FREE, help="of `free`: this one alone")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of what is not trained"
    )
    options = parser.parse_args()
    if options.steps != _SHORT["steps"] and not (options.short and options.stage in _TRAINED):
        parser.error(f"--steps is of {', '.join(_TRAINED)}, with --short")
    if options.dtype != "float32" and options.stage not in _TRAINED:
        parser.error(f"--dtype is of {', '.join(_TRAINED)}")
    torch.set_num_threads(options.threads)
    if options.stage == "table":
        return print(table(options), *ablations(options), sep="\n\n")
    {"dense": dense, "free": free, "trained": trained, "ablate": ablate}[options.stage](options)


def dense(options: argparse.Namespace) -> None:
    """The model that all others of its size start from; of another size than the first it is the first's."""
    if options.size != _SIZE:
        return dense_resized(options)
    fields = {**_own(options), **({"epochs": 5, "val_limit": _SHORT["val_limit"]} if options.short else {"epochs": 10})}
    build = partial(dual_encoder, options.real)
    photo_runs.dense(options.work, RESULTS, called("dense", options), build, freeze=_WORDS + _LOWER, **fields)


def dense_resized(options: argparse.Namespace) -> None:
    """The dense model of the first size at another, as it is."""
    model = resized(vp.load(options.work / "dense" / "model"), options.real, options.size).to(options.device)
    vp.save(model, _dense(options) / "model")
    examined(options, model, "dense", 0.0)


def free(options: argparse.Namespace) -> None:
    """The trained dense model, pruned without training, by several scores."""
    records, val = (captions(options.data / f"{split}.json", options.data) for split in ("train", "dev"))
    for name, parts in _FREE.items() if options.score is None else [(options.score, _FREE[options.score])]:
        model = vp.prune(vp.load(_dense(options) / "model"), vp.preset("madtp").replace(**parts, at=AT))
        task, prepare = Retrieval.from_model(model.to(options.device)), transforms(model)
        if parts["guide"] is not None:
            drawn = np.random.default_rng(options.seed).permutation(len(records))[:256]
            some = calibration_batches(task, [records[int(i)] for i in drawn], prepare, options.device)
            fit_guide(model, some, options.seed)
        knob_calls = calibration_batches(task, val[:256], prepare, options.device)
        for reduction in REDUCTIONS:
            try:
                vp.calibrate(model, knob_calls, reduction)
            except vp.BudgetError as error:
                print(name, error)
                continue
            examined(options, model, f"free, {name}", reduction)


def examined(options: argparse.Namespace, model: Any, name: str, reduction: float) -> None:
    """The scores of a model as it is, and their line in the results."""
    val = captions(options.data / "dev.json", options.data)
    val = val[: _SHORT["val_limit"]] if options.short else val
    name, task = called(name, options), Retrieval.from_model(model)
    log = ResultsLog(options.work / "examined" / f"{name}_{reduction}", {"name": name, "reduction": reduction})
    Evaluator(task, model, options.device).run(Loader(val, transforms(model), workers=2), log)
    photo_runs.record(RESULTS, name, options.seed, {"reduction": reduction, **summarize(task, log.rows)})


def trained(options: argparse.Namespace) -> None:
    """The dense model, trained to a cost."""
    length = _short(options) if options.short else {"epochs": 8}
    run(options, "madtp", called("trained", options), options.reduction or 0.5, length)


def ablate(options: argparse.Namespace) -> None:
    """A shorter training, with one thing changed."""
    length = _short(options) if options.short else {"epochs": 4}
    reduction = options.reduction or _ABLATED
    run(options, options.variant, called(options.variant + _cost(options), options), reduction, length)


def _cost(options: argparse.Namespace) -> str:
    """What an ablation's name says of its cost."""
    return "" if options.reduction in (None, _ABLATED) else f" to {options.reduction:.0%}"


def called(name: str, options: argparse.Namespace) -> str:
    """What a run is called in the results."""
    size = f", {options.size} px" if options.size != _SIZE else ""
    dtype = ", bf16" if options.dtype == "bfloat16" else ""
    length = f", {options.steps} steps" if options.steps != _SHORT["steps"] else _LITTLE
    return name + size + dtype + length * options.short


def run(options: argparse.Namespace, variant: str, name: str, reduction: float, length: dict[str, Any]) -> None:
    """One training of the dense model to one cost, and its line in the results. length: fields that set it."""
    own = {"model": str(_dense(options) / "model"), "freeze": _WORDS, "parts": {"at": AT}}
    summaries = 0.0 if variant == "without distillation" else 1.0
    fields = {**_own(options), **own, **length}
    config = variants.config_of(variant, reduction=reduction, distill_summaries=summaries, **fields)
    photo_runs.trained(options.work, RESULTS, name, config)


def _short(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of a short run."""
    return {**_SHORT, "steps": options.steps}


def _dense(options: argparse.Namespace) -> Path:
    """The run of the dense model of a size."""
    return options.work / ("dense" if options.size == _SIZE else f"dense_{options.size}")


def _own(options: argparse.Namespace) -> dict[str, Any]:
    return {"task": "retrieval", "dtype": options.dtype, **photo_runs.common(options)}


def ablations(options: argparse.Namespace) -> list[str]:
    """Their mean recall, how far it is from that of `madtp` and of a static count, and what they keep; nothing of none."""

    def names(ones: Sequence[str]) -> list[str]:
        return [called(one + _cost(options), options) for one in ones]

    only = names(list(variants.VARIANTS))
    apart = (
        variants.differences(RESULTS, mean_recall, *names([base]), names(variants.compared(base))) for base in _BASES
    )
    return list(filter(None, [variants.table(RESULTS, mean_recall, only), *apart, kept(only)]))


def kept(names: Sequence[str]) -> str:
    """Tokens that stay behind the last pruned block, of so many: means over instances and seeds, a line a name."""
    rows = json.loads(RESULTS.read_text())
    wide = max(32, *map(len, names))
    lines = [f"{'tokens that stay':<{wide}}{'image':>14}{'text':>14}"]
    for name in names:
        mine = [one["kept"] for one in rows if one["name"] == name]
        if mine:
            cells = (f"{_mean(mine, tower, -1):.1f} of {_mean(mine, tower, 0):.1f}" for tower in ("image", "text"))
            lines.append(f"{name:<{wide}}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines) if len(lines) > 1 else ""


def _mean(several: Sequence[dict[str, list[float]]], tower: str, place: int) -> float:
    return float(np.mean([one[tower][place] for one in several]))


def mean_recall(row: dict[str, Any]) -> float:
    """What the tables of ablations are of."""
    return row["scores"]["mean_recall"]


def table(options: argparse.Namespace) -> str:
    """R@1, 5, 10 of both directions on dev, and their mean, a line a run of this size and length; ablations left out."""
    names = {called(stage, options) for stage in _STAGES}
    rows = [row for row in json.loads(RESULTS.read_text()) if row["name"] in names]
    wide = max([23, *(len(row["name"]) for row in rows)])
    lines = ["run".ljust(wide) + " saved      MACs  text to image R@1 5 10  image to text      mean"]
    for row in sorted(rows, key=lambda row: (row["reduction"], row["name"])):
        recalls = [100 * row["scores"][f"{way}_r{k}"] for way in ("t2i", "i2t") for k in (1, 5, 10)]
        scores = "  ".join(f"{one:5.1f}" for one in [*recalls, 100 * mean_recall(row)])
        lines.append(f"{row['name']:<{wide}}{row['macs_saved']:6.1%}  {row['macs'] / 1e9:6.3f} G  {scores}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
