"""vltprune demo: the shipped model on pairs it has never seen, dense and pruned: a table, and a report with pictures."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..demo import report
from ..demo.measure import Outcome, Questions, draw, evaluate, race, relative_time
from ..evaluation.results_log import write_json
from ..models.factory import create_model
from ..pruning.prune import prune_towers
from ..pruning.trace import PruneTrace, collect
from ..utils.files import write_text
from ..viz import kept_tokens
from . import common, options

DENSE = "dense"
_BACKBONE = "blip_nlvr_tiny"
_TARGETS = {"p70": 0.7, "p80": 0.8}
_CALIBRATION_PAIRS, _RACING_PAIRS, _BATCH = 96, 320, 16
_EXAMPLES = 8
_PICTURED = ("MADTP 80%", "random 80%", "MADTP 70%")


def add(commands: common.Subparsers, parents: Sequence[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo", parents=parents, help="compare dense, MADTP and random pruning on synthetic pairs; no download"
    )
    parser.add_argument(
        "--output",
        type=options.output,
        default="demo",
        metavar="DIR",
        help="folder for report.html and results.json (demo)",
    )
    parser.add_argument("--pairs", type=options.positive, default=1800, help="held-out pairs, one question each (1800)")
    parser.add_argument("--seed", type=options.seed, default=0, help="another seed draws other pairs (0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    folder = common.output_folder(args.output)
    common.use_threads(args.threads)
    models = contestants(args.seed)
    with common.bar("drawing pairs", args.pairs) as bar:
        batches = draw("test", args.pairs, args.seed, _BATCH, bar.update)
    with common.bar("answering", args.pairs * len(models)) as bar:
        outcomes = evaluate(models, batches, bar.update)

    lap = batches[: max(_RACING_PAIRS // _BATCH, 1)]
    with common.bar("timing", len(lap) * len(models)) as bar:
        times = race(models, lap, bar.update)
    outcomes = {name: outcome.timed(times[name]) for name, outcome in outcomes.items()}

    examples = pick(models, batches, outcomes)
    print(common.table(report.columns(outcomes, DENSE)))
    _write(folder, outcomes, examples, args)
    print(f"\nwrote {folder / 'report.html'} (open it in a browser) and {folder / 'results.json'}")


def contestants(seed: int = 0) -> dict[str, nn.Module]:
    """The demo's models by name: dense, MADTP at two budgets, and random pruning calibrated to the same budgets."""
    models = {DENSE: create_model(_BACKBONE, pretrained=True)}
    calibration = [batch.inputs for batch in draw("val", _CALIBRATION_PAIRS, seed, 32)]
    for tag, target in _TARGETS.items():
        madtp: Any = create_model(f"{_BACKBONE}_madtp.{tag}", pretrained=True)
        models[f"MADTP {target:.0%}"] = madtp
        models[f"random {target:.0%}"] = _random(models[DENSE], madtp, calibration, target)
        if tag == "p80":
            models[f"random {target:.0%}, tuned weights"] = _random(madtp.pruning.host, madtp, calibration, target)
    return models


def _random(dense: nn.Module, madtp: Any, calibration: Sequence[Any], target: float) -> nn.Module:
    """Random pruning of the image tower at the depths where MADTP prunes it, at the target's cost.

    Words stay: with random words gone the baseline would be weaker still.
    """
    depths = tuple(int(depth) for depth in madtp.pruning.towers["image"].pruners)
    model = prune_towers(dense, "random", at={"image": depths})
    common.calibrate(model, calibration, target, f"calibrating random pruning to {target:.0%}")
    return model


def pick(
    models: Mapping[str, nn.Module], batches: Sequence[Questions], outcomes: Mapping[str, Outcome]
) -> list[report.Example]:
    """The first question of each family, then the first of the others: no choice is made by how it was answered."""
    families = next(iter(outcomes.values())).families
    first = {family: families.index(family) for family in dict.fromkeys(families)}
    rest = [i for i in range(len(families)) if i not in first.values()]
    chosen = [*first.values(), *rest][: max(_EXAMPLES, len(first))]
    return [_example(models, batches, outcomes, question) for question in chosen]


def _example(
    models: Mapping[str, nn.Module], batches: Sequence[Questions], outcomes: Mapping[str, Outcome], question: int
) -> report.Example:
    batch, place = batches[question // _BATCH], question % _BATCH
    one = batch.only(place)
    pictures = [Image.fromarray(side) for side in one.pictures[0]]
    films, words = {}, {}
    for name in _PICTURED:
        with torch.no_grad(), collect(threads=False) as traces:
            models[name](*one.inputs)
        for trace in traces:
            if trace.tower == "image":
                films[name] = kept_tokens.record_strip(pictures, trace)
            else:
                words[name] = kept_words(one.sentences[0], trace)
    answers = {name: float(outcome.chance[question]) for name, outcome in outcomes.items()}
    return report.Example(one.sentences[0], one.families[0], bool(one.labels[0]), answers, films, words)


def kept_words(sentence: str, trace: PruneTrace) -> list[tuple[str, kept_tokens.TokenState]]:
    """The words of the first sentence of a traced batch, and what had become of each after the last layer."""
    last = kept_tokens.instance_states(trace, 0)[-1]
    words = [*sentence.lower().strip().removesuffix(".").split(), "[SEP]"]
    return [(word, kept_tokens.TokenState(fate)) for word, fate in zip(words, last.tolist(), strict=True)][:-1]


def _write(folder: Path, outcomes: Mapping[str, Outcome], examples: Sequence[report.Example], args: Any) -> None:
    questions, threads = len(outcomes[DENSE].labels), torch.get_num_threads()
    error = (outcomes[DENSE].accuracy * (1 - outcomes[DENSE].accuracy) / questions) ** 0.5
    notes = (
        f"Measured on {questions:,} synthetic pairs (test split, seed {args.seed}), one sentence each; the accuracy has a "
        f"standard error of about {error:.1%}. MACs are multiply-accumulates of matrix products, pruning's own included, on "
        f"the patches and words that are there; the dense model spends {outcomes[DENSE].padding / 1e9:.3f} G a sentence more "
        "on padding, which counts neither as spent nor as saved. "
        f"Time is the median over batches of {_BATCH} sentences, relative to the dense model on the same batch, all models "
        f"taking turns; {threads} thread{'s' * (threads > 1)}. Random pruning leaves the sentence alone, prunes the "
        "pictures at the layers where MADTP does, and is calibrated on other pairs to the same MACs; 'tuned weights' are "
        "those that were trained under MADTP.",
    )
    write_text(folder / "report.html", report.page(outcomes, examples, DENSE, notes))
    results = {
        "pairs": questions,
        "seed": args.seed,
        "threads": threads,
        "models": {name: _numbers(outcome, outcomes[DENSE]) for name, outcome in outcomes.items()},
    }
    write_json(folder / "results.json", results)


def _numbers(outcome: Outcome, dense: Outcome) -> dict[str, Any]:
    return {
        "accuracy": outcome.accuracy,
        "accuracy_by_family": outcome.by_family(),
        "macs_per_sentence": outcome.macs,
        "macs_saved": outcome.saved,
        "padding": outcome.padding,
        "tokens_kept": {tower: list(sizes) for tower, sizes in outcome.kept.items()},
        "seconds_per_batch": statistics.median(outcome.seconds),
        "time_relative_to_dense": relative_time(outcome.seconds, dense.seconds),
    }
