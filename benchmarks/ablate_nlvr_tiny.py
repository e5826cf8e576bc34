"""Ablations of the method on drawn image pairs: the same short training with one thing changed, a run a variant and seed.

    OMP_NUM_THREADS=1 python benchmarks/ablate_nlvr_tiny.py --work WORK --variant madtp --seed 0

Every run starts from the packaged dense `blip_nlvr_tiny`, trains 1,500 steps of 8 pairs with 8 sentences each towards 80 %
fewer MACs, the image tower pruned at its first three blocks, is calibrated on validation, and is scored there, on 1,200 pairs
that the calibration's 256 are part of. The test split is not read. A run resumes from WORK. About 25 minutes of one core each.
With `--long`, which is for a GPU (four minutes on an H200, beside a dozen other runs), it trains 1,300 steps of 32 pairs at
twice the rate, and its name has a star.

    python benchmarks/ablate_nlvr_tiny.py --table

prints benchmarks/results/ablate_nlvr_tiny.json: mean and standard deviation over the seeds that were run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import variants

from vltprune.training import CompressConfig, compress

RESULTS = Path(__file__).parent / "results" / "ablate_nlvr_tiny.json"


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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    options = parser.parse_args()
    if options.table:
        return print(variants.table(RESULTS, lambda row: row["accuracy"]))
    if options.work is None:
        parser.error("--work DIR is needed for a run")
    torch.set_num_threads(options.threads)
    run(options.work, options.variant, options.seed, options.long)


def run(work: Path, variant: str, seed: int, long: bool = False) -> None:
    """One run, and its lines in the results."""
    called = variant + "*" * long
    done = compress(config_of(variant, seed, long), work / f"{called.replace(' ', '_')}_{seed}")
    assert done is not None
    for row in done.rows:
        name = called if row["reduction"] else "dense"
        line = {"name": name, "seed": seed if row["reduction"] else 0, "reduction": row["reduction"]}
        line |= {"macs_saved": row["macs_saved"], "accuracy": row["scores"]["accuracy"]}
        variants.record(RESULTS, ("name", "seed", "reduction"), line)


if __name__ == "__main__":
    main()
