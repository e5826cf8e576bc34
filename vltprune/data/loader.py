"""Loader: batches of records and their image tensors, in order; records whose images cannot be decoded are skipped."""

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
    """Iterates over batches of records and their images [batch, images a record, 3, height, width], again and again.

    A batch is smaller by the records that were skipped; a batch that lost all its records is left out. What comes out, and
    when a record is listed in `skipped`, does not depend on `workers`.

    Attributes:
        records: The records of the data set.
        transform: An RGB image to [3, height, width], as `vltprune.transforms(model)` gives it.
        batch_size: Records a batch.
        strict: Whether a missing or broken image is an OSError; otherwise its record is skipped.
        start: The first record.
        stop: The record to stop before; None for the end.
        workers: Threads that decode images ahead of their use; 0 for none.
        skipped: The records that were skipped, each once.
        part: Which of `parts` to load: every `parts`-th batch, from this one.
        parts: How many loaders share the batches; 1 for all of them.
    """

    # Threads, not the processes of torch.utils.data.DataLoader: decoders release the GIL, and records and transforms need
    # not be pickled.

    records: Sequence[R]
    transform: Callable[[Image.Image], Tensor]
    batch_size: int = 16
    strict: bool = False
    start: int = 0
    stop: int | None = None
    workers: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    part: int = 0
    parts: int = 1

    def __len__(self) -> int:
        """The number of records to load."""
        return sum(map(len, self.batches))

    def __iter__(self) -> Iterator[tuple[list[R], Tensor]]:
        batches = self.batches
        for loaded in self._prefetch(batches) if self.workers else (list(map(self._load, batch)) for batch in batches):
            kept = [(record, images) for record, images in loaded if isinstance(images, Tensor)]
            self._list_skipped([images for _, images in loaded if isinstance(images, Skipped)])
            if kept:
                records, images = zip(*kept, strict=True)
                yield list(records), torch.stack(images)

    @property
    def batches(self) -> list[range]:
        """The indices of the records of each batch."""
        indices = range(len(self.records))[self.start : self.stop]
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        return batches[self.part :: self.parts]

    def _prefetch(self, batches: Sequence[range]) -> Iterator[list[tuple[R, Tensor | Skipped]]]:
        """The batches in their order, each begun while those before it are in use."""
        pending, ahead = deque(), 1 + self.workers // self.batch_size
        pool = ThreadPoolExecutor(self.workers)
        try:
            for batch in batches:
                pending.append([pool.submit(self._load, index) for index in batch])
                if len(pending) > ahead:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]
        finally:  # also where the remaining batches are no longer wanted
            pool.shutdown(cancel_futures=True)

    def _load(self, index: int) -> tuple[R, Tensor | Skipped]:
        record = self.records[index]
        try:
            return record, record.load_tensor(self.transform)
        except OSError as error:
            if self.strict:
                raise OSError(f"entry {record.index}: {error}") from error
            return record, Skipped(record.index, str(error))

    def _list_skipped(self, skipped: Sequence[Skipped]) -> None:
        self.skipped += [one for one in skipped if one not in self.skipped]
