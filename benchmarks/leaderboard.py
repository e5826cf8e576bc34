"""Leaderboard: every preset for towers of one modality, without training, at 30, 50 and 70 % fewer MACs, on four tasks.

    OMP_NUM_THREADS=1 python benchmarks/leaderboard.py run --real REAL --flickr FLICKR8K --work WORK
    python benchmarks/leaderboard.py page

REAL holds the encoders' weights, as `photo_towers.py` says; FLICKR8K train.json, dev.json and images/. WORK keeps what is
computed once, in four CPU minutes: the projections of the retrieval model, trained on 3,000 photographs. `run` appends a line
a cell to benchmarks/results/leaderboard.jsonl, and runs only cells that it lacks: presets that were registered or changed
since. Lines with `error` say why a cell has no number. `--tasks`, `--presets` and `--reductions` select cells. `page` writes
the tables and the chart of docs/leaderboard.md.

Every preset is calibrated on 10 instances (25 captions) that are not measured, to within 2 % of the MACs that remain, or 6 %
where whole tokens do not allow it. MACs and tokens are counted on the measured instances. A preset that prunes behind the
tower prunes behind the block at a quarter of the depth instead, since it would save nothing within the tower. `random` is a
mean of two seeds. Time is CPU time of one thread, pruned over dense, in turn on each of the two largest batches; their
median. Expected: a cell takes 3 to 8 s of one core; docs/leaderboard.md has the numbers.
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
from leaderboard_tasks import TASKS, Task, train_retrieval
from torch import Tensor, nn

import vltprune as vp
from vltprune.evaluation.ablation_grid import Cell

RESULTS = Path(__file__).parent / "results" / "leaderboard.jsonl"
REDUCTIONS = (0.5, 0.7, 0.3)  # in the order in which they run
BASELINE, SEEDS = "random", (0, 1)
_TOLERANCE, _WIDER = 0.02, 0.06  # relative, of the MACs that remain
_TIMED = 2  # batches
_INSIDE = 0.25  # of the depth, where presets prune that are published for a tower's output

# the tasks' models have towers of one modality
_PRESETS = [name for name in vp.presets.names() if not vp.preset(name).needs_modalities]

Row = dict[str, Any]


def main() -> None:
    options = _options()
    if options.stage == "page":
        return leaderboard_page.write(read_rows(RESULTS), leaderboard_page.PAGE)
    torch.set_num_threads(1)
    train_retrieval(options)
    tasks = {name: TASKS[name](options) for name in options.tasks}
    for reduction in options.reductions:
        for name, task in tasks.items():
            run(name, task, options.presets or _PRESETS, [reduction], RESULTS)


def run(name: str, task: Task, presets: Sequence[str], reductions: Sequence[float], file: Path) -> None:
    """Runs the cells of a task that a results file lacks, and appends a line for each.

    Args:
        name: the task's name in the lines.
        task: the task.
        presets: names of presets.
        reductions: fractions of the dense MACs to save.
        file: the results, one JSON object a line.
    """
    done = {_key(row) for row in read_rows(file)}
    for cell in cells(presets, reductions):
        config = inside(cell.config)
        row = {"task": name, "preset": cell.preset, "reduction": cell.reduction, "seed": cell.seed}
        row |= {"moved": config != cell.config, "config": digest(config)}
        if _key(row) in done:
            continue
        row |= measured(task, config, cell)
        _append(file, row)
        print(_line(row), flush=True)


def cells(presets: Sequence[str], reductions: Sequence[float]) -> Iterator[Cell | Dense]:
    """The cells of a task, the dense model first; the baseline has several seeds."""
    yield Dense()
    for reduction in reductions:
        for preset in presets:
            for seed in SEEDS if preset == BASELINE else SEEDS[:1]:
                yield Cell(preset, {}, reduction, seed)


def digest(config: vp.PruneConfig) -> str:
    """What tells a config from those that a preset had before."""
    return hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class Dense:
    """The cell of the dense model: all tokens stay."""

    preset: str = "dense"
    reduction: float = 0.0
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


def measured(task: Task, config: vp.PruneConfig, cell: Cell | Dense) -> Row:
    """Scores, costs and time of a cell, or the error for which it has none."""
    torch.manual_seed(cell.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vp.UntrainedGuideWarning)
            model = vp.prune(task.dense, config)
        if config.guide is not None:
            vp.fit_guide(model, task.calibration, seed=cell.seed, progress=False)
        if cell.reduction:
            calibrated(task, model, cell.reduction)
        row = scored(task, model)
    except Exception as error:  # whatever it is, it is this cell's, and the others may run
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    keep = [stage.describe("keep") for stage in model.pruning.config.stages]
    return {**row, "keep": "; ".join(keep)}


def calibrated(task: Task, model: nn.Module, reduction: float) -> None:
    """Sets the model to a cost, with the wider tolerance where whole tokens of short inputs allow no closer one.

    The first batch suffices where counts do not depend on what an instance shows.
    """
    with contextlib.suppress(vp.BudgetError):
        vp.calibrate(model, task.calibration[:1], reduction, _TOLERANCE, progress=False)
        if _off(vp.measure(model, task.calibration), reduction) <= _TOLERANCE:
            return
    try:
        vp.calibrate(model, task.calibration, reduction, _TOLERANCE, progress=False)
    except vp.BudgetError as error:
        if _off(error.nearest, reduction) > _WIDER:
            raise
        vp.calibrate(model, task.calibration, reduction, _WIDER, progress=False)


def _off(found: Any, reduction: float) -> float:
    """How far MACs are from those that are to remain, relative to these."""
    return abs(found.reduction - reduction) / (1 - reduction)


@torch.no_grad()
def scored(task: Task, model: nn.Module) -> Row:
    """Scores of all measured instances, costs, tokens that enter each layer and leave the last, and relative time."""
    meter, outputs, times = vp.CostMeter(model), [], []
    macs = dense = instances = 0.0
    lengths: dict[str, list[Tensor]] = {}
    timed = sorted(range(len(task.batches)), key=lambda one: -len(_first(task.batches[one])))[:_TIMED]
    for index, batch in enumerate(task.batches):
        start = time.process_time()
        with vp.collect() as traces:
            outputs.append(task.embed(model, batch))
        spent = time.process_time() - start
        if index in timed:
            task.embed(task.dense, batch)
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
    errors = {name: round(one.std().item() / len(one) ** 0.5, 5) for name, one in values.items()}
    scores = {name: round(one.mean().item(), 5) for name, one in values.items()}
    return {"scores": scores, "errors": errors, **costs, "tokens": tokens}


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
    parser.add_argument("--work", type=Path, help="folder for what is computed once")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--presets", nargs="+", help="all registered ones where none is named")
    parser.add_argument("--reductions", nargs="+", type=float, default=list(REDUCTIONS))
    options = parser.parse_args()
    folders = ("real", "flickr", "work")
    if options.stage == "run" and (missing := [name for name in folders if getattr(options, name) is None]):
        parser.error(f"run needs {', '.join('--' + name for name in missing)}")
    return options


if __name__ == "__main__":
    main()
