"""What each part of the method is worth on synthetic pairs: short trainings with one thing changed.

    OMP_NUM_THREADS=1 python benchmarks/ablate_nlvr_tiny.py --work WORK --variant madtp --seed 0

Every run starts from the packaged dense `blip_nlvr_tiny`, trains 1,500 steps of 8 pairs with 8 sentences each towards 80 %
fewer MACs, the image tower pruned at its first three blocks, is calibrated on validation to that cost and to others, and is
scored there, on 1,200 pairs that the calibration's 256 are part of. The test split is not read. A run resumes from WORK. About
25 minutes of one core each, and 10 to be examined. `--steps 300` goes into its name, and is examined at 80 % alone: six
minutes of one core, 71.9 ± 1.0 % of three seeds. With `--long`, which is for a GPU (four minutes on an H200, beside a dozen
other runs), it trains 1,300 steps of 32 pairs at twice the rate, and its name has a star; `--long --steps 400` takes two
minutes there. `--reduction 0.5` trains to another cost, and is examined at that.

    python benchmarks/ablate_nlvr_tiny.py --table

prints what benchmarks/results/ablate_nlvr_tiny.json has of such runs, with `--long`, `--steps` or `--reduction` of those: mean
and standard deviation over the seeds that were run, and how far below `madtp` each is, seed by seed. Variants "by temperature"
keep DTP's budget as paper and reference do; those "without maps" have none in front of the guide's anchors, either. What fades
prunes most at first, and "at the first block" hardly behind it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import variants

import vltprune as vp
from vltprune.data import Loader
from vltprune.evaluation.evaluator import Evaluator, summarize
from vltprune.evaluation.results_log import ResultsLog
from vltprune.evaluation.tasks import Nlvr
from vltprune.io.preprocessing import transforms
from vltprune.training import CompressConfig, CompressResult, compress
from vltprune.training.data.calibration import calibration_batches

RESULTS = Path(__file__).parent / "results" / "ablate_nlvr_tiny.json"

_REDUCTION = 0.8
_OTHERS = (0.3, 0.5, 0.7, 0.85)  # costs that a model of the full length is examined at besides its own
_SHORT = {"steps": 1500, "batch_size": 8}
_LONG = {"steps": 1300, "batch_size": 32, "lr": 2e-4}


@dataclass(frozen=True)
class Training:
    """How all variants of a table are trained. steps: another number of them than its own."""

    long: bool = False
    steps: int | None = None
    reduction: float = _REDUCTION

    def config(self, variant: str, seed: int) -> CompressConfig:
        """The config of a variant."""
        config = variants.config_of(
            variant,
            task="nlvr",
            model="blip_nlvr_tiny",
            pretrained=True,
            data="synthetic:train:16000x8",
            val="synthetic:val:1200",
            parts={"at": {"image": (0, 1, 2)}},
            reduction=self.reduction,
            checkpoint_every=250,
            seed=seed,
            **(_LONG if self.long else _SHORT),
        )
        return config.replace(steps=self.steps) if self.steps else config

    def called(self, variant: str) -> str:
        """What a run is called in the results."""
        cost = "" if self.reduction == _REDUCTION else f" to {self.reduction:.0%}"
        return variant + cost + "*" * self.long + (f", {self.steps} steps" if self.steps else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--variant", choices=variants.VARIANTS, default="madtp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long", action="store_true", help="the training for a GPU")
    parser.add_argument("--steps", type=int, help="another number of them")
    parser.add_argument("--reduction", type=float, default=_REDUCTION, help="the share of MACs to save")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    options = parser.parse_args()
    training = Training(options.long, options.steps, options.reduction)
    if options.table:
        only = {"dense", *map(training.called, variants.VARIANTS)}
        return print(variants.table(RESULTS, accuracy, only), *apart(training), sep="\n\n")
    if options.work is None:
        parser.error("--work DIR is needed for a run")
    torch.set_num_threads(options.threads)
    run(options.work, options.variant, options.seed, training)


def run(work: Path, variant: str, seed: int, training: Training) -> None:
    """One run, and its lines in the results."""
    name = training.called(variant)
    done = compress(training.config(variant, seed), work / f"{name.replace(' ', '_')}_{seed}")
    assert done is not None
    there = [row["reduction"] for row in done.rows]
    others = () if training.steps or training.reduction != _REDUCTION else _OTHERS
    for row in [*done.rows, *(_served(done, cost) for cost in others if cost not in there)]:
        if row is None:
            continue
        line = {
            "name": name if row["reduction"] else "dense",
            "seed": seed if row["reduction"] else 0,
            "reduction": row["reduction"],
        }
        line |= {"macs_saved": row["macs_saved"], "accuracy": row["scores"]["accuracy"]}
        variants.record(RESULTS, ("name", "seed", "reduction"), line)


def apart(training: Training) -> list[str]:
    """How far runs are below `madtp`, below the best static count, and twins below theirs."""
    told = []
    for base in ("madtp", "static count at the first block", "madtp by temperature", "madtp without maps"):
        some = list(map(training.called, variants.compared(base)))
        told.append(variants.differences(RESULTS, accuracy, training.called(base), some))
    return list(filter(None, told))


def accuracy(row: dict[str, Any]) -> float:
    """What the tables are of."""
    return row["accuracy"]


def _served(done: CompressResult, reduction: float) -> dict[str, Any] | None:
    """A row of the trained model at another cost, that it is calibrated to; None where that is out of its reach."""
    val = Nlvr.load_records("synthetic:val:1200", "")
    task, prepare = Nlvr.from_model(done.model), transforms(done.model)
    device = next(done.model.parameters()).device
    try:
        vp.calibrate(done.model, calibration_batches(task, val[:256], prepare, device), reduction)
    except vp.BudgetError as error:
        return print(error)
    log = ResultsLog(done.folder / "served" / f"{reduction:g}", {"reduction": reduction})
    Evaluator(task, done.model, str(device)).run(Loader(val, prepare, workers=2), log)
    return {"reduction": reduction, **summarize(task, log.rows)}


if __name__ == "__main__":
    main()
