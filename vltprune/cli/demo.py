"""vltprune demo: compares the shipped model, dense and pruned, on synthetic NLVR; prints a table, writes a report."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ..cost.calibration import calibrate
from ..demo import report
from ..demo.examples import Example, select_examples
from ..demo.measure import ModelResult, evaluate_models, generate_batches, speedup, time_models
from ..evaluation.results_log import write_json
from ..models.factory import create_model
from ..pruning.model import PrunedModel, check_pruned
from ..pruning.prune import prune_towers
from ..pruning.tower import pruned_depths
from ..utils.files import replacing, write_text
from ..utils.progress import bar
from ..utils.table import table
from ..viz import kept_tokens
from . import common, demo_vlm, options

DENSE = "dense"
_BACKBONE = "blip_nlvr_tiny"
_TARGETS = {"p70": 0.7, "p80": 0.8}
_CALIBRATION_PAIRS, _TIMED_PAIRS, _BATCH_SIZE = 96, 320, 16
_ILLUSTRATED = ("MADTP 80 %, trained", "random 80 %, untrained", "MADTP 70 %, trained")


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    """Adds the parser of `vltprune demo`.

    Args:
        commands: the subparsers of the command line.
        parents: the parsers with the options that every command has, then with those of commands that compute.
    """
    parser = commands.add_parser(
        "demo", parents=parents, help="compare dense, MADTP and random pruning on synthetic pairs; no download"
    )
    parser.add_argument(
        "--output",
        type=options.output,
        default="demo",
        metavar="DIR",
        help="folder for report.html, kept.png and results.json (demo)",
    )
    parser.add_argument(
        "--vlm",
        action="store_true",
        help="compare on llava_tiny, a vision-language model of transformers; writes vlm.png and vlm.json",
    )
    parser.add_argument("--pairs", type=options.positive, default=1800, help="held-out pairs, one question each (1800)")
    parser.add_argument("--seed", type=options.seed, default=0, help="seed of the generated pairs (0)")
    common.add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs `vltprune demo` with its parsed arguments."""
    if args.vlm:
        return demo_vlm.run(args)
    folder = common.output_folder(args.output)
    common.use_threads(args.threads)
    models = build_models(args.seed, args.device, args.dtype)
    with bar("generating pairs", args.pairs) as shown:
        batches = generate_batches("test", args.pairs, args.seed, _BATCH_SIZE, shown.update)
    with bar("answering", args.pairs * len(models)) as shown:
        results = evaluate_models(models, batches, shown.update)

    timed = batches[: max(_TIMED_PAIRS // _BATCH_SIZE, 1)]
    with bar("timing", len(timed) * len(models)) as shown:
        seconds = time_models(models, timed, shown.update)
    results = {name: replace(result, seconds=seconds[name]) for name, result in results.items()}

    examples = select_examples(models, batches, results, _ILLUSTRATED)
    print(table(report.table(results, DENSE)))
    print(f"\n{report.TRAINING_NOTE}")
    _write(folder, results, examples, args)
    print(
        f"\nwrote {folder / 'report.html'} (open it in a browser), {folder / 'kept.png'} and {folder / 'results.json'}"
    )


def build_models(seed: int = 0, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    """The demo's models by name: dense, MADTP at two costs, and random pruning calibrated to the same costs.

    Args:
        seed: the seed of the calibration pairs.
        device: where the models run.
        dtype: the models' dtype; None for float32.

    Returns:
        The models by name, the dense one first.
    """
    dense = create_model(_BACKBONE, pretrained=True).to(device, dtype)
    models = {DENSE: dense}
    for tag, target in _TARGETS.items():
        madtp = check_pruned(create_model(f"{_BACKBONE}_madtp.{tag}", pretrained=True).to(device, dtype))
        models[f"MADTP {100 * target:.0f} %, trained"] = madtp
        models[f"random {100 * target:.0f} %, untrained"] = _random(dense, madtp, seed, target)
        if tag == "p80":
            host = madtp.pruning.host
            models[f"random {100 * target:.0f} %, MADTP's weights"] = _random(host, madtp, seed, target)
    return models


def _random(dense: nn.Module, madtp: PrunedModel, seed: int, target: float) -> PrunedModel:
    """Random pruning of the image tower in the blocks where MADTP prunes it, at the target's cost.

    Words stay: with random words gone the baseline would be weaker still.
    """
    blocks = pruned_depths(madtp.pruning.towers["image"])
    model = prune_towers(dense, "random", at={"image": blocks})
    batches = [batch.inputs_for(model) for batch in generate_batches("val", _CALIBRATION_PAIRS, seed, 32)]
    common.say(f"vltprune: calibrating random pruning to {100 * target:.0f} % fewer MACs")
    calibrate(model, batches, target)
    return model


def _write(
    folder: Path, results: Mapping[str, ModelResult], examples: Sequence[Example], args: argparse.Namespace
) -> None:
    threads = torch.get_num_threads()
    write_text(folder / "report.html", report.page(results, examples, DENSE, args.seed, threads))
    with replacing(folder / "kept.png") as part:
        _kept_image(examples).save(part, "png")
    numbers = {
        "pairs": len(results[DENSE].labels),
        "seed": args.seed,
        "threads": threads,
        "device": args.device,
        "models": {name: _numbers(result, results[DENSE]) for name, result in results.items()},
    }
    write_json(folder / "results.json", numbers)


def _kept_image(examples: Sequence[Example]) -> Image.Image:
    """What each layer kept of the spatial example, with its sentence and prediction above."""
    example = next((example for example in examples if example.family == "spatial"), examples[0])
    name = _ILLUSTRATED[0]
    probability = example.probabilities[name]
    prediction = f"{str(probability > 0.5).lower()}, confidence {max(probability, 1 - probability):.1%}"
    title = f'{name}. "{example.sentence}": {prediction}'
    return kept_tokens.stack_strips([example.strips[name]], [title])


def _numbers(result: ModelResult, dense: ModelResult) -> dict[str, object]:
    return {
        "accuracy": result.accuracy,
        "accuracy_by_family": result.accuracy_by_family(),
        "macs_per_sentence": result.macs,
        "macs_saved": result.macs_saved,
        "padding": result.padding,
        "tokens_kept": {tower: list(tokens) for tower, tokens in result.kept.items()},
        "seconds_per_batch": statistics.median(result.seconds),
        "speedup": speedup(result.seconds, dense.seconds),
    }
