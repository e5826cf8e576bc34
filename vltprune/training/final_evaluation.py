"""Final evaluation of a run: calibrates to every cost, evaluates on validation, saves the model, and reports."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..cost import calibration, describe
from ..cost.budget_control import BudgetControl
from ..cost.macs import CostMeter
from ..cost.sample_cost import SampleCostMeter
from ..data import Loader, fingerprint
from ..evaluation.evaluator import Evaluator, summarize, summarize_matching
from ..evaluation.results_log import ResultsLog, write_json
from ..evaluation.tasks import Matching, Retrieval
from ..io import checkpoint
from ..io.preprocessing import transforms
from ..pruning.model import get_pruning
from ..utils.frozen import thawed
from ..utils.modes import evaluating
from ..utils.progress import say
from .data.calibration import calibration_batches
from .loop.controller import Target
from .loop.logger import History
from .loop.trainer import Trainer
from .models import load_dense_model
from .progress import announced
from .report.examples import Example, Rows, examples
from .report.page import ReportData, write

_CALIBRATION_RECORDS = 256  # of the validation split
_NO_BENCHMARK = "records_per_second"  # one model after another, of a few seconds each: no measure of speed


@dataclass(frozen=True)
class CompressResult:
    """What came of a compression.

    Args:
        model: the trained model, in evaluation mode.
        folder: the run's folder.
        rows: one row of results a cost, the dense model's first. It has the reduction that was asked for (0: dense; a
            mapping where each tower had a target of its own), and the knob. It has what `evaluator.summarize` gives on the
            validation split, and as `matching`, where a model has a second stage, what `evaluator.summarize_matching` gives.
        skipped: records that could not be trained on since the run was last taken up, and why.
    """

    model: nn.Module
    folder: Path
    rows: Sequence[dict[str, Any]]
    skipped: Sequence[str] = ()

    @property
    def page(self) -> Path:
        """The report, an HTML page."""
        return self.folder / "report.html"


def finish(trainer: Trainer, model: nn.Module, val: Sequence[Any]) -> CompressResult:
    """Evaluates the dense model and the trained one at every cost, saves it, and writes results and report.

    Args:
        trainer: at the end of its run.
        model: what it trained.
        val: records of the validation split.

    Returns:
        The model and its results.

    Raises:
        OSError: results cannot be written.
        ValueError: none of the validation records can be evaluated, or the folder's evaluations are of other settings.
        FloatingPointError: a model's outputs or scores are NaN or infinite.
    """
    config, folder = trainer.config, trainer.folder
    val = val[: config.val_limit] if config.val_limit else val
    dense = load_dense_model(config).to(trainer.accelerator.device)
    evaluations = [_evaluate(trainer, dense, val, "dense", 0.0, None)]
    if config.reduction:
        with evaluating(model):  # here, and not again for each of many measurements
            evaluations += _evaluate_costs(trainer, model, val)
    else:
        model = get_pruning(model).host
        evaluations.append(_evaluate(trainer, model, val, "trained", 0.0, None))
    checkpoint.save(model, folder / "model")
    rows, answers = map(list, zip(*evaluations, strict=True))
    write_json(folder / "results.json", rows)

    skipped = [str(note) for note in trainer.loader.skipped]
    if skipped:
        write_json(folder / "skipped.json", skipped)
    result = CompressResult(model.eval(), folder, rows, skipped)
    history = History(folder / "history.jsonl").rows
    data = ReportData(config, trainer.steps, min(len(val), _CALIBRATION_RECORDS), rows, answers, history)
    write(result.page, data, *_examples(trainer, model, val, answers))
    return result


def _evaluate_costs(trainer: Trainer, model: nn.Module, val: Sequence[Any]) -> list[tuple[dict[str, Any], Rows]]:
    """Calibrates to every cost on the first validation records, and evaluates there; the config's own cost comes last."""
    config, evaluations = trainer.config, []
    first = val[:_CALIBRATION_RECORDS]
    with announced(f"opening the images of {len(first)} validation records"):
        batches = calibration_batches(trainer.task, first, transforms(model), trainer.accelerator.device)
    cost_meter = trainer.cost_meter if model is trainer.model else SampleCostMeter(model)
    others = [reduction for reduction in sorted({*config.serve}) if reduction != config.reduction]
    for reduction in (*others, config.reduction):
        try:
            found = _calibrate(model, batches, reduction, cost_meter.meter, strict=reduction != config.reduction)
        except calibration.BudgetError:
            continue  # a cost on the way that these parts cannot give
        name = _folder_name(reduction)
        evaluations.append(_evaluate(trainer, model, val, name, reduction, asdict(found), cost_meter))
    if isinstance(config.reduction, Mapping):
        return evaluations
    return sorted(evaluations, key=lambda evaluation: evaluation[0]["reduction"])


