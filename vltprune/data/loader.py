"""Loader: records to batches of preprocessed images; images that cannot be opened are set aside."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    start, stop: which records, all of them unless these say otherwise. workers: threads that open pictures ahead of their
    use, none for 0; what comes out, and when what is set aside, does not depend on them.
    """

    records: Sequence[R]
    prepare: Callable[[Image.Image], Tensor]
    batch_size: int = 16
    strict: bool = False
    start: int = 0
    stop: int | None = None
    workers: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        """How many records there are to read."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[tuple[list[R], Tensor]]:
        numbers = self._numbers
        batches = [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]
        for opened in self._ahead(batches) if self.workers else (list(map(self._open, batch)) for batch in batches):
            kept = [(record, images) for record, images in opened if isinstance(images, Tensor)]
            self._set_aside([images for _, images in opened if isinstance(images, Skipped)])
            if kept:
                records, images = zip(*kept, strict=True)
                yield list(records), torch.stack(images)

    @property
    def _numbers(self) -> range:
        return range(len(self.records))[self.start : self.stop]

    def _ahead(self, batches: Sequence[range]) -> Iterator[list[tuple[R, Tensor | Skipped]]]:
        """The batches in their order, each begun while those before it are in use."""
        begun, ahead = deque(), 1 + self.workers // self.batch_size
        pool = ThreadPoolExecutor(self.workers)
        try:
            for batch in batches:
                begun.append([pool.submit(self._open, number) for number in batch])
                if len(begun) > ahead:
                    yield [future.result() for future in begun.popleft()]
            while begun:
                yield [future.result() for future in begun.popleft()]
        finally:  # also where the batches are not wanted any more
            pool.shutdown(cancel_futures=True)

    def _open(self, number: int) -> tuple[R, Tensor | Skipped]:
        record = self.records[number]
        try:
            return record, record.load_tensor(self.prepare)
        except OSError as error:
            if self.strict:
                raise OSError(f"entry {record.index}: {error}") from error
            return record, Skipped(record.index, str(error))

    def _set_aside(self, skipped: Sequence[Skipped]) -> None:
        self.skipped += [one for one in skipped if one not in self.skipped]
