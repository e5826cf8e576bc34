"""Retrieval on real photographs: Flickr8k, by a dual encoder of two small trained encoders, dense and pruned.

    python benchmarks/flickr8k_retrieval.py --real REAL --data FLICKR8K --work WORK dense
    python benchmarks/flickr8k_retrieval.py --real REAL --data FLICKR8K --work WORK free
    python benchmarks/flickr8k_retrieval.py --real REAL --data FLICKR8K --work WORK trained --reduction 0.5

REAL holds the encoders' weights, as `photo_towers.py` says; FLICKR8K train.json, dev.json and images/. `dense` trains the
projections and the upper halves of both encoders on the 6,000 training photographs at 112 px, contrastively, one of the five
captions drawn a step. `free` prunes that model without training: anchors by k-means on training photographs, the knob
calibrated. `trained` trains it pruned, to one cost, its dense self as teacher. Thresholds, anchors and weights learn from
train.json; the knob is set on the first 256 records of dev.json, and R@1, 5, 10 both ways are of all its 1,000 photographs and
5,000 captions. Test captions are not read. Runs resume; results go to benchmarks/results/flickr8k_retrieval.json, and
`table` prints them. `dense` with `--epochs 4 --threads 1` took 37 minutes of a core that was not its own: text to image R@1, 5,
10 15.9, 39.9, 53.1 %, image to text 19.2, 42.8, 54.7 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photo_towers import dual_encoder

import vltprune as vp
from vltprune.budget import fit_guide
from vltprune.data import Loader, captions
from vltprune.exam import Exam, report
from vltprune.journal import Journal
from vltprune.preprocessing import transforms
from vltprune.tasks import Retrieval
from vltprune.training import CompressConfig, compress
from vltprune.training.engine import calls_of

RESULTS = Path(__file__).parent / "results" / "flickr8k_retrieval.json"
REDUCTIONS = (0.3, 0.5, 0.7, 0.8)
_LOWER = (  # what the trained encoders see first, which stays as it is
    "visual.trunk.cls_token",
    "visual.trunk.pos_embed",
    "visual.trunk.patch_embed.*",
    "visual.trunk.blocks.[0-5].*",
    "text.transformer.embeddings.*",
    "text.transformer.encoder.layer.[0-2].*",
)
_PARTS = {
    "madtp": {"guide": "codebook(anchors=100)", "keep": "ratio"},
    "madtp, DTP": {"guide": "codebook(anchors=100)"},
    "self_attention": {"guide": None, "scorer": "self_attention", "keep": "ratio"},
    "random": {"guide": None, "scorer": "random", "keep": "ratio", "reducer": "drop"},
}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    stages = {"dense": dense, "free": free, "trained": trained, "table": lambda options: print(table())}
    stages[options.stage](options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["dense", "free", "trained", "table"])
    parser.add_argument("--real", type=Path, help="weights of the encoders")
    parser.add_argument("--data", type=Path, help="Flickr8k")
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--reduction", type=float, default=0.5)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def dense(options: argparse.Namespace) -> None:
    """The model that all others start from."""
    start = options.work / "start"
    if not start.is_dir():
        torch.manual_seed(options.seed)
        vp.save(dual_encoder(options.real), start)
    config = _config(options, start, reduction=0.0, rate=2e-4, warmup=0.1)
    done = compress(config, options.work / "dense")
    assert done is not None
    _record("dense", options.seed, done.rows[-1])


def free(options: argparse.Namespace) -> None:
    """The trained dense model, pruned without training, by several scores."""
    records, val = (captions(options.data / f"{split}.json", options.data) for split in ("train", "dev"))
    for name, parts in _PARTS.items():
        model = vp.prune(vp.load(options.work / "dense" / "model"), vp.preset("madtp").replace(**parts))
        task, prepare = Retrieval.of(model), transforms(model)
        if parts["guide"] is not None:
            drawn = np.random.default_rng(options.seed).permutation(len(records))[:256]
            fit_guide(model, calls_of(task, [records[int(i)] for i in drawn], prepare), options.seed)
        knob_calls = calls_of(task, val[:256], prepare)
        for reduction in REDUCTIONS:
            try:
                vp.calibrate(model, knob_calls, reduction)
            except vp.BudgetError as error:
                print(name, error)
                continue
            journal = Journal(options.work / "free" / f"{name}_{reduction}", {"name": name, "reduction": reduction})
            Exam(task, model).sit(Loader(val, prepare, workers=2), journal)
            _record(f"free, {name}", options.seed, {"reduction": reduction, **report(task, journal.rows)})


def trained(options: argparse.Namespace) -> None:
    """The dense model, trained to a cost."""
    parts = {"guide": "codebook(anchors=100)", "keep": "learned"}
    config = _config(
        options,
        options.work / "dense" / "model",
        reduction=options.reduction,
        parts=parts,
        budget="learned",
        rate=1e-4,
        warmup=0.05,
        distil=1.0,
        distil_summaries=1.0,
    )
    done = compress(config, options.work / f"trained_{options.reduction:g}_{options.seed}")
    assert done is not None
    _record("trained", options.seed, done.rows[-1])


def _config(options: argparse.Namespace, model: Path, **changes: Any) -> CompressConfig:
    return CompressConfig(
        task="retrieval",
        model=str(model),
        data=str(options.data / "train.json"),
        val=str(options.data / "dev.json"),
        images=str(options.data),
        freeze=_LOWER,
        epochs=options.epochs,
        batch_size=100,
        weight_decay=0.05,
        augment=True,
        seed=options.seed,
        checkpoint_every=60,
        log_every=20,
        **changes,
    )


def _record(name: str, seed: int, row: dict[str, Any]) -> None:
    """A line of the results, instead of an older one of the same run."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    key = {"name": name, "seed": seed, "reduction": row["reduction"]}
    results = [one for one in results if {field: one[field] for field in key} != key]
    results.append({**key, "macs_saved": row["macs_saved"], "macs": row["macs"], "scores": row["scores"]})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def table() -> str:
    """R@1, 5, 10 of both directions on dev, a line a run."""
    lines = []
    for one in sorted(json.loads(RESULTS.read_text()), key=lambda one: (one["reduction"], one["name"])):
        scores = "  ".join(f"{100 * one['scores'][f'{way}_r{k}']:5.1f}" for way in ("t2i", "i2t") for k in (1, 5, 10))
        lines.append(f"{one['name']:<26}{one['macs_saved']:6.1%}  {one['macs'] / 1e9:6.3f} G  {scores}")
    return "\n".join(["run                        saved      MACs  text to image R@1 5 10  image to text", *lines])


if __name__ == "__main__":
    main()
