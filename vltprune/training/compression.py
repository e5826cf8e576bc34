"""compress: one call, or one command, from a dense model to pruned ones at the costs that were asked for."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import budget, checkpoint, hub, tasks
from ..data import Loader, shards
from ..exam import Exam, report
from ..factory import create_model
from ..journal import Journal, write_json
from ..models import zoo
from ..preprocessing import transforms
from ..surgery import prune, pruning
from ..tasks import Options
from .config import CompressConfig
from .engine import Run, calls_of
from .student import Extra

_CALIBRATED = 256  # records of the validation split that the knob is set on


@dataclass(frozen=True)
class Compressed:
    """What came of a compression: the model, its folder, and one row of results a cost, dense first.

    A row: reduction asked for (0: dense), knob, and what `exam.report` gives on the validation split.
    """

    model: nn.Module
    folder: Path
    rows: Sequence[dict[str, Any]]


def compress(config: CompressConfig, output: str | Path, extra: Extra | None = None) -> Compressed | None:
    """Train a pruned model to its budget, in the folder `output`; the same call goes on where it was stopped.

    With reduction=0 the dense model is trained alike, and saved as it is.

    config: what to do; extra: a further loss. There come to be checkpoints/, history.jsonl, the trackers' files, and at
    the end model/ (`vltprune.load` reads it), results.json and config.json. The validation split chooses the knob, and
    nothing else is chosen by it: the weights are those of the last step. Returns None in processes other than the first.

    Raises what the config's parts raise; ValueError for a folder of another config, BudgetError for a cost that the parts
    cannot reach, OSError where nothing can be written, BadLossError.
    """
    folder = Path(output)
    _claim(folder, config)
    dense = dense_model(config)
    teacher = prune(copy.deepcopy(dense), "random", at=()) if config.distil or config.distil_summaries else None
    model = prune(dense, config.pruning)
    kind: Any = tasks.tasks[config.task]
    task = kind.of(model, Options(config.vocabulary, config.answers))
    records = _records(config, kind)
    val = kind.read(config.val, config.val_images or config.images or str(Path(config.val).parent), False)

    run = Run(config, folder, model, task, records, teacher, extra)
    run.train()
    if not run.accelerator.is_main_process:
        return None
    return _finish(run, val)


def dense_model(config: CompressConfig) -> nn.Module:
    """The dense model of a config, with its weights. TypeError for a pruned one."""
    torch.manual_seed(config.seed)  # of weights that are random
    if Path(config.model).is_dir():
        model = hub.load(config.model)
    else:
        own = zoo.packaged(config.model) is not None and not config.model_args
        pretrained = config.pretrained if config.pretrained is not None else own
        model = create_model(config.model, pretrained=pretrained, **config.model_args)
    if hasattr(model, "pruning"):
        raise TypeError(f"model={config.model!r} is pruned already: compress its dense model")
    return model


def _records(config: CompressConfig, kind: Any) -> Any:
    """What to train on: shards, or the records of an annotation file."""
    if shards.are_meant(config.data):
        return shards.Shards.of(config.data, kind.entry)
    return kind.read(config.data, config.images or str(Path(config.data).parent), False)


def _claim(folder: Path, config: CompressConfig) -> None:
    """The folder is this config's, from now on. ValueError, with the difference, where it is another's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "config.json"
        if file.is_file():
            there, here = json.loads(file.read_text()), json.loads(json.dumps(config.to_dict()))
            other = [name for name in {**there, **here} if there.get(name) != here.get(name)]
            if other:
                raise ValueError(
                    f"{folder} is the run of another config ({other[0]}: {there.get(other[0])!r} there, "
                    f"{here.get(other[0])!r} now): choose another output, or remove that folder"
                )
        else:
            write_json(file, config.to_dict())
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder}: {error.strerror}; choose another output") from error


def _finish(run: Run, val: Sequence[Any]) -> Compressed:
    """Calibrate on validation, examine there at every cost, and save."""
    config, model, folder = run.config, run.accelerator.unwrap_model(run.student).model, run.folder
    val = val[: config.val_limit] if config.val_limit else val
    prepare = transforms(model)
    calls = calls_of(run.task, val[:_CALIBRATED], prepare, run.accelerator.device)
    rows = [_examined(run, dense_model(config).to(run.accelerator.device), val, "dense", 0.0, None)]
    if not config.reduction:
        rows.append(_examined(run, pruning(model).host, val, "trained", 0.0, None))
        checkpoint.save(pruning(model).host, folder / "model")
        write_json(folder / "results.json", rows)
        return Compressed(pruning(model).host, folder, rows)
    checkpoint.save(model, folder / "model")  # what was learnt, whether or not the knob reaches what was asked
    for reduction in sorted({*config.serve, config.reduction}):
        try:
            found = budget.calibrate(model, calls, reduction)
        except budget.BudgetError:
            if reduction == config.reduction:
                raise
            continue  # a cost on the way that these parts cannot give
        rows.append(_examined(run, model, val, f"{reduction:g}", reduction, asdict(found)))
        if reduction == config.reduction:
            checkpoint.save(model, folder / "model")
    budget.calibrate(model, calls, config.reduction)
    write_json(folder / "results.json", rows)
    return Compressed(model, folder, rows)


def _examined(
    run: Run, model: nn.Module, val: Sequence[Any], name: str, reduction: float, knob: dict[str, Any] | None
) -> dict[str, Any]:
    loader = Loader(val, transforms(model), workers=2)
    journal = Journal(run.folder / "val" / name, {"reduction": reduction, "knob": knob})
    Exam(run.task, model, str(run.accelerator.device)).sit(loader, journal)
    return {"reduction": reduction, "knob": knob, **report(run.task, journal.rows)}
