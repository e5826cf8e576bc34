"""Compresses `blip_nlvr_tiny` to a share of its MACs, and writes the weights that the package carries.

    OMP_NUM_THREADS=1 python benchmarks/compress_nlvr_tiny.py --work WORK --reduction 0.8
    OMP_NUM_THREADS=1 python benchmarks/compress_nlvr_tiny.py --work WORK --reduction 0.8 --ship

Starts from the packaged dense model, which is also its teacher, and trains on 64,000 drawn pairs with 8 sentences each: tokens
kept softly at every depth of both towers, thresholds learnt under a loss on the expected MACs. No target but the sentences'
labels and the dense model's answers. The knob is set, and everything is chosen, on the validation split. `--ship` then reads
the test split, 1,200 pairs with 6 sentences each, and puts the weights into the package, as fp16. A run resumes from WORK.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from nlvr_tiny_pairs import Drawn
from train_nlvr_tiny import score

import vltprune as vp
from vltprune.models import zoo
from vltprune.training import CompressConfig, compress


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    folder = options.work / f"compress_{options.reduction:g}"
    done = compress(config_of(options), folder)
    assert done is not None
    for row in done.rows:
        print(
            f"{row['reduction']:.0%} asked, {row['macs_saved']:.1%} saved: validation {row['scores']['accuracy']:.4f}"
        )
    if options.ship:
        ship(vp.load(folder / "model"), options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs, and for the test pairs once drawn")
    parser.add_argument("--reduction", type=float, required=True, help="share of the dense MACs to save")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ship", action="store_true", help="read the test split, and write the package's weights")
    return parser.parse_args()


def config_of(options: argparse.Namespace) -> CompressConfig:
    """The run's config."""
    return CompressConfig(
        task="nlvr",
        model="blip_nlvr_tiny",
        data="synthetic:train:64000x8",
        val="synthetic:val:1800",
        reduction=options.reduction,
        parts={"guide": "codebook(anchors=32)", "keep": "learned(threshold=0.1)"},
        budget="learned",
        ramp=0.4,
        steps=options.steps,
        batch_size=16,
        rate=options.rate,
        warmup=0.05,
        distil=1.0,
        checkpoint_every=100,
    )


def ship(model: Any, options: argparse.Namespace) -> None:
    """The weights to the package, and what they score on test, beside the dense ones."""
    name = f"blip_nlvr_tiny_madtp.p{round(100 * options.reduction)}"
    vp.save(model, zoo.WEIGHTS / name, dtype=torch.float16)
    test = Drawn(options.work, "test", 1200, 6)
    dense = vp.create_model("blip_nlvr_tiny", pretrained=True)
    report = {"dense": score(dense, test), name: score(vp.create_model(name, pretrained=True), test)}
    print(json.dumps(report, indent=1))
    (options.work / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
