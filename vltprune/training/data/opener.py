"""Record opener: a record and its images, or a replacement where it cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Generic, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data.records import R

TRIES = 20  # candidates in a row before a run gives up

# BLIP's random crop: the least part of the area, and the largest ratio of the sides
_LEAST_AREA, _LARGEST_RATIO = 0.5, 4 / 3

# loads a record, and makes the note of why it was skipped
Candidate = tuple[Callable[[], R], Callable[[str], Any]]


Opened = tuple[R, Tensor, list[Any]]  # a record, its images [images a record, 3, height, width], notes of skipped ones


class Batch(NamedTuple, Generic[R]):
    """Batch of a step: records, their images, and notes of what was skipped.

    Attributes:
        records: those that were opened.
        images: [batch, images a record, 3, height, width].
        skipped: notes of what could not be used.
    """

    records: list[R]
    images: Tensor
    skipped: list[Any]

    @classmethod
    def collate(cls, opened: Iterable[Opened[R]], notes: Iterable[Any] = ()) -> Batch[R]:
        """Builds a batch from opened records.

        Args:
            opened: at least one; the records have equally many images, of one size.
            notes: of what was skipped besides.

        Returns:
            The batch.
        """
        records, images, skipped = zip(*opened, strict=True)
        return cls(list(records), torch.stack(images), [*notes, *chain.from_iterable(skipped)])


@dataclass
class RecordOpener(Generic[R]):
    """Opens records for training. Random numbers depend on the seed, the step and the record's index alone.

    Args:
        prepare: an image to what the model takes, [3, height, width].
        seed: the run's seed.
        augment: whether images are cropped and flipped at random.
        check: raises ValueError for a record that cannot be used for another reason than its images.
    """

    prepare: Callable[[Image.Image], Tensor]
    seed: int = 0
    augment: bool = False
    check: Callable[[R], object] | None = None

    def rng(self, step: int, index: int) -> np.random.Generator:
        """The random numbers of one record in one step.

        Args:
            step: of the run.
            index: of the record.

        Returns:
            A generator that depends on the seed and these two alone.
        """
        return np.random.default_rng((self.seed, step, index))

    def open_first(self, candidates: Iterable[Candidate[R]], rng: np.random.Generator) -> Opened[R]:
        """Opens the first candidate that can be used.

        Args:
            candidates: in the order of preference; each loads a record, and makes the note if it cannot be used.
            rng: draws the crops, where `augment` is set.

        Returns:
            The record, its images [images a record, 3, height, width], and the notes of those before it.

        Raises:
            OSError: `TRIES` candidates in a row cannot be used.
        """
        skipped = []
        for load, note in islice(candidates, TRIES):
            try:
                record = load()
                if self.check is not None:
                    self.check(record)
                return record, record.load_tensor(partial(self._prepare, rng)), skipped
            except (OSError, ValueError) as error:
                skipped.append(note(str(error)))
        raise OSError(f"{TRIES} records in a row cannot be opened; the last: {skipped[-1]}")

    def _prepare(self, rng: np.random.Generator, image: Image.Image) -> Tensor:
        return self.prepare(random_crop(image, rng) if self.augment else image)


def random_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random crop of at least half the image's area, flipped horizontally half of the time.

    Args:
        image: of any size; no side of the crop is longer.
        rng: draws the area, the ratio of the sides, the position, and the flip.

    Returns:
        The crop, whose ratio of sides is that of the image times 3/4 .. 4/3, as far as it fits.
    """
    area = rng.uniform(_LEAST_AREA, 1.0) * image.width * image.height
    log_ratio = np.log(_LARGEST_RATIO)
    ratio = np.exp(rng.uniform(-log_ratio, log_ratio)) * image.width / image.height
    width = min(max(round(np.sqrt(area * ratio)), 1), image.width)
    height = min(max(round(np.sqrt(area / ratio)), 1), image.height)
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    image = image.crop((int(left), int(top), int(left) + width, int(top) + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
