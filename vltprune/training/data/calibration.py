"""Model calls for measuring cost: records given to a model as evaluation does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor


def calls_of(
    task: Any,
    records: Sequence[Any],
    prepare: Callable[[Any], Tensor],
    device: torch.device | str = "cpu",
    size: int = 16,
) -> list[Callable[..., Any]]:
    """Calls that put the records, one text each, to a model as the task does: batches for `calibrate`.

    Records whose pictures or texts cannot be read are left out; whoever examines or draws them tells of them.
    """
    calls: list[Callable[..., Any]] = []
    for start in range(0, len(records), size):
        some = [_with_one_text(record) for record in records[start : start + size]]
        opened = [(record, _opened(task, record, prepare)) for record in some]
        there = [(record, images) for record, images in opened if images is not None]
        if not there:
            continue
        some, images = list(map(list, zip(*there, strict=True)))
        images = torch.stack(images)
        texts = tuple(text.to(device) for text in task.tokenize(some)[0])
        calls.append(partial(task.predict, records=some, images=images.to(device), texts=texts))
    return calls


def _opened(task: Any, record: Any, prepare: Callable[[Any], Tensor]) -> Tensor | None:
    """The images of a record, None where they cannot be opened, or its texts have no token ids."""
    try:
        task.tokenize([record])
        return record.load_tensor(prepare)
    except (OSError, ValueError):
        return None


def _with_one_text(record: Any) -> Any:
    """A record with the first of its captions: an image and one text are what an instance costs."""
    return replace(record, captions=record.captions[:1]) if hasattr(record, "captions") else record
