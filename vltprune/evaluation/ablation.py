"""Ablations: one model pruned in many ways to equal cost, each scored, counted and timed against the dense model."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import torch
from torch import nn

from ..core import precision
from ..cost.calibration import calibrate
from ..cost.guide_fit import fit_guide
from ..cost.inputs import Batch, Inputs, model_inputs, run_batch
from ..cost.macs import CostMeter
from ..cost.sample_cost import keep_all
from ..data import Loader
from ..data.records import R
from ..pruning.model import get_pruning, is_pruned
from ..pruning.prune import prune_towers
from ..pruning.trace import PruneTrace, collect
from ..utils.files import write_text
from ..utils.modes import evaluating
from ..utils.progress import bar
from .ablation_grid import Cell, Grid
from .ablation_page import page
from .ablation_table import Summary
from .evaluator import Evaluator, summarize
from .results_log import ResultsLog, Row, write_json
from .tasks import EvaluationStage

Metric = Callable[[Any], "float | Mapping[str, float]"]
_TIMED = 4  # batches


@dataclass(frozen=True)
class Ablation:
    """The results of an ablation.

    Attributes:
        grid: The grid of its cells.
        rows: One mapping of plain JSON values a cell, in the grid's order, behind that of the dense model:

            - cell: the cell's fields; None for the dense model
            - scores: what the metric returned, by name
            - macs, dense_macs: mean multiply-accumulates of an instance, pruned and dense, without padding; macs_saved: the
              fraction that is saved
            - tokens: per tower, the mean number of tokens that entered each layer, and last of those that left the tower
            - time: time of an instance, as a fraction of the dense model's; None where it was not measured
            - keep: the keeper with the setting that was calibrated
            - error: why the cell did not run; such a row has nothing of the above but `cell`
        settings: What the results depend on besides, for the reader.
    """

    grid: Grid
    rows: Sequence[Row]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[Row]:
        """The rows of the cells that did not run."""
        return [row for row in self.rows if "error" in row]

    def markdown(self) -> str:
        """The results as a Markdown table; cells that differ in their seed alone are one row, mean ± standard deviation.

        Returns:
            The table, and below it why cells did not run.
        """
        return Summary(self.grid, self.rows).markdown()

    def save(self, folder: str | Path) -> Path:
        """Write ablation.json, ablation.csv, ablation.md and ablation.html, in place of earlier ones.

        Args:
            folder: The folder; it is created.

        Returns:
            The page ablation.html.
        """
        folder, summary = Path(folder), Summary(self.grid, self.rows)
        folder.mkdir(parents=True, exist_ok=True)
        whole = {"grid": str(self.grid), "settings": dict(self.settings), "rows": [dict(row) for row in self.rows]}
        write_json(folder / "ablation.json", whole)
        write_text(folder / "ablation.csv", summary.csv())
        write_text(folder / "ablation.md", summary.markdown())
        write_text(folder / "ablation.html", page(summary, self.settings))
        return folder / "ablation.html"


def ablate(
    model: nn.Module,
    grid: Grid | str | Mapping[str, object],
    metric: Metric,
    data: Iterable[Batch],
    *,
    inputs: Inputs = None,
    tolerance: float = 0.01,
    repeats: int = 3,
    progress: bool | None = None,
) -> Ablation:
    """Compare ways to prune a model: each cell of a grid is pruned, set to its cost, and measured.

    An untrained guide is fitted first. With `reduction` all cells are calibrated to equal mean MACs on `data`; without it they
    prune as the preset says. A cell that cannot run on this model, or cannot reach its cost, gets a row with the reason.

    Args:
        model: The dense model. It is unchanged.
        grid: Lists of values by field, {"preset": ["evit", "attention"], "reduction": [0.3, 0.5]}, or their text,
            "preset=evit,attention; reduction=0.3,0.5". Fields are `preset`, the parts that `vltprune.prune` takes, `at`,
            `reduction` and `seed`; the cells are their cross product.
        metric: Scores a model, dense or pruned: a function from the model to a number, or to numbers by name.
            `vltprune.evaluation.ablation.TaskMetric` scores a task of `vltprune eval`.
        data: Batches as `vltprune.prune` takes them: guides and costs are set on them, and costs and time measured.
        inputs: Which part of a batch the model takes, as in `vltprune.calibrate`.
        tolerance: Of the MACs that remain, relative.
        repeats: How often the first four batches are timed, dense and pruned in turn; 0 leaves time out.
        progress: Whether to show a progress bar on stderr; None shows it where stderr is a terminal.

    Returns:
        The Ablation: `.rows`, `.markdown()`, `.save(folder)`.

    Raises:
        TypeError, ValueError, LookupError: For a grid that cannot be read or built, before any work; for a pruned model, no
            batches, and what the metric raises or returns for the dense model.
    """
    if not isinstance(grid, Grid):
        grid = Grid.from_text(grid) if isinstance(grid, str) else Grid(grid)
    runner = CellRunner(model, metric, list(model_inputs(data, inputs)), tolerance, repeats)
    rows = []
    with bar("ablation", 1 + len(grid), disable=None if progress is None else not progress) as shown:
        for cell in (None, *grid):
            rows.append(runner(cell))
            shown.update()
    return Ablation(grid, rows)


class TaskMetric(Generic[R]):
    """The scores of a task on a data set, as a metric of `vltprune.ablate`."""

    def __init__(self, task: EvaluationStage[R], loader: Loader[R], device: str = "cpu") -> None:
        """Keep the arguments; records are read when a model is scored.

        Args:
            task: The task, set to the dense model.
            loader: The records and their images.
            device: The device that models run on.
        """
        self.task, self.loader, self.device = task, loader, device

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The scores of a model, shares of 1. It warns of records that could not be read, and of what cannot be scored."""
        log = ResultsLog(None, {})
        Evaluator(self.task, model, self.device).run(self.loader, log)
        summary = summarize(self.task, log.rows)
        if skipped := summary["skipped"]:
            first = f"entry {skipped[0]['index']}: {skipped[0]['skipped']}"
            warnings.warn(
                f"{len(skipped)} of {len(log.rows)} records are not scored, the first is {first}", stacklevel=2
            )
        for name, reason in summary["unscored"].items():
            warnings.warn(f"{name} is not scored: {reason}", stacklevel=2)
        return summary["scores"]


