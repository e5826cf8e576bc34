"""Training batches: records opened ahead of their use, sharded over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Generic

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data.records import R

TRIES = 20  # how many are tried until one can be opened
_SMALLEST, _LONGEST = 0.5, 4 / 3  # of a random crop: its share of the picture, and its sides' ratio (BLIP's training)

Opened = tuple[R, Tensor, list[Any]]  # a record, its images, and what could not be opened in its place


@dataclass
class Batches(ABC, Generic[R]):
    """Batches of records. What a step sees depends on seed and step alone, so that a run that was stopped goes on the same.

    records: where they come from. batch_size: records a step, of all `world` processes, of which this one, `rank`, opens
    its share. What cannot be opened is replaced, and noted in `skipped`, once; OSError where `TRIES` in a row are like that.
    augment: random crops and flips. workers: threads that open. check: raises ValueError for a record that cannot be used for
    another reason than its pictures; it is replaced as well.
    """

    records: Any
    prepare: Callable[[Image.Image], Tensor]
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    augment: bool = False
    workers: int = 2
    skipped: list[Any] = field(default_factory=list)
    check: Callable[[Any], object] | None = None

    def __post_init__(self) -> None:
        if self.batch_size % self.world:
            raise ValueError(f"batch_size={self.batch_size} cannot be dealt to {self.world} processes evenly")

    @abstractmethod
    def first(self, n: int) -> list[R]:
        """Some records to start from, n or all there are; the same in every process."""

    @abstractmethod
    def steps(self, epochs: float) -> int:
        """How many steps so many epochs are, one at least. ValueError where that cannot be known."""

    @property
    def share(self) -> range:
        """The places in a step of what this process opens."""
        size = self.batch_size // self.world
        return range(self.rank * size, (self.rank + 1) * size)

    def batches(self, start: int, stop: int) -> Iterator[tuple[list[R], Tensor]]:
        """Records and their images [batch, images a record, 3, height, width] of the steps start .. stop, opened ahead."""
        begun: deque[list[Future[Opened[R]]]] = deque()
        pool = ThreadPoolExecutor(max(self.workers, 1))
        try:
            for opening in self._begin(start, stop, pool):
                begun.append(opening)
                if len(begun) > 1:
                    yield self._gather(begun.popleft())
            while begun:
                yield self._gather(begun.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    @abstractmethod
    def _begin(self, start: int, stop: int, pool: ThreadPoolExecutor) -> Iterator[list[Future[Opened[R]]]]:
        """The openings of each step's share, begun."""

    @abstractmethod
    def _record(self, one: Any) -> R:
        """OSError that says why it cannot be read."""

    @abstractmethod
    def _lost(self, one: Any, error: Exception) -> Any:
        """What `skipped` says of one that cannot be opened."""

    def _open(self, rng: np.random.Generator, several: Iterable[Any]) -> Opened[R]:
        """The first of several that can be opened."""
        lost = []
        for one in islice(several, TRIES):
            try:
                record = self._record(one)
                if self.check is not None:
                    self.check(record)
                return record, record.load_tensor(partial(self._prepare, rng)), lost
            except (OSError, ValueError) as error:
                lost.append(self._lost(one, error))
        raise OSError(f"{TRIES} records in a row cannot be opened; the last: {lost[-1]}")

    def _prepare(self, rng: np.random.Generator, picture: Image.Image) -> Tensor:
        return self.prepare(varied(picture, rng) if self.augment else picture)

    def _gather(self, opening: list[Future[Opened[R]]]) -> tuple[list[R], Tensor]:
        records, images, lost = zip(*(future.result() for future in opening), strict=True)
        for some in lost:
            self._note(*some)
        return list(records), torch.stack(images)

    def _note(self, *lost: Any) -> None:
        self.skipped += [one for one in lost if one not in self.skipped]


def varied(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random crop, of half the picture's area at least, turned left to right every second time."""
    area = rng.uniform(_SMALLEST, 1.0) * picture.width * picture.height
    ratio = np.exp(rng.uniform(-np.log(_LONGEST), np.log(_LONGEST))) * picture.width / picture.height
    width = min(max(round(np.sqrt(area * ratio)), 1), picture.width)
    height = min(max(round(np.sqrt(area / ratio)), 1), picture.height)
    left, top = rng.integers(picture.width - width + 1), rng.integers(picture.height - height + 1)
    picture = picture.crop((int(left), int(top), int(left) + width, int(top) + height))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture
