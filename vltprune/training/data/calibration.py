"""Calibration batches: records given to a model as evaluation does, for measuring cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...data.records import with_one_text
from ...evaluation.tasks import Task


def calibration_batches(
    task: Task[Any],
    records: Sequence[Any],
    prepare: Callable[[Any], Tensor],
    device: torch.device | str = "cpu",
    batch_size: int = 16,
) -> list[Callable[..., Any]]:
    """Batches of records, one text each, as `calibrate` and `fit_guide` take them.

    Records whose images or texts cannot be read are left out; evaluation and training report them.

    Args:
        task: the task, made for the model.
        records: what to measure on.
        prepare: an image to [3, height, width], as `vltprune.transforms` gives it.
        device: where the model is.
        batch_size: records a batch.

    Returns:
        Functions of the model, each of which runs it on one batch.
    """
    batches: list[Callable[..., Any]] = []
    for start in range(0, len(records), batch_size):
        batch = [with_one_text(record) for record in records[start : start + batch_size]]
        loaded = [(record, _load(task, record, prepare)) for record in batch]
        usable = [(record, images) for record, images in loaded if images is not None]
        if not usable:
            continue
        batch, images = list(map(list, zip(*usable, strict=True)))
        images = torch.stack(images).to(device)
        texts = tuple(text.to(device) for text in task.tokenize(batch)[0])
        batches.append(partial(task.predict, records=batch, images=images, texts=texts))
    return batches


def _load(task: Task[Any], record: Any, prepare: Callable[[Any], Tensor]) -> Tensor | None:
    """The images of a record, None where they cannot be opened, or its texts have no token ids."""
    try:
        task.tokenize([record])
        return record.load_tensor(prepare)
    except (OSError, ValueError):
        return None
