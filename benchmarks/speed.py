"""Speed of pruned models: wall-clock speed-up over the dense model, and how much of the saving in MACs it is.

    python benchmarks/speed.py                                  # about 6 minutes on two cores
    python benchmarks/speed.py --batch 1 --reductions 0.8

A timm ViT with random weights at batch 8, pruned by `madtp` scores and fused, with per-instance counts drawn at random
around a mean (`random_ratio`, spread 0.25) that is calibrated to the asked reduction on the same images. Dense is timm's own
forward with its fused attention. Dense and pruned runs alternate in one process; medians are compared, and only ratios
are printed. Expected on 2 cores (AVX2 or AVX-512, fp32): realized 0.95 or more at 50 % and at 80 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vltprune as vp


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", vp.UntrainedGuideWarning)

    dense = timm.create_model(options.model).eval()
    images = torch.randn(options.batch, 3, *dense.patch_embed.img_size)
    rows = []
    for reduction in options.reductions:
        model = vp.prune(dense, "madtp", keep=f"random_ratio(half_width={options.spread})")
        found = vp.calibrate(model, [images], reduction)
        rows.append(_row(dense, model, images, found, options.repeats))
        print(_line(options, rows[-1]), flush=True)
    if options.output:
        Path(options.output).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_384")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--spread", type=float, default=0.25)
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", help="also write the rows to this JSON file")
    return parser.parse_args()


@torch.inference_mode()
def _row(dense: nn.Module, model: nn.Module, images: Tensor, found: Any, repeats: int) -> dict[str, float]:
    with vp.collect() as traces:
        model(images)
    lengths = torch.tensor(traces[0].lengths, dtype=torch.float32)
    for warm in (dense, model):
        warm(images)
    pairs = [(_seconds(dense, images), _seconds(model, images)) for _ in range(repeats)]
    speedup = statistics.median(d for d, _ in pairs) / statistics.median(p for _, p in pairs)
    mac_speedup = found.dense_macs / found.macs
    return {
        "reduction": found.reduction,
        "mac_speedup": mac_speedup,
        "wall_speedup": speedup,
        "realized": speedup / mac_speedup,
        "wall_speedup_min": min(d / p for d, p in pairs),
        "wall_speedup_max": max(d / p for d, p in pairs),
        "tokens_spread_last": float(lengths[-1].std(correction=0) / lengths[-1].mean()),
    }


def _seconds(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def _line(options: argparse.Namespace, row: dict[str, float]) -> str:
    return (
        f"{options.model} batch {options.batch}: {row['reduction']:.1%} fewer MACs ({row['mac_speedup']:.2f}x), "
        f"{row['wall_speedup']:.2f}x faster (pairs {row['wall_speedup_min']:.2f} .. {row['wall_speedup_max']:.2f}), "
        f"realized {row['realized']:.2f}"
    )


if __name__ == "__main__":
    main()
