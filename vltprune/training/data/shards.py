"""Training batches from tar shards, which are streamed and never held as a whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Any, Generic

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ...data.records import R
from ...data.shards import Sample, Shards, SkippedSample, iterate_samples
from .loader import TrainLoader
from .opener import TRIES, Batch, Candidate, RecordOpener, collate
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
    - a run that goes on reads again what it had read, without decoding it, and throws it away.

    Args:
        buffer: samples, as they are in the files, that shuffling holds in memory.
    """

    records: Shards[R]
    buffer: int = 1000

    def first(self, n: int) -> list[R]:
        found: list[R] = []
        notes: list[SkippedSample] = []
        with closing(epoch_of(self.records, self.opener.seed, 0, self.buffer, notes.append)) as epoch:
            for number, sample in enumerate(epoch):
                try:
                    record = self.records.record(number, sample)
                    record.load_images()
                    found.append(record)
                except OSError as error:
                    notes.append(SkippedSample(sample.shard, sample.key, str(error)))
                if len(found) == n:
                    break
        self._note(notes)
        if not found:
            raise _nothing(self.records, notes)
        return found

    def steps(self, epochs: float) -> int:
        raise ValueError("samples in shards are not counted beforehand: say how many steps, not how many epochs")

    def _dataset(self, steps: range) -> dict[str, Any]:
        place = positions(self.batch_size, self.rank, self.world)
        dataset = ShardDataset(self.records, self.opener, self.batch_size, place, steps, self.buffer)
        return {"dataset": dataset, "batch_size": None, "collate_fn": _as_it_is}


@dataclass
class ShardDataset(IterableDataset["Batch[R] | OSError"], Generic[R]):
    """Iterable dataset of whole batches, those of `steps`; the DataLoader takes its workers' batches by turns.

    Args:
        positions: where in a step this process's samples stand.
        steps: the steps to go through. Of several workers each decodes every so manieth.
    """

    shards: Shards[R]
    opener: RecordOpener[R]
    batch_size: int
    positions: range
    steps: range
    buffer: int
    notes: list[SkippedSample] = field(default_factory=list)

    def __iter__(self) -> Iterator[Batch[R] | OSError]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        try:
            with closing(self._windows()) as windows:
                for turn, (step, window) in enumerate(zip(self.steps, windows, strict=True)):
                    if turn % workers == worker:
                        yield self._batch(step, window)
        except OSError as error:
            yield error  # raised in a worker, it would come with the worker's traceback as its message

    def _batch(self, step: int, window: list[NumberedSample]) -> Batch[R]:
        opened = []
        for position in self.positions:
            candidates = map(self._candidate, window[position:])
            opened.append(self.opener.open_first(candidates, self.opener.rng(step, window[position][0])))
        notes, self.notes = self.notes, []
        batch = collate(opened)
        return batch._replace(skipped=[*notes, *batch.skipped])

    def _candidate(self, numbered: NumberedSample) -> Candidate[R]:
        sample = numbered[1]
        return partial(self.shards.record, *numbered), partial(SkippedSample, sample.shard, sample.key)

    def _windows(self) -> Generator[list[NumberedSample]]:
        """The samples of each step, and those behind them that may have to stand in."""
        with closing(self._stream()) as stream:
            numbered = islice(enumerate(stream), self.steps.start * self.batch_size, None)
            window: list[NumberedSample] = []
            for _ in self.steps:
                window += islice(numbered, self.batch_size + TRIES - 1 - len(window))
                yield window
                window = window[self.batch_size :]

    def _stream(self) -> Generator[Sample]:
        for epoch in count():
            sample = None
            for sample in epoch_of(self.shards, self.opener.seed, epoch, self.buffer, self.notes.append):
                yield sample
            if sample is None:
                raise _nothing(self.shards, self.notes)


def epoch_of(
    shards: Shards[Any], seed: int, epoch: int, buffer: int, lost: Callable[[SkippedSample], object]
) -> Generator[Sample]:
    """The samples of an epoch, shuffled; `lost` is told of what is cut off."""
    from webdataset import filters  # of the extra `train`

    order = np.random.default_rng((seed, epoch)).permutation(len(shards.names))
    read = (sample for place in order for sample in iterate_samples(shards.names[place], lost))
    return filters.shuffle(buffer, initial=buffer, rng=random.Random(f"{seed} {epoch}"))(read)


def _nothing(shards: Shards[Any], notes: list[SkippedSample]) -> OSError:
    last = f"; the last: {notes[-1]}" if notes else ""
    return OSError(f"nothing can be read from the {len(shards.names)} shards, {shards.names[0]} ...{last}")


def _as_it_is(batch: Batch[R] | OSError) -> Batch[R] | OSError:
    return batch
