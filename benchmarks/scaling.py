"""Speed of a pruned ViT over the number of tokens, the batch and the spread of counts, beside the dense one.

    python benchmarks/scaling.py                                     # about 15 minutes on two cores
    python benchmarks/scaling.py --tokens 197 785 --batches 1 8 --most 50

DeiT-S with random weights at 224 to 1,024 px is pruned by `madtp` at counts drawn around a mean (benchmarks/speed.py). First
batches of 1 to 64 at each number of tokens, with ratios within .25 of their mean; then spreads of 0 to .5 at 197 tokens. What
costs the dense model more than `--most` GMACs a call is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import clock
import rivals
import speed_results
import timm
import torch
from speed_engines import start
from speed_rows import Skipped, build, subject

import vltprune as vp
from vltprune.viz import charts

_USUAL = 0.25  # the spread of the cells over tokens and batches
_PIXELS = 16  # of a side of a patch
_WIDE, _TALL, _HEAD = 620, 260, 48  # pixels of a panel's chart, and of its title and legend


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", vp.UntrainedGuideWarning)
    rows = []
    for tokens, batch, spread in cells(options.tokens, options.batches, options.spreads):
        macs = batch * dense_macs(options.model, tokens) / 1e9
        if macs > options.most:
            print(f"skipped: {tokens} tokens at batch {batch}: {macs:.0f} GMACs are more than --most {options.most:g}")
            continue
        rows += measured(options, tokens, batch, spread)
    if options.record:
        name = f"{options.model}, {options.engine}"
        speed_results.publish(speed_results.SCALING, name, rows)
        if options.engine == "eager":
            published = json.loads(speed_results.SCALING.read_text())
            speed_results.CHART.write_text(chart([row for row in published if row["name"] == name]))
    if options.output:
        cell = {"options": vars(options), "machine": clock.machine(), "rows": rows}
        Path(options.output).write_text(json.dumps(cell, indent=1) + "\n")
    if options.chart:
        Path(options.chart).write_text(chart(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="deit_small_patch16_224", help="a VisionTransformer of timm, patches of 16 px"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 401, 785, 1601, 4097])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--spreads", type=float, nargs="+", default=[0.0, 0.25, 0.5])
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--engine", default="eager", choices=("eager", "finished", "kernels"))
    parser.add_argument(
        "--most", type=float, default=320.0, help="GMACs of a dense call, above which a cell is left out"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="how long a cell is timed")
    parser.add_argument(
        "--clock", default="wall", choices=clock.TIMERS, help="'cpu' on a busy machine, with --threads 1"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chart", help="also draw the rows to this SVG file")
    parser.add_argument("--output", help="also write the rows to this JSON file")
    parser.add_argument(
        "--record",
        action="store_true",
        help="also add the rows to benchmarks/results/speed_scaling.json, and draw docs/speed.svg of those of eager PyTorch",
    )
    return parser.parse_args()


def cells(tokens: Sequence[int], batches: Sequence[int], spreads: Sequence[float]) -> list[tuple[int, int, float]]:
    """Tokens, batch and spread of each cell: the usual spread everywhere, all spreads at the fewest tokens."""
    grid = [(count, batch, _USUAL) for count in tokens for batch in batches]
    others = [(min(tokens), batch, spread) for batch in batches if batch > 1 for spread in spreads if spread != _USUAL]
    return grid + others


def image_side(tokens: int) -> int:
    """The side in pixels of the square image that gives so many tokens, the class token among them.

    Raises:
        ValueError: where no square image does.
    """
    side = math.isqrt(tokens - 1)
    if side * side + 1 != tokens:
        raise ValueError(f"tokens={tokens} must be a square and one: 197 of 224 px, 401 of 320 px, 785 of 448 px")
    return side * _PIXELS


def dense_macs(model: str, tokens: int) -> float:
    """MACs of the dense model on one image of so many tokens."""
    with torch.device("meta"):
        vit = timm.create_model(model, img_size=image_side(tokens))
    return rivals.macs(vit, rivals.counts_at(vit, 1.0))


def measured(options: argparse.Namespace, tokens: int, batch: int, spread: float) -> list[dict[str, Any]]:
    """Times a cell: the dense model beside pruned ones.

    Args:
        options: of the command line.
        tokens: that enter the first block, of each image.
        batch: images.
        spread: half the width of the interval of ratios.

    Returns:
        A record for each reduction that counts of this spread reach.
    """
    torch.manual_seed(0)
    dense = subject(options.model, batch, img_size=image_side(tokens))
    pruned = {}
    for reduction in options.reductions:
        try:
            pruned[reduction] = build("madtp", dense, reduction, spread)
        except Skipped as reason:
            print(f"skipped: {tokens} tokens, batch {batch}, spread {spread:g}, {reduction:.0%} fewer MACs: {reason}")
    models = {0.0: dense.model, **{reduction: row.model for reduction, row in pruned.items()}}
    try:
        runs = {name: start(options.engine, model, dense.inputs, Path()) for name, model in models.items()}
    except Skipped as reason:
        raise SystemExit(f"--engine {options.engine}: {reason}") from None
    calls = {name: partial(run, *dense.inputs) for name, run in runs.items()}
    times = clock.interleaved(calls, None, options.seconds, "cpu", options.clock)
    rows = []
    for reduction, row in pruned.items():
        found = clock.compare(times[0.0], times[reduction])
        rows.append(
            {
                "tokens": tokens,
                "batch": batch,
                "spread": spread,
                "reduction": reduction,
                "mac_speedup": row.mac_speedup,
                "speedup": found["speedup"],
                "realized": found["speedup"] / row.mac_speedup,
                "quartiles": [found["low"], found["high"]],
                "rounds": len(times[reduction]),
                "tokens_spread": row.spread,
            }
        )
        print(
            f"{tokens} tokens, batch {batch}, spread {spread:g}, {reduction:.0%} fewer MACs: x{found['speedup']:.2f}, "
            f"realized {rows[-1]['realized']:.2f}",
            flush=True,
        )
    return rows


def chart(rows: Sequence[dict[str, Any]]) -> str:
    """An SVG: the speed-up over tokens with a line a batch, a panel a reduction, then what is realized over the spread."""
    panels, batches = [], sorted({row["batch"] for row in rows})
    for reduction in sorted({row["reduction"] for row in rows}):
        usual = [row for row in rows if row["spread"] == _USUAL and row["reduction"] == reduction]
        title = f"{100 * reduction:.0f} % fewer MACs: speed-up by the clock over tokens of an image"
        panels.append(_panel(title, usual, batches, "tokens", "speedup"))
    fewest = min(row["tokens"] for row in rows)
    most = max(row["reduction"] for row in rows)
    several = [row for row in rows if (row["tokens"], row["reduction"]) == (fewest, most) and row["batch"] > 1]
    title = f"{100 * most:.0f} % fewer MACs, {fewest} tokens: realized share of the saving over the spread of ratios"
    panels.append(_panel(title, several, batches, "spread", "realized"))
    height = (_HEAD + _TALL) * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {height}" font-family="sans-serif" font-size="11">'
        f'<rect width="{_WIDE}" height="{height}" fill="white"/>'
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate(0 {index * (_HEAD + _TALL)})">{panel}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(title: str, rows: Sequence[dict[str, Any]], batches: Sequence[int], across: str, up: str) -> str:
    parts = [f'<text x="8" y="16" font-weight="bold">{title}</text>']
    lines = []
    for index, batch in enumerate(batches):
        color = charts.series_color(index)
        points = sorted((row[across], row[up]) for row in rows if row["batch"] == batch)
        if not points:
            continue
        lines.append(charts.Line(points, color, mark=charts.series_mark(index)))
        parts.append(f'<text x="{8 + 90 * index}" y="34" fill="{color}">batch {batch}</text>')
    axes = _axis(across, (row[across] for row in rows)), charts.Axis.from_values((row[up] for row in rows), zero=True)
    drawn = charts.chart(lines, *axes, title, (_WIDE, _TALL))
    return "".join([*parts, f'<svg y="{_HEAD}" width="{_WIDE}" height="{_TALL}">{drawn}</svg>'])


def _axis(name: str, values: Iterable[float]) -> charts.Axis:
    """The horizontal axis, labeled at what was measured; tokens on a logarithmic scale."""
    held = sorted(set(values))
    low, high = (held[0], held[-1]) if len(held) > 1 else (held[0] / 2, held[0] * 2 or 1)
    return charts.Axis(low, high, {value: f"{value:,g}" for value in held}, log=name == "tokens")


if __name__ == "__main__":
    main()
