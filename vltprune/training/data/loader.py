"""Training loader: a DataLoader whose batches depend on seed and step alone, for any number of workers."""

from __future__ import annotations

import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...data import Skipped
from ...data.records import R
from .opener import Batch, Candidate, Opened, RecordOpener
from .sampler import RecordKey, StepSampler

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

T = TypeVar("T")


@dataclass
class TrainLoader(ABC, Generic[R]):
    """Training batches of one process. What cannot be opened is replaced, and noted in `skipped`, once.

    Args:
        records: where records come from.
        opener: opens them.
        batch_size: records a step, of all processes.
        rank: this process; it opens its part of each step.
        world: number of processes.
        workers: worker processes that open records ahead of their use (0: none). They are forked, so that they share the
            records' memory; on systems other than Linux, where that is not safe, there are none.
        pin_memory: whether images are copied to page-locked memory, for a GPU.
        skipped: notes of what could not be opened so far, each once.
    """

    records: Any
    opener: RecordOpener[R]
    batch_size: int
    rank: int = 0
    world: int = 1
    workers: int = 0
    pin_memory: bool = False
    skipped: list[Any] = field(default_factory=list)

    @abstractmethod
    def first(self, n: int) -> list[R]:
        """The first n records, or all there are; the same in every process."""

    @abstractmethod
    def steps(self, epochs: float) -> int:
        """Number of steps in so many epochs, at least one.

        Raises:
            ValueError: the number of records is not known.
        """

    @abstractmethod
    def _dataset(self, steps: range) -> dict[str, Any]:
        """Dataset, and sampler, of whole batches; an OSError in place of a batch ends the run."""

    def batches(self, start: int, stop: int) -> Generator[tuple[list[R], Tensor]]:
        """Batches of the steps start .. stop, in their order.

        Args:
            start: first step, counted from 0.
            stop: step to stop before.

        Yields:
            This process's records of a step, and their images [batch, images a record, 3, height, width].

        Raises:
            OSError: nothing can be opened for a step.
        """
        workers = self.workers if sys.platform == "linux" else 0
        loader = DataLoader(
            **self._dataset(range(start, stop)),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_ignore_signals,
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # else it would draw from the run's random numbers
        )
        for batch in _started(loader):
            if isinstance(batch, OSError):
                raise batch
            self._note(batch.skipped)
            yield batch.records, batch.images

    def _note(self, skipped: Sequence[Any]) -> None:
        self.skipped += [note for note in dict.fromkeys(skipped) if note not in self.skipped]


@dataclass
class RecordLoader(TrainLoader[R]):
    """Batches of a sequence of records. One that cannot be opened is replaced by another, drawn at random.

    Args:
        records: the records, in any order.
        opener, batch_size, rank, world, workers, pin_memory, skipped: as of `TrainLoader`.

    Raises:
        ValueError: `batch_size` is more than the records, or does not split evenly over the processes.
    """

    records: Sequence[R]

    def __post_init__(self) -> None:
        self._sampler()  # wrong numbers fail here

    def first(self, n: int) -> list[R]:
        return [self.records[int(index)] for index in self._sampler().permutation(0)[:n]]

    def steps(self, epochs: float) -> int:
        return max(round(epochs * self._sampler().steps_per_epoch), 1)

    def _sampler(self, steps: range = range(0)) -> StepSampler:
        return StepSampler(len(self.records), self.batch_size, self.opener.seed, self.rank, self.world, steps)

    def _dataset(self, steps: range) -> dict[str, Any]:
        return {"dataset": RecordDataset(self.records, self.opener), "sampler": self._sampler(steps)}


class RecordDataset(Dataset["Batch[R] | OSError"], Generic[R]):
    """Dataset of batches of opened records, by the keys (step, index) that a `StepSampler` gives.

    Args:
        records: the records.
        opener: opens them.
    """

    def __init__(self, records: Sequence[R], opener: RecordOpener[R]):
        self.records, self.opener = records, opener

    def __getitem__(self, keys: Sequence[RecordKey]) -> Batch[R] | OSError:
        try:
            return Batch.collate(self._open(*key) for key in keys)
        except OSError as error:
            return error  # raised in a worker, it would have the worker's traceback as its message

    def _open(self, step: int, index: int) -> Opened[R]:
        rng = self.opener.rng(step, index)
        return self.opener.open_first(self._candidates(index, rng), rng)

    def _candidates(self, index: int, rng: np.random.Generator) -> Iterator[Candidate[R]]:
        """The record, then others drawn at random."""
        while True:
            record = self.records[index]
            yield partial(_unchanged, record), partial(Skipped, record.index)
            index = int(rng.integers(len(self.records)))


def _unchanged(value: T) -> T:
    return value


def _started(loader: DataLoader[T]) -> Iterator[T]:
    """Iterator of a loader. Its workers are forked with signals blocked, and unblock them once they ignore them.

    Do not assign it to a variable of a generator: a traceback would keep it, and its workers, until Python exits. Python
    then ends them by SIGTERM, which they ignore, and waits for them forever.
    """
    if not loader.num_workers:
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM, which may be sent to workers as well, end a run behind its step, which needs them."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
