"""Ablations of the method on drawn image pairs: the same short training with one thing changed, a run a variant and seed.

    OMP_NUM_THREADS=1 python benchmarks/ablate_nlvr_tiny.py --work WORK --variant madtp --seed 0

Every run starts from the packaged dense `blip_nlvr_tiny`, trains 1,500 steps of 8 pairs with 8 sentences each towards 80 %
fewer MACs, the image tower pruned at its first three blocks, is calibrated on validation to that cost and to others, and is
scored there, on 1,200 pairs that the calibration's 256 are part of. The test split is not read. A run resumes from WORK. About
25 minutes of one core each, and 10 to be examined. `--steps 300` goes into its name, and is examined at 80 % alone: six
minutes of one core, 71.9 ± 0.6 % of three seeds. With `--long`, which is for a GPU (four minutes on an H200, beside a dozen
other runs), it trains 1,300 steps of 32 pairs at twice the rate, and its name has a star; `--long --steps 400` takes two
minutes there. Every variant with a guide can be run "without maps" in front of the guide's anchors.

    python benchmarks/ablate_nlvr_tiny.py --table

prints what benchmarks/results/ablate_nlvr_tiny.json has of such runs, with `--long` and `--steps` of those: mean and standard
deviation over the seeds that were run, and how far below `madtp` each is, seed by seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import variants

import vltprune as vp
from vltprune.data import Loader
from vltprune.exam import Exam, report
from vltprune.journal import Journal
from vltprune.preprocessing import transforms
from vltprune.tasks import Nlvr
from vltprune.training import CompressConfig, compress
from vltprune.training.calls import calls_of
from vltprune.training.compression import Compressed

RESULTS = Path(__file__).parent / "results" / "ablate_nlvr_tiny.json"


_OTHERS = (0.3, 0.5, 0.7, 0.85)  # costs that a model of the full length is examined at besides its own
_SHORT = {"steps": 1500, "batch_size": 8}
_LONG = {"steps": 1300, "batch_size": 32, "rate": 2e-4}


def config_of(variant: str, seed: int, long: bool = False) -> CompressConfig:
    """The config of a variant."""
    return variants.config_of(
        variant,
        task="nlvr",
        model="blip_nlvr_tiny",
        data="synthetic:train:16000x8",
        val="synthetic:val:1200",
        parts={"at": {"image": (0, 1, 2)}},
        reduction=0.8,
        checkpoint_every=250,
        seed=seed,
        **(_LONG if long else _SHORT),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--variant", choices=variants.VARIANTS, default="madtp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long", action="store_true", help="the training for a GPU")
    parser.add_argument("--steps", type=int, help="another number of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    options = parser.parse_args()
    if options.table:
        only = {"dense", *(called(variant, options.long, options.steps) for variant in variants.VARIANTS)}
        return print(variants.table(RESULTS, accuracy, only), *apart(options.long, options.steps), sep="\n\n")
    if options.work is None:
        parser.error("--work DIR is needed for a run")
    torch.set_num_threads(options.threads)
    run(options.work, options.variant, options.seed, options.long, options.steps)


def run(work: Path, variant: str, seed: int, long: bool = False, steps: int | None = None) -> None:
    """One run, and its lines in the results."""
    name = called(variant, long, steps)
    config = config_of(variant, seed, long)
    done = compress(config.replace(steps=steps) if steps else config, work / f"{name.replace(' ', '_')}_{seed}")
    assert done is not None
    there = [row["reduction"] for row in done.rows]
    others = () if steps else _OTHERS
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


def apart(long: bool, steps: int | None) -> list[str]:
    """How far runs are below `madtp`, and its twins below theirs."""
    told = []
    for base in ("madtp", "madtp by temperature", "madtp without maps"):
        some = [called(variant, long, steps) for variant in variants.compared(base)]
        told.append(variants.differences(RESULTS, accuracy, called(base, long, steps), some))
    return list(filter(None, told))


def accuracy(row: dict[str, Any]) -> float:
    """What the tables are of."""
    return row["accuracy"]


def called(variant: str, long: bool, steps: int | None) -> str:
    """What a run is called in the results."""
    return variant + "*" * long + (f", {steps} steps" if steps else "")


def _served(done: Compressed, reduction: float) -> dict[str, Any] | None:
    """A row of the trained model at another cost, that it is calibrated to; None where that is out of its reach."""
    val = Nlvr.read("synthetic:val:1200", "")
    task, prepare = Nlvr.of(done.model), transforms(done.model)
    device = next(done.model.parameters()).device
    try:
        vp.calibrate(done.model, calls_of(task, val[:256], prepare, device), reduction)
    except vp.BudgetError as error:
        return print(error)
    journal = Journal(done.folder / "served" / f"{reduction:g}", {"reduction": reduction})
    Exam(task, done.model, str(device)).sit(Loader(val, prepare, workers=2), journal)
    return {"reduction": reduction, **report(task, journal.rows)}


if __name__ == "__main__":
    main()
