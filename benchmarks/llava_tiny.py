"""What `llava_tiny` answers with half, a quarter and an eighth of its visual tokens, by every preset, without training.

    OMP_NUM_THREADS=1 python benchmarks/llava_tiny.py --record [--presets fastv vtw]
    OMP_NUM_THREADS=1 python benchmarks/llava_tiny.py --table

Presets that prune between image tower and language model keep the same count of each image, 32, 16 and 8 of 64. Those that
prune layers of the language model prune as published, and calibrated on validation pairs to the same shares as means over
layers, where their layers come early enough.

Accuracy is of the test split, a statement a pair. Visual tokens, of both images, and MACs of image tower and prompt are those
of `vp.visual_tokens` on the first 128 pairs. Times are of a batch of 16 pairs on one thread, over
the dense model's of the same turn, medians of turns: of the first new token, and of each that follows. --record replaces the
rows of the same names in results/llava_tiny.json, and --resume leaves out what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import variants

import vltprune as vp
from vltprune.demo.vlm import StatementBatch, evaluate_models, statement_batches, time_models
from vltprune.utils.table import table

RESULTS = Path(__file__).parent / "results" / "llava_tiny.json"
CELLS, TIMED = 64, 16  # visual tokens of an image; pairs of the timed batch
SHARES = (50, 25, 12.5)
OUTPUT = ("random", "pooling", "fastervlm", "visionzip", "prumerge", "vispruner", "divprune", "cdpruner", "hiprune")
OUTPUT += ("vscan", "dart", "scissor", "flowcut")
LANGUAGE = ("fastv", "pyramiddrop", "sparsevlm", "vtw")
FIXED = "vtw"  # keeps none, and has no knob
DENSE = "dense"


def build(dense: Any, presets: list[str]) -> dict[str, Any]:
    """The models by name, the dense one first."""
    models = {DENSE: dense}
    for preset in presets:
        torch.manual_seed(0)
        if preset in LANGUAGE:
            models[preset] = vp.prune(dense, preset)
        for share in SHARES if preset != FIXED else ():
            try:
                models[f"{preset}, {share:g} %"] = kept(dense, preset, share)
            except vp.BudgetError as reason:
                print(f"skipped: {preset} at {share:g} %: {reason}")
    return models


def kept(dense: Any, preset: str, share: float) -> Any:
    """A preset that keeps a share of the visual tokens, in per cent."""
    if preset not in LANGUAGE:
        return vp.prune(dense, preset, **parts(preset, round(CELLS * share / 100)))
    model = vp.prune(dense, preset)
    inputs = [batch.inputs for batch in statement_batches("val", 64)]
    vp.calibrate(model, inputs, visual_tokens=2 * CELLS * share / 100, tolerance=0.02)
    return model


def parts(preset: str, count: int) -> dict[str, Any]:
    """What of a preset is replaced to keep a count of each image's visual tokens."""
    if preset == "flowcut":
        return {"keep": f"entropy(count={float(count)})"}
    return {"keep": f"count(count={count})", "place": "output", "at": None}


def measure(name: str, models: dict[str, Any], batches: list[StatementBatch], turns: int) -> dict[str, Any]:
    """The row of one of two models, the dense one and a pruned one."""
    asked = {name: models[name]} if name != DENSE else models
    result = evaluate_models(asked, batches)[name]
    row = {"name": name, "accuracy": round(result.accuracy, 4), "visual_tokens": round(result.visual_tokens, 1)}
    row |= {"tower_mmacs": round(result.tower / 1e6, 1), "prefill_mmacs": round(result.prefill / 1e6, 1)}
    if turns:
        timed = statement_batches("test", TIMED)[0].inputs
        seconds = time_models(models, timed, turns, new_tokens=4)
        for part, kind in enumerate(("first", "next")):
            ratios = [one[part] / dense[part] for one, dense in zip(seconds[name], seconds[DENSE], strict=True)]
            row[f"{kind}_time"] = round(statistics.median(ratios), 3)
    return row


def lines() -> list[list[str]]:
    """The recorded rows as a table, those of one preset in turn."""
    order = [DENSE, *OUTPUT, *LANGUAGE]
    rows = json.loads(RESULTS.read_text())
    rows.sort(key=lambda row: (_place(row["name"], order), -row["visual_tokens"]))
    header = ["preset", "accuracy", "visual tokens", "MMACs, tower", "prompt", "first token", "next"]
    found = [header]
    for row in rows:
        cells = [f"{100 * row['accuracy']:.1f}", f"{row['visual_tokens']:.0f}"]
        cells += [f"{row[f'{part}_mmacs']:.0f}" for part in ("tower", "prefill")]
        cells += [f"{row[f'{part}_time']:.2f}" if f"{part}_time" in row else "" for part in ("first", "next")]
        found.append([row["name"], *cells])
    return found


def _place(name: str, order: list[str]) -> int:
    preset = name.partition(",")[0]
    return order.index(preset) if preset in order else len(order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=[*OUTPUT, *LANGUAGE], help="which (all)")
    parser.add_argument("--pairs", type=int, default=1200, help="test pairs (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="timed turns; 0 times nothing (%(default)s)")
    parser.add_argument("--record", action="store_true", help="keep the rows under results/")
    parser.add_argument("--resume", action="store_true", help="leave out what is recorded already")
    parser.add_argument("--table", action="store_true", help="print what there is, and run nothing")
    args = parser.parse_args()
    if not args.table:
        torch.set_num_threads(1)
        batches, dense = statement_batches("test", args.pairs), vp.create_model("llava_tiny", pretrained=True)
        first = vp.prune(dense, "fastervlm")
        there = {row["name"] for row in json.loads(RESULTS.read_text())} if args.resume and RESULTS.exists() else set()
        for name, model in build(dense, args.presets).items():
            if name in there:
                continue
            models = {DENSE: dense, name: model} if name != DENSE else {DENSE: dense, "": first}
            row = measure(name, models, batches, args.turns)
            print(json.dumps(row), flush=True)
            if args.record:
                variants.record(RESULTS, ("name",), row)
    if args.table or args.record:
        print(table(lines()))


if __name__ == "__main__":
    main()
