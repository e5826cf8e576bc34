"""Batch sampler keyed by seed and step: which records a step sees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

RecordKey = tuple[int, int]  # step, index of the record: with the seed, what its random numbers depend on


class StepSampler(Sampler[list[RecordKey]]):
    """Batch sampler whose steps depend on the seed and the step alone, so that a resumed run sees the same batches.

    Each epoch is a new permutation of all records. Those at its end that fill no batch are left out.

    Args:
        records: number of records.
        batch_size: records a step, of all processes.
        seed: the run's seed.
        rank: this process; it gets its part of each step.
        world: number of processes.
        steps: the steps to go through.

    Raises:
        ValueError: there are fewer records than `batch_size`, or it does not split evenly over the processes.
    """

    def __init__(
        self, records: int, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1, steps: range = range(0)
    ):
        if batch_size > records:
            raise ValueError(f"batch_size={batch_size} is more than the {records} records: choose a smaller one")
        self.records, self.batch_size, self.seed, self.steps = records, batch_size, seed, steps
        self.positions = positions(batch_size, rank, world)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in all records."""
        return self.records // self.batch_size

    def __iter__(self) -> Iterator[list[RecordKey]]:
        for step in self.steps:
            yield [(step, index) for index in self.indices(step)]

    def indices(self, step: int) -> list[int]:
        """Indices of this process's records of a step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.batch_size
        return self.permutation(epoch)[start + self.positions.start : start + self.positions.stop].tolist()

    def permutation(self, epoch: int) -> np.ndarray:
        """[records] The order of all records in an epoch."""
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.records))
        return self._order[1]


def positions(batch_size: int, rank: int, world: int) -> range:
    """Where in a step the records of one process stand.

    Args:
        batch_size: records a step, of all processes.
        rank: the process.
        world: number of processes.

    Returns:
        The positions of its records in a step, 0 .. batch_size - 1.

    Raises:
        ValueError: the processes cannot get equally many.
    """
    if batch_size % world:
        raise ValueError(
            f"batch_size={batch_size} does not split evenly over {world} processes: choose a multiple of {world}"
        )
    size = batch_size // world
    return range(rank * size, (rank + 1) * size)
