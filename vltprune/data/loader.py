"""Where records meet pixels: batches of images ready for a model, with what cannot be opened set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic

import torch
from PIL import Image
from torch import Tensor

from .records import R, Skipped


@dataclass
class Loader(Generic[R]):
    """Batches of records and their images [batch, images a record, 3, height, width]; iterate as often as you like.

    prepare: a picture to [3, height, width], as `vltprune.transforms(model)` gives it. A record whose picture is missing
    or broken goes to `skipped`, once; with strict=True it is an OSError instead. A batch that lost all is left out.
    start, stop: which records, all of them unless these say otherwise.
    """

    records: Sequence[R]
    prepare: Callable[[Image.Image], Tensor]
    batch_size: int = 16
    strict: bool = False
    start: int = 0
    stop: int | None = None
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        """How many records there are to read."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[tuple[list[R], Tensor]]:
        for start in range(0, len(self), self.batch_size):
            numbers = self._numbers[start : start + self.batch_size]
            opened = [(record, images) for record, images in map(self._open, numbers) if images is not None]
            if opened:
                records, images = zip(*opened, strict=True)
                yield list(records), torch.stack(images)

    @property
    def _numbers(self) -> range:
        return range(len(self.records))[self.start : self.stop]

    def _open(self, number: int) -> tuple[R, Tensor | None]:
        record = self.records[number]
        try:
            return record, torch.stack([self.prepare(picture) for picture in record.pictures()])
        except OSError as error:
            if self.strict:
                raise OSError(f"entry {record.index}: {error}") from error
            skipped = Skipped(record.index, str(error))
            if skipped not in self.skipped:
                self.skipped.append(skipped)
            return record, None
