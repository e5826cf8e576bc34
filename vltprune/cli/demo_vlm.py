"""vltprune demo --vlm: compares the shipped vision-language model, dense and pruned; prints a table, draws what was read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image

from ..data import SyntheticPairs
from ..data.llava import llava_processor, statement_inputs
from ..demo.measure import speedup
from ..demo.vlm import VlmResult, evaluate_models, placed, statement_batches, time_models
from ..evaluation.results_log import write_json
from ..models.factory import create_model
from ..pruning.prune import prune_towers
from ..pruning.trace import collect
from ..utils.files import replacing
from ..utils.progress import bar
from ..utils.table import table
from ..viz.kept_tokens import stack_strips
from ..viz.prompts import draw_prompt
from . import common

_BACKBONE, _DENSE = "llava_tiny", "dense"
_COUNTS = {"random": (32,), "vispruner": (32, 16)}  # presets before the language model, tokens an image
_INSIDE = ("fastv", "pyramiddrop", "vtw")  # and those inside it
_DRAWN = ("vispruner, 32 of 64", "pyramiddrop")
_TURNS, _TIMED = 3, 16  # and pairs of the timed batch

NOTE = "No preset was trained. Tokens are of both images, means over layers of the language model; MACs are of a whole prompt."


def run(args: argparse.Namespace) -> None:
    """Runs `vltprune demo --vlm` with its parsed arguments."""
    folder = common.output_folder(args.output)
    common.use_threads(args.threads)
    models = build_models(args.device, args.dtype)
    with bar("generating pairs", args.pairs) as shown:
        batches = statement_batches("test", args.pairs, args.seed, _TIMED, shown.update)
    with bar("answering", args.pairs * len(models)) as shown:
        results = evaluate_models(models, batches, shown.update)
    with bar("timing", (_TURNS + 1) * len(models)) as shown:
        seconds = time_models(models, batches[0].inputs, _TURNS, tick=shown.update)

    print(table(_rows(results, seconds)))
    print(f"\n{NOTE}")
    with replacing(folder / "vlm.png") as part:
        draw_example(models, args.seed).save(part, "png")
    numbers = {
        "pairs": args.pairs,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "models": {name: asdict(result) | _speedups(seconds, name) for name, result in results.items()},
    }
    write_json(folder / "vlm.json", numbers)
    print(f"\nwrote {folder / 'vlm.png'} and {folder / 'vlm.json'}")


def build_models(device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The demo's models by name, the dense one first. All share its weights.

    Args:
        device: where the models run.
        dtype: the models' dtype; None for float32.
    """
    dense: Any = create_model(_BACKBONE, pretrained=True).to(device, dtype)
    models = {_DENSE: dense}
    for preset, counts in _COUNTS.items():
        for count in counts:
            torch.manual_seed(0)
            models[f"{preset}, {count} of 64"] = prune_towers(
                dense, preset, keep=f"count(count={count})", place="output"
            )
    return models | {preset: prune_towers(dense, preset) for preset in _INSIDE}


@torch.no_grad()
def draw_example(models: Mapping[str, Any], seed: int = 0) -> Image.Image:
    """What some models read of the first test pair, and what they say of it.

    Args:
        models: the models by name, of `build_models`.
        seed: the seed of the pairs.
    """
    pair, processor = SyntheticPairs("test", 1, seed)[0], llava_processor()
    inputs = statement_inputs([pair.images], pair.sentences[0], processor)
    images, drawn = [Image.fromarray(image) for image in pair.images], []
    for name in _DRAWN:
        model = models[name]
        given = placed(model, inputs)
        with collect(threads=False) as traces:
            said = model.generate(**given, max_new_tokens=4, do_sample=False)
        answer = processor.decode(said[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        truth = "right" if answer == str(bool(pair.labels[0])).lower() else "wrong"
        drawn.append(draw_prompt(images, traces, f"{name}: “{pair.sentences[0]}”", f"{answer} ({truth})"))
    return stack_strips(drawn, legend=False)


def _rows(results: Mapping[str, VlmResult], seconds: Mapping[str, list[tuple[float, float]]]) -> list[list[str]]:
    rows = [["model", "accuracy", "visual tokens", "MMACs", "saved", "speed-up, first token", "later tokens"]]
    dense = results[_DENSE]
    for name, result in results.items():
        macs, whole = result.tower + result.prefill, dense.tower + dense.prefill
        speedups = (f"{factor:.2f} x" for factor in _speedups(seconds, name).values())
        cells = [
            f"{result.accuracy:.1%}",
            f"{result.visual_tokens:.0f}",
            f"{macs / 1e6:.0f}",
            f"{1 - macs / whole:.1%}",
        ]
        rows.append([name, *cells, *speedups])
    return rows


def _speedups(seconds: Mapping[str, list[tuple[float, float]]], name: str) -> dict[str, float]:
    """How many times as fast as the dense model."""
    first, later = (
        speedup([turn[part] for turn in seconds[name]], [turn[part] for turn in seconds[_DENSE]]) for part in (0, 1)
    )
    return {"first_token_speedup": first, "later_token_speedup": later}
