"""Trains the presets that are meant to be trained for a short time on synthetic pairs, beside random choice.

    python benchmarks/trained_presets.py --work WORK --preset dynamicvit
    python benchmarks/trained_presets.py --work WORK --preset dynamicvit --steps 1 --rate 1e-12
    python benchmarks/trained_presets.py --table

A run trains `blip_nlvr_tiny` from its packaged dense weights to 60 % fewer MACs: 200 steps of 8 pairs with 8 sentences each at
rate 1e-4, the image tower pruned at its first three blocks, with the losses that docs/compress.md names. The knob is set on
validation pairs; accuracy is of 480 of them, with a standard error of about 2 points. The second command is the same without
training. A run takes about five minutes of one CPU thread. `--table` prints benchmarks/results/trained_presets.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import variants

from vltprune.training import CompressConfig, compress

RESULTS = Path(__file__).parent / "results" / "trained_presets.json"
AT = {"at": {"image": (0, 1, 2)}}
LEARNED: dict[str, Any] = {"budget": "learned", "ramp": 0.0}
# what docs/compress.md says to write
RECIPES: dict[str, dict[str, Any]] = {
    "random": {"parts": AT},
    "ltp": {**LEARNED, "parts": AT},
    "asvit": {**LEARNED, "parts": AT, "distill": 0.5, "distill_tokens": 0.5},
    "dynamicvit": {**LEARNED, "parts": AT, "losses": {"keep_ratio": 2.0}, "distill": 0.5, "distill_tokens": 0.5},
    # tokens stay in part in training, where the papers mask them
    "asvit relaxed": {
        **LEARNED,
        "parts": {**AT, "keep": "learned(threshold=-0.5, hard=False)"},
        "distill": 0.5,
        "distill_tokens": 0.5,
    },
    "dynamicvit relaxed": {
        **LEARNED,
        "parts": {**AT, "keep": "sampled_ratio(ratio=0.7, hard=False)"},
        "losses": {"keep_ratio": 2.0},
        "distill": 0.5,
        "distill_tokens": 0.5,
    },
    # in random towers halting probabilities are small: the gain and center of A-ViT are for DeiT
    "avit": {
        **LEARNED,
        "parts": {**AT, "scorer": "halting(gain=2.0, center=2.0)"},
        "losses": {"ponder": 5e-4, "halting_prior": 0.1},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--preset", choices=RECIPES, default="dynamicvit")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    options = parser.parse_args()
    if options.table:
        return print(variants.table(RESULTS, lambda row: row["accuracy"]))
    if options.work is None:
        parser.error("--work DIR is needed for a run")
    torch.set_num_threads(1)
    run(options)


def config_of(preset: str, steps: int, rate: float, seed: int) -> CompressConfig:
    """The config of a run."""
    return CompressConfig(
        task="nlvr",
        model="blip_nlvr_tiny",
        pretrained=True,
        data="synthetic:train:1600x8",
        val="synthetic:val:480",
        preset=preset.partition(" ")[0],
        reduction=0.6,
        steps=steps,
        batch_size=8,
        lr=rate,
        saliency=0.0,
        seed=seed,
        workers=0,
        **RECIPES[preset],
    )


def run(options: argparse.Namespace) -> None:
    """One run, and its line in the results; the dense model's too."""
    name = f"{options.preset}, {options.steps} steps" if options.steps > 1 else f"{options.preset}, untrained"
    config = config_of(options.preset, options.steps, options.rate, options.seed)
    done = compress(config, options.work / f"{name.replace(', ', '_').replace(' ', '_')}_{options.seed}")
    if done is None:  # a process that is not the first
        return
    for row, called in zip(done.rows, ["dense", name], strict=True):
        line = {"name": called, "seed": options.seed if called == name else 0, "reduction": row["reduction"]}
        if row["kept"]:  # tokens that enter each image block, and that leave the last one
            line["tokens"] = [round(count, 1) for count in row["kept"]["image"]]
        line |= {"macs_saved": row["macs_saved"], "macs": row["macs"], "accuracy": row["scores"]["accuracy"]}
        variants.record(RESULTS, ("name", "seed", "reduction"), line)


if __name__ == "__main__":
    main()