def _calibrate(
    model: nn.Module, batches: Sequence[Any], reduction: Target, meter: CostMeter, strict: bool
) -> calibration.Calibration:
    """Calibrates to a cost. BudgetError for one out of reach where `strict`; else the nearest is set, tower by tower where
    each has its own, under a warning."""
    targets: dict[str | None, Target] = {None: reduction}
    if isinstance(reduction, Mapping):
        # in the model's order, as `calibrate` has it
        targets = {tower: {tower: reduction[tower]} for tower in get_pruning(model).towers if tower in reduction}
    found: Any = None
    say(f"vltprune: setting the knob to {describe.format_target(reduction, '%')} fewer MACs ...")
    for tower, one in targets.items():
        try:
            found = calibration.calibrate(model, batches, one, meter=meter)
        except calibration.BudgetError as error:
            if strict:
                raise
            warnings.warn(f"the nearest cost is evaluated and saved: {error}", stacklevel=2)
            found = error.nearest
            BudgetControl(model, tower).commit(cast(float, found.value))  # each that was tried has one
    # the last was measured with all the others set
    return replace(found, knob=None, value=None) if isinstance(reduction, Mapping) else found


def _evaluate(
    trainer: Trainer,
    model: nn.Module,
    val: Sequence[Any],
    name: str,
    reduction: Target,
    knob: dict[str, Any] | None,
    cost_meter: SampleCostMeter | None = None,
) -> tuple[dict[str, Any], Rows]:
    """A row of results, and the rows of its records. cost_meter: the model's, where there is one already."""
    cost_meter = cost_meter or SampleCostMeter(model)
    loader = Loader(val, transforms(model), workers=trainer.config.workers)
    folder = trainer.folder / "val" / name
    content = {"content_of_model": fingerprint.hash_model(model)}
    log = ResultsLog(folder, {"reduction": thawed(reduction), "knob": knob, **content})
    cost = f"{describe.format_target(reduction, '%')} fewer MACs" if reduction else name
    with announced(f"evaluating {len(loader)} validation records, {cost}", total=len(loader)) as bar:
        Evaluator(trainer.task, model, str(trainer.accelerator.device), cost_meter).run(loader, log, bar.update)
    summary = {name: value for name, value in summarize(trainer.task, log.rows).items() if name != _NO_BENCHMARK}
    row = {"reduction": thawed(reduction), "knob": knob, **summary}
    if isinstance(trainer.task, Retrieval) and trainer.task.has_head and trainer.config.k_test:
        matching = trainer.task.matching(val, log.rows, trainer.config.k_test)
        matching_log = ResultsLog(folder / "matching", {"knob": knob, **content})
        row["matching"] = _evaluate_matching(trainer, cost_meter, model, matching, matching_log)
    return row, log.rows


def _evaluate_matching(
    trainer: Trainer, cost_meter: SampleCostMeter, model: nn.Module, matching: Matching, log: ResultsLog
) -> dict[str, Any]:
    """Results of the second stage."""
    loader = Loader(matching.pairs(), transforms(model), batch_size=1, workers=trainer.config.workers)
    with announced("judging the nearest again, the second stage") as bar:
        Evaluator(matching, model, str(trainer.accelerator.device), cost_meter).run(loader, log, bar.update)
    return summarize_matching(matching, log.rows)


def _folder_name(reduction: Target) -> str:
    """The name of the folder of a cost's evaluation."""
    if isinstance(reduction, Mapping):
        return ",".join(f"{tower}={share:g}" for tower, share in reduction.items())
    return f"{reduction:g}"


def _examples(
    trainer: Trainer, model: nn.Module, val: Sequence[Any], answers: Sequence[Rows]
) -> tuple[list[Example], str]:
    """The report's examples; or none, and why."""
    try:
        return examples(trainer.config.task, trainer.task, model, val, answers), ""
    except Exception as error:  # whatever it is, all that is lost are images of a run that is at its end
        why = f"{type(error).__name__}: {error}"
        warnings.warn(f"the report has no pictures: {why}", stacklevel=2)
        return [], why
