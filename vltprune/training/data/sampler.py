"""Index sampler: batches of record indices, shuffled anew each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ...data import Skipped
from ...data.records import R
from .batches import Batches, Opened


@dataclass
class Draws(Batches[R]):
    """Batches that see each record once an epoch; the rest of an epoch that fills no batch is left out.

    records: any sequence. One that cannot be opened is replaced by another, drawn at random.
    """

    records: Sequence[R]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size > len(self.records):
            raise ValueError(f"batch_size={self.batch_size} is more than the {len(self.records)} records there are")
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.records) // self.batch_size

    def steps(self, epochs: float) -> int:
        return max(round(epochs * self.steps_per_epoch), 1)

    def first(self, n: int) -> list[R]:
        return [self.records[int(number)] for number in self._shuffled(0)[:n]]

    def numbers(self, step: int) -> np.ndarray:
        """The places of this process's records of a step."""
        epoch, turn = divmod(step, self.steps_per_epoch)
        start = turn * self.batch_size
        return self._shuffled(epoch)[start + self.share.start : start + self.share.stop]

    def _begin(self, start: int, stop: int, pool: ThreadPoolExecutor) -> Iterator[list[Future[Opened[R]]]]:
        for step in range(start, stop):
            opening = []
            for number in map(int, self.numbers(step)):
                rng = np.random.default_rng((self.seed, step, number))
                opening.append(pool.submit(self._open, rng, self._instead(number, rng)))
            yield opening

    def _instead(self, number: int, rng: np.random.Generator) -> Iterator[R]:
        """A record, and others in its place."""
        while True:
            yield self.records[number]
            number = int(rng.integers(len(self.records)))

    def _record(self, one: R) -> R:
        return one

    def _lost(self, one: R, error: Exception) -> Skipped:
        return Skipped(one.index, str(error))

    def _shuffled(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.records)))
        return self._order[1]
