"""compress: from a dense model to pruned ones at the costs asked for, in one call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..cost.targets import check_targets
from ..data import fingerprint, shards
from ..evaluation.tasks import Options, Task, tasks
from ..io import checkpoint
from ..models import zoo
from ..pruning.prune import prune_towers
from .accelerate_state import accelerate_state
from .config import CompressConfig
from .final_evaluation import CompressResult, finish
from .loop.interrupts import Stopped
from .loop.trainer import Trainer
from .losses.train_module import ExtraLoss
from .models import build_teacher, load_dense_model, trained_model
from .progress import announced
from .run_folder import check_config, claim_config, claim_contents, hash_contents


def compress(
    config: CompressConfig,
    output: str | Path,
    extra: ExtraLoss | None = None,
    *,
    device: str | torch.device | None = None,
) -> CompressResult | None:
    """Trains a pruned model to its budget, in a folder; the same call resumes where it was stopped.

    The folder gets checkpoints/, history.jsonl, the trackers' files, and at the end model/ (`vltprune.load` reads it),
    results.json, config.json and report.html. The validation split chooses the knob, and nothing else: the weights are those
    of the last step. With reduction=0 the dense model is trained alike, and saved as it is. Of a run that is at its end the
    report is made anew, and nothing is trained or evaluated again. Where the parts cannot reach `reduction`, it warns, and
    the nearest cost is evaluated and saved.

    Args:
        config: what to do.
        output: the run's folder.
        extra: a further loss.
        device: where the model trains, such as "cpu", "cuda:1" or "mps"; None leaves it to Accelerate, which takes a GPU where
            there is one. A stopped run may be resumed on another device.

    Returns:
        The model and its results; None in processes other than the first.

    Raises:
        ValueError: `reduction` names a tower that the model lacks or does not prune. Or the folder is another config's, or was
            begun from other content under the same names. Or this machine or process cannot run on `device`, or in the
            config's dtype. Also what the config's parts raise.
        CheckpointError: `start` does not fit.
        OSError: nothing can be written.
        BadLossError: too many losses in a row are not finite.
        Stopped: a KeyboardInterrupt, for Ctrl-C and SIGTERM, that says where the same call resumes.
    """
    with accelerate_state(config.dtype, device) as state:
        return _compress(config, Path(output), extra, state.is_main_process)


def _compress(config: CompressConfig, folder: Path, extra: ExtraLoss | None, show: bool) -> CompressResult | None:
    """`compress` where Accelerate is set up. show: whether this process says what it does."""
    check_config(folder, config)
    with announced(f"loading {config.model}", show):
        dense = load_dense_model(config)
    model_hash = fingerprint.hash_model(dense)
    distills = config.distill or config.distill_summaries or config.distill_tokens or config.saliency_weight
    dense_copy = copy.deepcopy(dense) if distills else None
    model = prune_towers(dense, config.pruning)
    if config.reduction:
        check_targets(model, config.reduction)
    claim_config(folder, config)
    if config.start is not None:
        checkpoint.load_weights(model, Path(zoo.packaged(config.start) or config.start))
    teacher = None if dense_copy is None else build_teacher(dense_copy, model, config)
    kind: Any = tasks[config.task]
    task = kind.from_model(model, Options(config.vocabulary, config.answers))
    records, val = _load_records(config, kind, show)
    claim_contents(folder, hash_contents(config, model_hash, records, val))

    trainer = Trainer(config, folder, model, task, records, teacher, extra)
    trainer.train()
    trained = trained_model(trainer)
    trainer.accelerator.end_training()
    if not trainer.accelerator.is_main_process:
        return None
    try:
        return finish(trainer, trained, val)
    except KeyboardInterrupt:
        where = f"stopped behind the last step, {trainer.steps:,}, while the models were evaluated"
        raise Stopped(f"{where}; the same command resumes there") from None


def _load_records(
    config: CompressConfig, kind: type[Task[Any]], show: bool
) -> tuple[Sequence[Any] | shards.Shards[Any], Sequence[Any]]:
    """What to train on, shards or the records of an annotation file, and the records to evaluate on."""
    with announced(f"reading {config.data}", show):
        if shards.is_shard_address(config.data):
            records = shards.Shards.from_address(config.data, kind.parse_entry)
        else:
            records = kind.load_records(config.data, config.images or str(Path(config.data).parent), False)
    with announced(f"reading {config.val}", show):
        images = config.val_images or config.images or str(Path(config.val).parent)
        return records, kind.load_records(config.val, images, False)
