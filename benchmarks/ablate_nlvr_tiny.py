"""Ablations of the method on drawn image pairs: the same short training with one thing changed, a run a variant and seed.

    OMP_NUM_THREADS=1 python benchmarks/ablate_nlvr_tiny.py --work WORK --variant learned --seed 0

Every run starts from the packaged dense `blip_nlvr_tiny`, trains 2,000 steps of 8 pairs with 8 sentences each towards 80 %
fewer MACs, is calibrated on validation, and is scored there, on 1,200 pairs that the calibration's 256 are part of. The test
split is not read. A run resumes from WORK. About 20 minutes of one core each.

    python benchmarks/ablate_nlvr_tiny.py --table

prints benchmarks/results/ablate_nlvr_tiny.json as a table: mean and standard deviation over the seeds that were run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from vltprune.training import CompressConfig, compress

RESULTS = Path(__file__).parent / "results" / "ablate_nlvr_tiny.json"
_FEW = {"image": (0, 1), "text": (2, 3)}  # depths

# what each variant changes: fields of the config, and parts of the pruner
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "learned dtp": {"parts": {"keep": "threshold"}},
    "controller": {"budget": "controller", "parts": {"keep": "threshold"}},
    "controller, few depths": {"budget": "controller", "parts": {"keep": "threshold", "at": _FEW}},
    "no distillation": {"distil": 0.0},
    "distil summaries too": {"distil_summaries": 1.0},
    "no guide": {"parts": {"guide": None, "scorer": "self_attention"}},
    "no alignment": {"align": 0.0},
    "random": {"budget": "controller", "parts": {"guide": None, "scorer": "random", "keep": "ratio"}},
    "static count": {"budget": "controller", "parts": {"keep": "ratio"}},
    "drop": {"parts": {"reducer": "drop"}},
    "self_attention": {"parts": {"scorer": "self_attention"}},
    "cls_attention": {"parts": {"scorer": "cls_attention"}},
    "alignment": {"parts": {"scorer": "alignment"}},
    "sparsemax": {"parts": {"guide": "codebook(anchors=32, attend='sparsemax')", "keep": "threshold"}},
    "8 anchors": {"parts": {"guide": "codebook(anchors=8)"}},
    "100 anchors": {"parts": {"guide": "codebook(anchors=100)"}},
}


def config_of(variant: str, seed: int) -> CompressConfig:
    """The config of a variant: the common one, changed."""
    changed = dict(VARIANTS[variant])
    parts = {"guide": "codebook(anchors=32)", "keep": "learned", **changed.pop("parts", {})}
    common: dict[str, Any] = dict(
        task="nlvr",
        model="blip_nlvr_tiny",
        data="synthetic:train:16000x8",
        val="synthetic:val:1200",
        reduction=0.8,
        serve=(0.5, 0.7),
        steps=2000,
        batch_size=8,
        rate=1e-4,
        warmup=0.05,
        ramp=0.4,
        distil=1.0,
        budget="learned",
        checkpoint_every=200,
        seed=seed,
    )
    return CompressConfig.from_dict({**common, **changed, "parts": parts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--variant", choices=VARIANTS, default="learned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    options = parser.parse_args()
    if options.table:
        return print(table())
    if options.work is None:
        parser.error("--work DIR is needed for a run")
    torch.set_num_threads(options.threads)
    run(options.work, options.variant, options.seed)


def run(work: Path, variant: str, seed: int) -> None:
    """One run, and its line in the results."""
    done = compress(config_of(variant, seed), work / f"{variant.replace(' ', '_')}_{seed}")
    assert done is not None
    found = {row["reduction"]: (row["scores"]["accuracy"], row["macs_saved"]) for row in done.rows}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    results = [one for one in results if (one["variant"], one["seed"]) != (variant, seed)]
    results.append({"variant": variant, "seed": seed, "accuracy": {str(r): a for r, (a, _) in found.items()}})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def table() -> str:
    """Accuracy on validation, a line a variant, a column a share of MACs saved."""
    results = json.loads(RESULTS.read_text())
    shares = sorted({share for one in results for share in one["accuracy"]})
    lines = ["variant".ljust(24) + "runs  " + "".join(f"{float(share):.0%} fewer".rjust(16) for share in shares)]
    for variant in VARIANTS:
        mine = [one["accuracy"] for one in results if one["variant"] == variant]
        if mine:
            cells = [_cell([100 * one[share] for one in mine if share in one]) for share in shares]
            lines.append(variant.ljust(24) + f"{len(mine):4d}  " + "".join(cell.rjust(16) for cell in cells))
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "out of reach"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
