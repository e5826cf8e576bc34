"""Records: one small frozen class a task. No image is opened before it is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import EncodedImage, load_image, load_tensor

ImageSource = Path | EncodedImage | np.ndarray


@dataclass(frozen=True)
class Record:
    """index: its place in the annotations, or among what was drawn from shards.

    images: each the path of a picture, its file as bytes, or its pixels, uint8 [height, width, 3].
    """

    index: int
    images: tuple[ImageSource, ...]

    def load_images(self) -> tuple[Image.Image, ...]:
        """The images, opened, as RGB. ImageError that names one which is missing or broken."""
        return tuple(map(load_image, self.images))

    def load_tensor(self, prepare: Callable[[Image.Image], Tensor]) -> Tensor:
        """The images as a model takes them, [images, 3, height, width]. prepare, errors: as of `images.load_tensor`."""
        return torch.stack([load_tensor(image, prepare) for image in self.images])


@dataclass(frozen=True)
class Statement(Record):
    """Natural language visual reasoning: a sentence about two images, 1 true of them or 0 false.

    more: further sentences of the same images and their labels; training may learn from them too.
    """

    sentence: str
    label: int
    more: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Question(Record):
    """Visual question answering. answers: all that people gave, repeated as they were; empty where they are held back.

    is_answer_set: the answers belong together (what is on the desk? a lamp and a cup), and are not one each of several people.
    weight: how much the question counts in training (BLIP gives those of Visual Genome 0.2).
    id, original_id: the question's identifier as a text, and as the annotations have it, None where they have none.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    is_answer_set: bool = False
    weight: float = 1.0
    original_id: str | int | float | None = None

    @property
    def answer_weights(self) -> dict[str, float]:
        """How much each distinct answer counts in training: the part of the people who gave it, times `weight`."""
        return {answer: self.weight * n / len(self.answers) for answer, n in Counter(self.answers).items()}


@dataclass(frozen=True)
class Captioned(Record):
    """An image and what people wrote of it: for captioning, and for retrieval in both directions.

    id, original_id: the image's identifier as a text, and as the annotations have it, None where they have none.
    """

    id: str
    captions: tuple[str, ...]
    original_id: str | int | float | None = None

    @property
    def image_name(self) -> str:
        """Which image it is: equal for records of one image, such as those of files with an entry a caption."""
        path = self.images[0] if self.images else None
        return str(path) if isinstance(path, Path) else self.id


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Skipped:
    """An entry of an annotation file that could not be used, and why."""

    index: int
    reason: str

    def __str__(self) -> str:
        return f"entry {self.index}: {self.reason}"


@dataclass(frozen=True)
class Records(Sequence[R], Generic[R]):
    """The readable records of one file, in its order; those `skipped` could not be read."""

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
