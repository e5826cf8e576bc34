"""Leaderboard: every preset for towers of one modality, without training, at 30, 50 and 70 % fewer MACs, on four tasks.

    OMP_NUM_THREADS=1 python benchmarks/leaderboard.py run --real REAL --flickr FLICKR8K --cifar CIFAR10 --work WORK
    python benchmarks/leaderboard.py page

REAL holds the encoders' weights, as `photo_towers.py` says; FLICKR8K train.json, dev.json and images/; CIFAR10 train/ and
dev/, with a folder of images for each class. WORK keeps what is computed once, in eight CPU minutes: projections of the
retrieval model, trained on 3,000 photographs, and the training images of the k-nearest-neighbor classifier, which the dense
model embeds. `run` appends a line a cell to benchmarks/results/leaderboard.jsonl, and runs only cells that it lacks: presets
that were registered or changed since. Lines with `error` say why a cell has no number. `--tasks`, `--presets` and
`--reductions` select cells. `page` writes the tables and charts of docs/leaderboard.md.

Every preset is calibrated on 10 pairs or photographs (captions of the commonest lengths) that are not measured, to within 2 %
of the MACs that remain, or as near as whole tokens allow, up to 6 %. MACs and tokens are counted on the measured instances. A
preset that prunes behind the tower prunes behind the block at a quarter of the depth instead, since it would save nothing
within the tower. `random` is a mean of two seeds. `resize` is the dense model for smaller images, of all square patch grids the
one nearest to the MACs. Time is CPU time of one thread, pruned over dense, in turn on each of the two largest batches; their
median. Expected: a cell takes 5 to 15 s of one core; docs/leaderboard.md has the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import leaderboard_page
import torch
from leaderboard_board import BASELINE, DENSE, RESIZE, pack
from leaderboard_tasks import TASKS, Task
from torch import Tensor, nn

import vltprune as vp
from vltprune.evaluation.ablation_grid import Cell

RESULTS = Path(__file__).parent / "results" / "leaderboard.jsonl"
REDUCTIONS = (0.5, 0.7, 0.3)  # in the order in which they run
SEEDS = (0, 1)  # of random choice
_TOLERANCE, _WIDER = 0.02, 0.06  # relative, of the MACs that remain
_TIMED = 2  # batches
_INSIDE = 0.25  # of the depth, where presets prune that are published for a tower's output
_SIZES = 7  # that the search for a cost tries


Row = dict[str, Any]


def main() -> None:
    options = _options()
    if options.stage == "page":
        return leaderboard_page.write(read_rows(RESULTS), leaderboard_page.PAGE)
    torch.set_num_threads(1)
    tasks = {name: TASKS[name](options) for name in options.tasks}
    for reduction in options.reductions:
        for name, task in tasks.items():
            run(name, task, options.presets or vp.presets.names(), [reduction], RESULTS)


def run(name: str, task: Task, presets: Sequence[str], reductions: Sequence[float], file: Path) -> None:
    """Runs the cells of a task that a results file lacks, and appends a line for each.

    Args:
        name: the task's name in the lines.
        task: the task.
        presets: names of presets.
        reductions: fractions of the dense MACs to save.
        file: the results, one JSON object a line.
    """
    known = {_key(row): row for row in read_rows(file)}
    dense_macs = None
    for cell in cells(presets, reductions):
        config = inside(cell.config)
        row = {"task": name, "preset": cell.preset, "reduction": cell.reduction, "seed": cell.seed}
        row |= {"moved": config != cell.config, "config": digest(config)}
        if _key(row) not in known:
            row |= measured(task, config, cell, dense_macs)
            known[_key(row)] = row
            _append(file, row)
            print(_line(row), flush=True)
        if cell.preset == DENSE:
            dense_macs = known[_key(row)].get("macs")


def cells(presets: Sequence[str], reductions: Sequence[float]) -> Iterator[Cell | Whole]:
    """The cells of a task, the dense model first; the baseline has several seeds."""
    yield Whole(DENSE, 0.0)
    for reduction in reductions:
        yield Whole(RESIZE, reduction)
        for preset in presets:
            for seed in SEEDS if preset == BASELINE else SEEDS[:1]:
                yield Cell(preset, {}, reduction, seed)


def digest(config: vp.PruneConfig) -> str:
    """What tells a config from those that a preset had before."""
    return hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class Whole:
    """A cell that prunes no token: the dense model, or the one for smaller images."""

    preset: str
    reduction: float
    seed: int = 0

    @property
    def config(self) -> vp.PruneConfig:
        """A pruning that keeps all tokens."""
        return vp.PruneConfig(scorer="random", keep="ratio(ratio=1.0)")


def inside(config: vp.PruneConfig) -> vp.PruneConfig:
    """The config, with stages behind the tower moved behind the block at a quarter of the depth."""
    if all(stage.place != "output" for stage in config.stages):
        return config

    def moved(stage: vp.Stage) -> vp.Stage:
        return dataclasses.replace(stage, place="block", at=_INSIDE) if stage.place == "output" else stage

    return config.with_stages(map(moved, config.stages))


def measured(task: Task, config: vp.PruneConfig, cell: Cell | Whole, dense_macs: float | None) -> Row:
    """Scores, costs and time of a cell, or the error for which it has none.

    Args:
        task: the task.
        config: what the cell prunes.
        cell: the cell.
        dense_macs: MACs of an instance by the dense model, which the cell of a smaller input compares with.
    """
    torch.manual_seed(cell.seed)
    try:
        if cell.preset == RESIZE:
            return smaller(task, config, cell.reduction, dense_macs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vp.UntrainedGuideWarning)
            model = vp.prune(task.dense, config)
        guide = model.pruning.guide
        if guide is not None and guide.is_untrained:
            vp.fit_guide(model, task.calibration, seed=cell.seed, progress=False)
        if isinstance(cell, Cell):
            calibrated(task, model, cell.reduction)
        row = scored(task, model, task.batches)
    except Exception as error:  # whatever it is, it is this cell's, and the others may run
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    keep = [stage.describe("keep") for stage in model.pruning.config.stages]
    return {**row, "keep": "; ".join(keep)}


def smaller(task: Task, config: vp.PruneConfig, reduction: float, dense_macs: float | None) -> Row:
    """The row of the dense model for smaller images, of all square patch grids the one nearest to a cost."""
    if task.resized is None or dense_macs is None:
        raise ValueError("texts have no smaller size")
    low, high, found = 0.0, 1.0, []
    for _ in range(_SIZES):
        ratio = (low + high) / 2
        dense, batches = task.resized(ratio)
        model = vp.prune(dense, config)
        saved = 1 - vp.measure(model, batches[:1]).macs / dense_macs
        found.append((abs(saved - reduction), ratio, model, batches))
        low, high = (ratio, high) if saved > reduction else (low, ratio)
    _, ratio, model, batches = min(found, key=lambda one: one[0])
    row = scored(task, model, batches)
    costs = {"dense_macs": dense_macs, "macs_saved": round(1 - row["macs"] / dense_macs, 4)}
    return {**row, **costs, "keep": f"resized(ratio={ratio})"}


def calibrated(task: Task, model: nn.Module, reduction: float) -> None:
    """Sets the model to a cost, or as near as whole tokens of short inputs allow, up to the wider tolerance.

    The first batch suffices where counts do not depend on what an instance shows.
    """
    with contextlib.suppress(vp.BudgetError):
        vp.calibrate(model, task.calibration[:1], reduction, _TOLERANCE, progress=False)
        if _off(vp.measure(model, task.calibration), reduction) <= _TOLERANCE:
            return
    try:
        vp.calibrate(model, task.calibration, reduction, _TOLERANCE, progress=False)
    except vp.BudgetError as error:
        nearest = error.nearest
        if nearest.value is None or _off(nearest, reduction) > _WIDER:
            raise
        # leaves the knob there
        vp.measure(model, task.calibration, nearest.value)


def _off(found: Any, reduction: float) -> float:
    """How far MACs are from those that are to remain, relative to these."""
    return abs(found.reduction - reduction) / (1 - reduction)


@torch.no_grad()
def scored(task: Task, model: nn.Module, batches: Sequence[Any]) -> Row:
    """Scores of all measured instances, costs, tokens that enter each layer and leave the last, and relative time.

    Args:
        task: the task.
        model: the pruned model.
        batches: what the model gets for the task's batches, which the dense model gets.
    """
    meter, outputs, times = vp.CostMeter(model), [], []
    macs = dense = instances = 0.0
    lengths: dict[str, list[Tensor]] = {}
    timed = sorted(range(len(task.batches)), key=lambda one: -len(_first(task.batches[one])))[:_TIMED]
    for index, (batch, dense_batch) in enumerate(zip(batches, task.batches, strict=True)):
        start = time.process_time()
        with vp.collect() as traces:
            outputs.append(task.embed(model, batch))
        spent = time.process_time() - start
        if index in timed:
            task.embed(task.dense, dense_batch)
            times.append(spent / (time.process_time() - start - spent))
        cost = meter(traces)
        macs, dense, instances = macs + cost.total, dense + cost.dense_total, instances + cost.instances
        for trace in traces:
            steps = [trace.input_tokens.layout.lengths, *trace.lengths]
            lengths.setdefault(trace.tower, []).append(torch.tensor(steps, dtype=torch.float64))
    tokens = {tower: torch.cat(parts, 1).mean(1).round(decimals=2).tolist() for tower, parts in lengths.items()}
    costs = {"macs": round(macs / instances), "dense_macs": round(dense / instances)}
    costs |= {"macs_saved": round(1 - macs / dense, 4), "time": round(statistics.median(times), 3)}
    values = {name: one.double() for name, one in task.score(torch.cat(outputs)).items()}
    scores = {name: round(one.mean().item(), 5) for name, one in values.items()}
    ranking = next(iter(values.values()))
    instances = {"count": len(ranking), "instances": pack(ranking.tolist())}
    return {"scores": scores, **costs, "tokens": tokens, **instances}


def _first(batch: Tensor | Sequence[Tensor]) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]


def read_rows(file: Path) -> list[Row]:
    """The lines of a results file; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _append(file: Path, row: Row) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "preset", "reduction", "seed", "config"))


def _line(row: Row) -> str:
    head = f"{row['task']:12}{row['preset']:16}{row['reduction']:4.0%}  "
    if "error" in row:
        return head + row["error"][:120]
    scores = " ".join(f"{score:.1%}" for score in row["scores"].values())
    return head + f"{scores}  {row['macs_saved']:6.1%} saved  time {row['time']:.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("run", "page"))
    parser.add_argument("--real", type=Path, help="weights of the encoders")
    parser.add_argument("--flickr", type=Path, help="the folder of Flickr8k")
    parser.add_argument("--cifar", type=Path, help="the folder of CIFAR-10")
    parser.add_argument("--work", type=Path, help="folder for what is computed once")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--presets", nargs="+", help="all registered ones where none is named")
    parser.add_argument("--reductions", nargs="+", type=float, default=list(REDUCTIONS))
    options = parser.parse_args()
    folders = ("real", "flickr", "cifar", "work")
    if options.stage == "run" and (missing := [name for name in folders if getattr(options, name) is None]):
        parser.error(f"run needs {', '.join('--' + name for name in missing)}")
    return options


if __name__ == "__main__":
    main()
