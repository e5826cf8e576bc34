"""Which records a step sees: a matter of seed and step alone, so that a run that was stopped goes on as if it never was."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import Skipped
from ..data.records import R

_TRIES = 20  # other records tried in the place of one that cannot be opened
_SMALLEST, _LONGEST = 0.5, 4 / 3  # of a random crop: its share of the picture, and its sides' ratio (BLIP's training)


@dataclass
class Draws(Generic[R]):
    """Batches of records, shuffled anew each epoch, for one process of several.

    batch_size: records a step, of all `world` processes, of which this one, `rank`, opens its share; the rest of an epoch
    that fills no batch is left out. A record whose picture cannot be opened is replaced by another, and noted in `skipped`,
    once; OSError where all are like that. augment: random crops and flips.
    """

    records: Sequence[R]
    prepare: Callable[[Image.Image], Tensor]
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    augment: bool = False
    workers: int = 2
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.batch_size > len(self.records):
            raise ValueError(f"batch_size={self.batch_size} is more than the {len(self.records)} records there are")
        if self.batch_size % self.world:
            raise ValueError(f"batch_size={self.batch_size} cannot be dealt to {self.world} processes evenly")
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.records) // self.batch_size

    def numbers(self, step: int) -> np.ndarray:
        """The places of this process's records of a step."""
        epoch, turn = divmod(step, self.steps_per_epoch)
        share = self.batch_size // self.world
        start = turn * self.batch_size + self.rank * share
        return self._shuffled(epoch)[start : start + share]

    def batches(self, start: int, stop: int) -> Iterator[tuple[list[R], Tensor]]:
        """Records and their images [batch, images a record, 3, height, width] of the steps start .. stop, opened ahead."""
        begun: deque[list[Future[Any]]] = deque()
        pool = ThreadPoolExecutor(max(self.workers, 1))
        try:
            for step in range(start, stop):
                begun.append([pool.submit(self._open, int(number), step) for number in self.numbers(step)])
                if len(begun) > 1:
                    yield self._gather(begun.popleft())
            while begun:
                yield self._gather(begun.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _shuffled(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.records)))
        return self._order[1]

    def _open(self, number: int, step: int) -> tuple[R, Tensor, list[Skipped]]:
        rng, skipped = np.random.default_rng((self.seed, step, number)), []
        for _ in range(_TRIES):
            record = self.records[number]
            try:
                pictures = [self._varied(picture, rng) for picture in record.pictures()]
                return record, torch.stack([self.prepare(picture) for picture in pictures]), skipped
            except OSError as error:
                skipped.append(Skipped(record.index, str(error)))
                number = int(rng.integers(len(self.records)))
        raise OSError(f"{_TRIES} records in a row cannot be opened; the last: {skipped[-1]}")

    def _gather(self, opening: list[Future[Any]]) -> tuple[list[R], Tensor]:
        records, images, skipped = zip(*(future.result() for future in opening), strict=True)
        self.skipped += [one for some in skipped for one in some if one not in self.skipped]
        return list(records), torch.stack(images)

    def _varied(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        return varied(picture, rng) if self.augment else picture


def varied(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random crop, of half the picture's area at least, turned left to right every second time."""
    area = rng.uniform(_SMALLEST, 1.0) * picture.width * picture.height
    ratio = np.exp(rng.uniform(-np.log(_LONGEST), np.log(_LONGEST))) * picture.width / picture.height
    width = min(max(round(np.sqrt(area * ratio)), 1), picture.width)
    height = min(max(round(np.sqrt(area / ratio)), 1), picture.height)
    left, top = rng.integers(picture.width - width + 1), rng.integers(picture.height - height + 1)
    picture = picture.crop((int(left), int(top), int(left) + width, int(top) + height))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture
