"""compress: from a dense model to pruned ones at the costs asked for, in one call or command."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..cost import calibration as budget
from ..cost import describe
from ..cost.budget_control import BudgetControl
from ..cost.macs import CostMeter
from ..cost.sample_cost import SampleCostMeter
from ..data import Loader, fingerprint, shards
from ..evaluation import tasks
from ..evaluation.evaluator import Evaluator, summarize, summarize_matching
from ..evaluation.results_log import ResultsLog, write_json
from ..evaluation.tasks import Matching, Options, Retrieval
from ..io import checkpoint
from ..io.preprocessing import transforms
from ..models import zoo
from ..models.resolve import resolve_model
from ..pruning.model import get_pruning, is_pruned
from ..pruning.prune import prune_towers
from ..utils.frozen import thawed
from ..utils.modes import evaluating
from ..utils.progress import say
from .config import CompressConfig
from .data.calibration import calls_of
from .loop.controller import Target
from .loop.interrupts import Stopped
from .loop.metrics import History, told
from .loop.trainer import Run
from .losses.saliency import watched
from .losses.train_module import Extra
from .report.examples import Example, Rows, examples
from .report.page import Story, write
from .run_folder import check_folder, claim, claim_contents, contents_of

_CALIBRATED = 256  # records of the validation split that the knob is set on


@dataclass(frozen=True)
class Compressed:
    """What came of a compression: the model, its folder, and one row of results a cost, dense first.

    A row: reduction asked for (0: dense; a mapping where each tower had a target of its own), knob, and what `summarize`
    gives on the validation split; `matching`, where a model has a second stage: what `summarize_matching` gives. page:
    report.html, for people to look at. skipped: records that could not be trained on since the run was last taken up, and why.
    """

    model: nn.Module
    folder: Path
    rows: Sequence[dict[str, Any]]
    skipped: Sequence[str] = ()

    @property
    def page(self) -> Path:
        return self.folder / "report.html"


def compress(config: CompressConfig, output: str | Path, extra: Extra | None = None) -> Compressed | None:
    """Train a pruned model to its budget, in the folder `output`; the same call goes on where it was stopped.

    With reduction=0 the dense model is trained alike, and saved as it is.

    config: what to do; extra: a further loss. There come to be checkpoints/, history.jsonl, the trackers' files, and at
    the end model/ (`vltprune.load` reads it), results.json, config.json and report.html. The validation split chooses the
    knob, and nothing else is chosen by it: the weights are those of the last step. On a run that is at its end, nothing is
    trained and no record examined again: the page is made anew. Returns None in processes other than the first.

    Where the parts cannot reach `reduction`, it warns, and the nearest cost is what is examined and saved. Raises what the
    config's parts raise; ValueError for a tower that `reduction` names and the model lacks or does not prune, for a folder of
    another config, or of other content under the same names; CheckpointError
    for a `start` that does not fit, OSError where nothing can be written, BadLossError; Stopped, a KeyboardInterrupt that says
    where the same call goes on, for Ctrl-C and SIGTERM.
    """
    folder, tell = Path(output), _is_first()
    check_folder(folder, config)
    with told(f"loading {config.model}", tell):
        dense = dense_model(config)
    content = fingerprint.hash_model(dense)
    taught = config.distill or config.distill_summaries or config.scores_taught
    twin = copy.deepcopy(dense) if taught else None
    model = prune_towers(dense, config.pruning)
    if config.reduction:
        budget.check_targets(model, config.reduction)
    claim(folder, config)
    if config.start is not None:
        checkpoint.fill(model, Path(zoo.packaged(config.start) or config.start))
    teacher = None
    if twin is not None:
        teacher = watched(twin, model) if config.scores_taught else prune_towers(twin, "random", at=())
    kind: Any = tasks.tasks[config.task]
    task = kind.from_model(model, Options(config.vocabulary, config.answers))
    records, val = _read(config, kind, tell)
    claim_contents(folder, contents_of(config, content, records, val))
    run = Run(config, folder, model, task, records, teacher, extra)
    run.train()
    trained = _trained(run)
    run.accelerator.end_training()
    return _finish_or_tell(run, trained, val) if run.accelerator.is_main_process else None


def _finish_or_tell(run: Run, model: nn.Module, val: Sequence[Any]) -> Compressed:
    """`_finish`. Stopped, which says that nothing is lost, for an interrupt meanwhile."""
    try:
        return _finish(run, model, val)
    except KeyboardInterrupt:
        raise Stopped(
            f"stopped behind the last step, {run.steps:,}, while the models were examined; the same command goes on from there"
        ) from None


def _is_first() -> bool:
    """Whether this is the first process of several, before Accelerate has met them."""
    return os.environ.get("RANK", "0") == "0"


def dense_model(config: CompressConfig) -> nn.Module:
    """The dense model of a config, with its weights. TypeError for a pruned one."""
    torch.manual_seed(config.seed)  # of weights that are random
    model = resolve_model(config.model, pretrained=config.pretrained, arguments=config.model_args)
    if is_pruned(model):
        raise TypeError(f"model={config.model!r} is pruned already: give its dense model, and this one as start=")
    return model


def _read(config: CompressConfig, kind: Any, tell: bool) -> tuple[Any, Sequence[Any]]:
    """What to train on, shards or the records of an annotation file, and the records to examine on."""
    with told(f"reading {config.data}", tell):
        if shards.is_shard_address(config.data):
            records = shards.Shards.from_address(config.data, kind.parse_entry)
        else:
            records = kind.load_records(config.data, config.images or str(Path(config.data).parent), False)
    with told(f"reading {config.val}", tell):
        return records, kind.load_records(
            config.val, config.val_images or config.images or str(Path(config.val).parent), False
        )


def _trained(run: Run) -> nn.Module:
    """The model that was trained; where processes held a part of it each, a whole one again, in the first process."""
    if getattr(run.accelerator.state, "fsdp_plugin", None) is None:
        student: Any = run.accelerator.unwrap_model(run.student)
        return student.model
    learned = run.accelerator.get_state_dict(run.student)  # all processes must ask
    model = prune_towers(dense_model(run.config), run.config.pruning)
    if run.accelerator.is_main_process:
        own = {name.removeprefix("model."): value for name, value in learned.items() if name.startswith("model.")}
        model.load_state_dict(own)
    return model.to(run.accelerator.device)


def _finish(run: Run, model: nn.Module, val: Sequence[Any]) -> Compressed:
    """Examine on validation, dense and as trained, save, and report."""
    config, folder = run.config, run.folder
    val = val[: config.val_limit] if config.val_limit else val
    evaluations = [_examined(run, dense_model(config).to(run.accelerator.device), val, "dense", 0.0, None)]
    if config.reduction:
        with evaluating(model):  # here, and not again for each of many measurements
            evaluations += _served(run, model, val)
    else:
        model = get_pruning(model).host
        evaluations.append(_examined(run, model, val, "trained", 0.0, None))
        checkpoint.save(model, folder / "model")
    rows, answered = map(list, zip(*evaluations, strict=True))
    write_json(folder / "results.json", rows)

    skipped = [str(one) for one in run.loader.skipped]
    if skipped:
        write_json(folder / "skipped.json", skipped)
    done = Compressed(model.eval(), folder, rows, skipped)
    history = History(folder / "history.jsonl").rows
    story = Story(config, run.steps, min(len(val), _CALIBRATED), rows, answered, history)
    write(done.page, story, *_shown(run, model, val, answered))
    return done


def _served(run: Run, model: nn.Module, val: Sequence[Any]) -> list[tuple[dict[str, Any], Rows]]:
    """Calibrate to every cost on the first validation records, and examine there; the model is left at its own cost."""
    config, evaluations = run.config, []
    with told(f"opening the pictures of {len(val[:_CALIBRATED])} validation records"):
        calls = calls_of(run.task, val[:_CALIBRATED], transforms(model), run.accelerator.device)
    cost_meter = run.cost_meter if model is run.model else SampleCostMeter(model)
    milder = [share for share in sorted({*config.serve}) if share != config.reduction]
    for reduction in (*milder, config.reduction):
        try:
            found = _calibrated(model, calls, reduction, cost_meter.meter, strict=reduction != config.reduction)
        except budget.BudgetError:
            continue  # a cost on the way that these parts cannot give
        evaluations.append(_examined(run, model, val, _folder_of(reduction), reduction, asdict(found), cost_meter))
    checkpoint.save(model, run.folder / "model")
    return (
        evaluations
        if isinstance(config.reduction, Mapping)
        else sorted(evaluations, key=lambda one: one[0]["reduction"])
    )


def _calibrated(
    model: nn.Module, calls: Sequence[Any], reduction: Target, meter: CostMeter, strict: bool
) -> budget.Calibration:
    """Calibrate to a cost. BudgetError for one out of reach where `strict`; else the nearest is set, tower by tower where each
    has its own, under a warning."""
    targets: dict[str | None, Target] = {None: reduction}
    if isinstance(reduction, Mapping):
        # in the model's order, as `calibrate` has it
        targets = {tower: {tower: reduction[tower]} for tower in get_pruning(model).towers if tower in reduction}
    found: Any = None
    say(f"vltprune: setting the knob to {describe.format_target(reduction, '%')} fewer MACs ...")
    for tower, one in targets.items():
        try:
            found = budget.calibrate(model, calls, one, meter=meter)
        except budget.BudgetError as error:
            if strict:
                raise
            warnings.warn(f"the nearest cost is examined and saved: {error}", stacklevel=2)
            found = error.nearest
            BudgetControl(model, tower).commit(cast(float, found.value))  # each that was tried has one
    # the last was measured with all the others set
    return replace(found, knob=None, value=None) if isinstance(reduction, Mapping) else found


def _folder_of(reduction: Target) -> str:
    """The name of the folder of a cost's evaluation."""
    if isinstance(reduction, Mapping):
        return ",".join(f"{tower}={share:g}" for tower, share in reduction.items())
    return f"{reduction:g}"