class CellRunner:
    """Runs the cells of an ablation on one model: a call prunes, calibrates and measures, and returns a row."""

    def __init__(
        self, model: nn.Module, metric: Metric, batches: Sequence[Batch], tolerance: float = 0.01, repeats: int = 3
    ) -> None:
        """Check the model and the batches.

        Args:
            model: The dense model.
            metric: As of `ablate`.
            batches: The model's inputs, as of `ablate`.
            tolerance: As of `ablate`.
            repeats: As of `ablate`.

        Raises:
            TypeError: For a pruned model.
            ValueError: For no batches.
        """
        if is_pruned(model):
            raise TypeError(
                "this model is pruned already: give its dense host, model.host, whose prunings are compared"
            )
        if not batches:
            raise ValueError("an ablation needs at least one batch of inputs, on which costs are set and measured")
        self.model, self.metric, self.batches = model, metric, batches
        self.tolerance, self.repeats = tolerance, repeats

    def __call__(self, cell: Cell | None) -> Row:
        """The row of a cell, as of `Ablation`; that of the dense model for None, whose errors are raised."""
        device = next((weight.device for weight in self.model.parameters()), torch.device("cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0 if cell is None else cell.seed)
            if cell is None:
                costs = _costs(keep_all(self.model), self.batches)
                costs |= {"macs": costs["dense_macs"], "macs_saved": 0.0}
                return {
                    "cell": None,
                    "scores": self._scores(self.model),
                    **costs,
                    "time": 1.0 if self.repeats else None,
                }
            try:
                return {"cell": cell.to_dict(), **self._run(cell)}
            except Exception as error:  # whatever it is, it is this cell's, and the others may run
                text = " ".join(str(error).split())
                return {"cell": cell.to_dict(), "error": f"{type(error).__name__}: {text}"}

    def _run(self, cell: Cell) -> dict[str, Any]:
        model = prune_towers(self.model, cell.config)
        guide = model.pruning.guide
        if guide is not None and guide.is_untrained:
            fit_guide(model, self.batches, seed=cell.seed, progress=False)
        if cell.reduction is not None:
            calibrate(model, self.batches, cell.reduction, self.tolerance, progress=False)
        keep = get_pruning(model).config.describe("keep")
        costs = _costs(model, self.batches)
        scores = self._scores(model)
        ratio = _relative_time(model, self.model, self.batches[:_TIMED], self.repeats) if self.repeats else None
        return {"scores": scores, **costs, "time": ratio, "keep": keep}

    def _scores(self, model: nn.Module) -> dict[str, float]:
        """What the metric returns, as finite numbers by name."""
        with evaluating(model), torch.no_grad():
            found: Any = self.metric(model)
        scores = found if isinstance(found, Mapping) else {_name(self.metric): found}
        return {str(name): _finite(str(name), value) for name, value in scores.items()}


def _name(metric: object) -> str:
    """The name of a metric that returns one number."""
    name = getattr(metric, "__name__", "score")
    return name if name.isidentifier() else "score"


def _finite(name: str, value: Any) -> float:
    """A metric's value as a number. TypeError for anything else, FloatingPointError where it is NaN or infinite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"the metric returned {name}={value!r}: return a number, or numbers by name") from None
    if not math.isfinite(number):
        raise FloatingPointError(f"the metric returned {name}={number}, which is no score")
    return number


def _costs(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """Mean MACs of an instance, and mean tokens that entered each layer and that left the last, of a pruned model."""
    meter = CostMeter(model)
    macs = dense = instances = 0.0
    tokens: dict[str, list[list[float]]] = {}
    with evaluating(model), torch.no_grad():
        for batch in batches:
            with collect(threads=False) as traces:
                run_batch(model, batch)
            cost = meter(traces)
            macs, dense, instances = macs + cost.total, dense + cost.dense_total, instances + cost.instances
            for trace in traces:
                tokens.setdefault(trace.tower, []).extend(_tokens(trace))
    means = {tower: [statistics.fmean(column) for column in zip(*rows, strict=True)] for tower, rows in tokens.items()}
    return {"macs": macs / instances, "dense_macs": dense / instances, "macs_saved": 1 - macs / dense, "tokens": means}


def _tokens(trace: PruneTrace) -> list[list[float]]:
    """[instances][1 + layers]: tokens that entered the tower, then those that left each layer."""
    entered = precision.float_tensor(trace.input_tokens.layout.lengths, torch.device("cpu")).tolist()
    return [list(column) for column in zip(entered, *trace.lengths, strict=True)]


@torch.no_grad()
def _relative_time(model: nn.Module, dense: nn.Module, batches: Sequence[Batch], repeats: int) -> float:
    """The median over runs of the model's time, divided by the dense model's on the same batch just before or after.

    The first batch runs once unmeasured. Who runs first alternates, so that a disturbance reaches both alike.
    """
    ratios = []
    with evaluating(model, dense):
        for run in range(1 + repeats * len(batches)):
            batch = batches[max(run - 1, 0) % len(batches)]
            order = (model, dense) if run % 2 else (dense, model)
            seconds = {one: _seconds(one, batch) for one in order}
            if run:
                ratios.append(seconds[model] / seconds[dense])
    return statistics.median(ratios)


def _seconds(model: nn.Module, batch: Batch) -> float:
    on_cuda = any(weight.is_cuda for weight in model.parameters())
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run_batch(model, batch)
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
