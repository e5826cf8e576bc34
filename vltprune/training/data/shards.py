"""Training batches from tar shards, which are streamed and never held as a whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, Generic

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ...data.records import R
from ...data.shards import Sample, Shards, SkippedSample, iterate_samples
from .loader import TrainLoader
from .opener import TRIES, Batch, Candidate, Opened
from .sampler import positions

NumberedSample = tuple[int, Sample]  # a sample, and how many the run has read before it


@dataclass
class ShardLoader(TrainLoader[R]):
    """Batches out of a stream of samples: epoch after epoch, the shards in a new order, shuffled in a buffer.

    Step n is samples n * batch_size ... of that stream; an epoch's last batch is filled from the next. A sample that cannot
    be opened is replaced by the next that can, which so comes twice. Two things are paid for steps that depend on seed and
    step alone:

    - every process, and every worker of it, reads all shards, and decodes its own part. Processes that read shards of their
      own would read less, and together see other batches than one process does.
    - a run that resumes reads again what it had read, without decoding it, and discards it.

    Args:
        records: the shards.
        opener, batch_size, rank, world, workers, pin_memory, skipped: as of `TrainLoader`.
        buffer: samples, as they are in the files, that shuffling holds in memory.
    """

    records: Shards[R]
    buffer: int = 1000

    def first(self, n: int) -> list[R]:
        records: list[R] = []
        with closing(self.epoch(0, self._note_one)) as samples:
            for number, sample in enumerate(samples):
                try:
                    record = self.records.record(number, sample)
                    record.load_images()
                    records.append(record)
                except OSError as error:
                    self._note_one(SkippedSample(sample.shard, sample.key, str(error)))
                if len(records) == n:
                    break
        if not records:
            raise self.no_samples(self.skipped)
        return records

    def steps(self, epochs: float) -> int:
        raise ValueError("samples in shards are not counted beforehand: say how many steps, not how many epochs")

    def epoch(self, number: int, note: Callable[[SkippedSample], object]) -> Generator[Sample]:
        """The samples of an epoch, in its own order of shards, and shuffled.

        Args:
            number: of the epoch, from 0; with the seed it determines the order.
            note: called with what is cut off where a shard ends too early.

        Returns:
            A generator of the samples. Close it, so that open shards are closed.

        Raises:
            OSError: a shard cannot be opened or read; it comes as the samples are read.
        """
        from webdataset import filters  # of the extra `train`

        seed, names = self.opener.seed, self.records.names
        order = np.random.default_rng((seed, number)).permutation(len(names))
        samples = (sample for shard in order for sample in iterate_samples(names[shard], note))
        return filters.shuffle(self.buffer, initial=self.buffer, rng=random.Random(f"{seed} {number}"))(samples)

    def no_samples(self, notes: Sequence[Any]) -> OSError:
        """The error for shards that hold nothing."""
        last = f"; the last: {notes[-1]}" if notes else ""
        names = self.records.names
        return OSError(f"nothing can be read from the {len(names)} shards, {names[0]} ...{last}")

    def _note_one(self, note: SkippedSample) -> None:
        self._note([note])

    def _dataset(self, steps: range) -> dict[str, Any]:
        return {"dataset": ShardDataset(self, steps)}


class ShardDataset(IterableDataset["Batch[R] | OSError"], Generic[R]):
    """Iterable dataset of the batches of some steps. Of several workers each decodes every so many-th step.

    A DataLoader takes one batch of each worker in rotation, so that they come in the order of the steps.

    Args:
        loader: whose stream of samples is cut into steps.
        steps: the steps to go through.

    Raises:
        ValueError: `batch_size` does not split evenly over the processes.
    """

    def __init__(self, loader: ShardLoader[R], steps: range):
        self.loader, self.steps = loader, steps
        self.positions = positions(loader.batch_size, loader.rank, loader.world)
        self.notes: list[SkippedSample] = []

    def __iter__(self) -> Iterator[Batch[R] | OSError]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        try:
            with closing(self._windows()) as windows:
                for index, (step, window) in enumerate(zip(self.steps, windows, strict=True)):
                    if index % workers == worker:
                        yield Batch.collate(
                            [self._open(step, window[position:]) for position in self.positions], self.notes
                        )
                        self.notes.clear()
        except OSError as error:
            yield error  # raised in a worker, it would have the worker's traceback as its message

    def _open(self, step: int, window: list[NumberedSample]) -> Opened[R]:
        return self.loader.opener.open_first(map(self._candidate, window), self.loader.opener.rng(step, window[0][0]))

    def _candidate(self, numbered: NumberedSample) -> Candidate[R]:
        sample = numbered[1]
        return partial(self.loader.records.record, *numbered), partial(SkippedSample, sample.shard, sample.key)

    def _windows(self) -> Generator[list[NumberedSample]]:
        """The samples of each step, and those after them that may replace them."""
        size = self.loader.batch_size
        with closing(self._stream()) as stream:
            numbered = islice(enumerate(stream), self.steps.start * size, None)
            window: list[NumberedSample] = []
            for _ in self.steps:
                window += islice(numbered, size + TRIES - 1 - len(window))
                yield window
                window = window[size:]

    def _stream(self) -> Generator[Sample]:
        for number in count():
            sample = None
            for sample in self.loader.epoch(number, self.notes.append):
                yield sample
            if sample is None:
                raise self.loader.no_samples(self.notes)
