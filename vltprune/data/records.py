"""Records: one frozen class a task, whose images are decoded on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar, overload

import torch
from PIL import Image
from torch import Tensor

from .images import ImageSource, load_image, load_tensor


@dataclass(frozen=True)
class Record:
    """One sample of a data set.

    Attributes:
        index: Its index in the annotation file, or among the samples drawn from shards.
        images: Each the path of an image, its file as bytes, or its pixels, uint8 [height, width, 3].
    """

    index: int
    images: tuple[ImageSource, ...]

    def load_images(self) -> tuple[Image.Image, ...]:
        """Decode the images to RGB.

        Raises:
            ImageError: If an image is missing or broken.
        """
        return tuple(map(load_image, self.images))

    def load_tensor(self, transform: Callable[[Image.Image], Tensor]) -> Tensor:
        """Decode the images and transform them to a model's input.

        Args:
            transform: As of `images.load_tensor`.

        Returns:
            The input, [images, 3, height, width].

        Raises:
            ImageError: If an image is missing or broken, or if `transform` refuses it.
        """
        return torch.stack([load_tensor(image, transform) for image in self.images])


@dataclass(frozen=True)
class Statement(Record):
    """Natural language visual reasoning: a sentence that is true or false of two images.

    Attributes:
        index: As of `Record`.
        images: The left and the right image, as of `Record`.
        sentence: The sentence.
        label: 1 for true, 0 for false.
        more: Further sentences about the same images, with their labels; training may use them.
    """

    sentence: str
    label: int
    more: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Question(Record):
    """Visual question answering: a question about an image.

    Attributes:
        index: As of `Record`.
        images: The image alone, as of `Record`.
        id: The question's identifier as text.
        question: The question.
        answers: One answer a person, repeated as given; empty where a data set withholds them.
        is_answer_set: Whether the answers form one answer (what is on the desk? a lamp and a cup), not one a person.
        weight: The question's weight in training; BLIP gives questions of Visual Genome 0.2.
        original_id: The identifier as the annotations have it, None where they have none.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    is_answer_set: bool = False
    weight: float = 1.0
    original_id: str | int | float | None = None

    @property
    def answer_weights(self) -> dict[str, float]:
        """The training weight of each distinct answer: the share of people who gave it, times `weight`."""
        return {answer: self.weight * n / len(self.answers) for answer, n in Counter(self.answers).items()}


@dataclass(frozen=True)
class Captioned(Record):
    """An image and its captions, for captioning and for retrieval in both directions.

    Attributes:
        index: As of `Record`.
        images: The image alone, as of `Record`.
        id: The image's identifier as text.
        captions: What people wrote.
        original_id: The identifier as the annotations have it, None where they have none.
    """

    id: str
    captions: tuple[str, ...]
    original_id: str | int | float | None = None

    @property
    def image_name(self) -> str:
        """The image's name, equal for records of one image, as in files with an entry a caption."""
        path = self.images[0] if self.images else None
        return str(path) if isinstance(path, Path) else self.id


R = TypeVar("R", bound=Record)


def with_one_text(record: R) -> R:
    """A record with the first of its captions: an image and one text are what an instance costs."""
    return replace(record, captions=record.captions[:1]) if hasattr(record, "captions") else record


@dataclass(frozen=True)
class Skipped:
    """An entry of an annotation file that could not be used.

    Attributes:
        index: Its index in the file.
        reason: What is wrong with it.
    """

    index: int
    reason: str

    def __str__(self) -> str:
        return f"entry {self.index}: {self.reason}"


@dataclass(frozen=True)
class Records(Sequence[R], Generic[R]):
    """The records of one annotation file, in its order.

    Attributes:
        file: The annotation file.
        records: The records that could be parsed.
        skipped: The entries that could not, with the reasons.
    """

    file: Path
    records: tuple[R, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[R]: ...
    def __getitem__(self, index: int | slice) -> R | Sequence[R]:
        return self.records[index]