def _shown(run: Run, model: nn.Module, val: Sequence[Any], answered: Sequence[Rows]) -> tuple[list[Example], str]:
    """The report's examples; or none, and why."""
    try:
        return examples(run.config.task, run.task, model, val, answered), ""
    except Exception as error:  # whatever it is, all that is lost are pictures of a run that is at its end
        why = f"{type(error).__name__}: {error}"
        warnings.warn(f"the report has no pictures: {why}", stacklevel=2)
        return [], why


def _examined(
    run: Run,
    model: nn.Module,
    val: Sequence[Any],
    name: str,
    reduction: Target,
    knob: dict[str, Any] | None,
    cost_meter: SampleCostMeter | None = None,
) -> tuple[dict[str, Any], Rows]:
    """A row of results, and the rows of its records. cost_meter: the model's, where there is one already."""
    cost_meter = cost_meter or SampleCostMeter(model)
    loader = Loader(val, transforms(model), workers=run.config.workers)
    folder = run.folder / "val" / name
    content = {"content_of_model": fingerprint.hash_model(model)}
    log = ResultsLog(folder, {"reduction": thawed(reduction), "knob": knob, **content})
    cost = f"{describe.format_target(reduction, '%')} fewer MACs" if reduction else name
    what = f"examining {len(loader)} validation records, {cost}"
    with told(what, total=len(loader)) as bar:
        Evaluator(run.task, model, str(run.accelerator.device), cost_meter).run(loader, log, bar.update)
    row = {"reduction": thawed(reduction), "knob": knob, **summarize(run.task, log.rows)}
    if isinstance(run.task, Retrieval) and run.task.has_head and run.config.k_test:
        matching = run.task.matching(val, log.rows, run.config.k_test)
        row["matching"] = _matched(
            run, cost_meter, model, matching, ResultsLog(folder / "matching", {"knob": knob, **content})
        )
    return row, log.rows


def _matched(
    run: Run, cost_meter: SampleCostMeter, model: nn.Module, matching: Matching, log: ResultsLog
) -> dict[str, Any]:
    """What came of a second stage."""
    loader = Loader(matching.pairs(), transforms(model), batch_size=1, workers=run.config.workers)
    with told("judging the nearest again, the second stage") as bar:
        Evaluator(matching, model, str(run.accelerator.device), cost_meter).run(loader, log, bar.update)
    return summarize_matching(matching, log.rows)
