"""Trains `llava_tiny` with pruning, to the MACs that its presets have at 50, 25 and 12.5 % of the visual tokens.

    OMP_NUM_THREADS=1 python benchmarks/compress_llava_tiny.py --work WORK --share 25 [--preset madtp]

    OMP_NUM_THREADS=1 python benchmarks/compress_llava_tiny.py --work WORK --share 12.5 --place both

A run starts from the packaged weights and trains 200 steps of 32 pairs, a statement each, taught by the dense model. A run
that was stopped goes on from WORK. At its end a row goes to results/llava_tiny.json, beside those of `llava_tiny.py`: MACs are
those of `fastervlm` there. At --place output visual tokens then are as many, too. In blocks of the image tower, layers of
the language model or both they are as many as are left at that cost; layers alone do not reach that of 12.5 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import llava_tiny
import torch
import variants

import vltprune as vp
from vltprune.training import CompressConfig, compress

REDUCTION = {
    50: 0.271,
    25: 0.391,
    12.5: 0.448,
}  # of the MACs of tower and prompt, that `fastervlm` saves, by share of visual tokens
PLACES: dict[str, dict[str, Any]] = {
    "output": {"place": "output", "at": None},
    "blocks": {"at": {"image": (1, 2, 3)}},  # of five that run
    "layers": {"at": {"language": (0, 1, 2, 3)}},  # of six
    "both": {"at": {"image": (4,), "language": (0, 1, 2, 3)}},
}


def config_of(args: argparse.Namespace) -> CompressConfig:
    """The config of a run."""
    return CompressConfig(
        task="nlvr",
        model="llava_tiny",
        pretrained=True,
        data=f"synthetic:train:{args.drawn}",
        val="synthetic:val:128",
        preset=args.preset,
        parts=PLACES[args.place] | ({"guide": "codebook(anchors=32)"} if args.preset == "madtp" else {}),
        reduction=REDUCTION[args.share],
        steps=args.steps,
        batch_size=32,
        lr=args.rate,
        ramp=0.3,
        distill=1.0,
        saliency=args.saliency,
        workers=0,
        checkpoint_every=50,
        seed=args.seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--share", type=float, choices=llava_tiny.SHARES, default=25, help="of visual tokens, in %%")
    parser.add_argument("--preset", default="madtp")
    parser.add_argument("--place", choices=PLACES, default="layers")
    parser.add_argument("--saliency", type=float, default=0.0, help="weight of teaching the scores (%(default)s)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--drawn", type=int, default=16_000, help="pairs, which the steps' are taken from (%(default)s)"
    )
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=5, help="timed turns; 0 times nothing (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)

    where = f"{args.preset} {args.place}" + (", scores taught" if args.saliency else "")
    folder = f"{where} {args.share:g} {args.steps} {args.rate} {args.seed}".replace(" ", "_").replace(",", "")
    done = compress(config_of(args), args.work / folder, device="cpu")
    assert done is not None
    models: dict[str, Any] = {llava_tiny.DENSE: vp.create_model("llava_tiny", pretrained=True)}
    name = f"{where}, trained {args.steps} steps at {args.rate:g}, {args.share:g} %"
    row = llava_tiny.measure(
        name, models | {name: done.model}, llava_tiny.statement_batches("test", 1200), turns=args.turns
    )
    print(json.dumps(row))
    variants.record(llava_tiny.RESULTS, ("name",), row)


if __name__ == "__main__":
    main()
