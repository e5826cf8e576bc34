"""Training batches from tar shards, which are streamed and never held as a whole."""

from __future__ import annotations

import random
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice

import numpy as np

from ...data.records import R
from ...data.shards import Sample, Shards, SkippedSample, iterate_samples
from .batches import TRIES, Batches, Opened

Numbered = tuple[int, Sample]  # a sample, and how many the run has drawn before it


@dataclass
class ShardDraws(Batches[R]):
    """Batches out of a stream of samples: epoch after epoch, the shards in an order of its own, shuffled in a buffer.

    Step n is samples n * batch_size ... of that stream; an epoch's last batch is filled from the next. A sample that cannot
    be opened is replaced by the next that can, which so comes twice. Two things are paid for steps that depend on seed and
    step alone:

    - every process reads all shards, and decodes its own share of each step. Processes that read shards of their own would
      read less, and together see other batches than one process does.
    - a run that goes on reads again what it had read, without decoding it, and throws it away.

    buffer: samples, as they are in the files, that shuffling holds in memory. Raises as `iterate_samples`; OSError too where an
    epoch has no sample.
    """

    records: Shards[R]
    buffer: int = 1000

    def steps(self, epochs: float) -> int:
        raise ValueError("samples in shards are not counted beforehand: say how many steps, not how many epochs")

    def first(self, n: int) -> list[R]:
        found: list[R] = []
        with closing(self._epoch(0)) as epoch:
            for number, sample in enumerate(epoch):
                try:
                    record = self._record((number, sample))
                    record.load_images()
                    found.append(record)
                except OSError as error:
                    self._note(self._lost((number, sample), error))
                if len(found) == n:
                    break
        if not found:
            raise self._nothing()
        return found

    def _begin(self, start: int, stop: int, pool: ThreadPoolExecutor) -> Generator[list[Future[Opened[R]]]]:
        """One thread reads on while the others decode."""
        with closing(self._windows(start, stop)) as windows, ThreadPoolExecutor(1) as reader:
            coming = reader.submit(next, windows, None)
            for step in range(start, stop):
                window = coming.result()
                assert window is not None
                coming = reader.submit(next, windows, None)
                opening = []
                for place in self.share:
                    rng = np.random.default_rng((self.seed, step, window[place][0]))
                    opening.append(pool.submit(self._open, rng, window[place:]))
                yield opening

    def _windows(self, start: int, stop: int) -> Generator[list[Numbered]]:
        """The samples of each step, and those behind them that may have to stand in."""
        with closing(self._stream()) as stream:
            numbered = islice(enumerate(stream), start * self.batch_size, None)
            window: list[Numbered] = []
            for _ in range(start, stop):
                window += islice(numbered, self.batch_size + TRIES - 1 - len(window))
                yield window
                window = window[self.batch_size :]

    def _stream(self) -> Generator[Sample]:
        for epoch in count():
            sample = None
            for sample in self._epoch(epoch):
                yield sample
            if sample is None:
                raise self._nothing()

    def _epoch(self, epoch: int) -> Generator[Sample]:
        from webdataset import filters  # of the extra `train`

        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.records.names))
        read = (sample for place in order for sample in iterate_samples(self.records.names[place], self._note))
        shuffle = filters.shuffle(self.buffer, initial=self.buffer, rng=random.Random(f"{self.seed} {epoch}"))
        return shuffle(read)

    def _record(self, one: Numbered) -> R:
        return self.records.record(*one)

    def _lost(self, one: Numbered, error: Exception) -> SkippedSample:
        return SkippedSample(one[1].shard, one[1].key, str(error))

    def _nothing(self) -> OSError:
        last = f"; the last: {self.skipped[-1]}" if self.skipped else ""
        return OSError(
            f"nothing can be read from the {len(self.records.names)} shards, {self.records.names[0]} ...{last}"
        )
