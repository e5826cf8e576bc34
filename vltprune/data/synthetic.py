"""Synthetic NLVR: image pairs with true and false sentences, generated from a seed, without a download.

An item is two 96 px images and K sentences, each true or false of the pair. How it is distributed:

- Each image holds 3 to 6 shapes that do not touch, on clutter. A shape is a circle, square, triangle, star or cross.
  It is red, green, blue, yellow, purple or white, and small (14 to 17 px) or large (23 to 27 px). The two images share
  how likely each shape and each color is: one draw from a Dirichlet(1.5) per pair.
- The sentence families (existence, attribute, count, comparison, spatial, negation) take turns: sentence j of item i
  belongs to family (i K + j) mod 6. Where that family has no sentence that could be either true or false of the pair,
  the next family is used.
- A sentence is true with probability one half, given the images alone and given the words alone (see `sentences`).

Item i of a split depends on the split, the seed, i and K, and on nothing else; its images not even on K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from vltprune.data.drawing import SIDE, Scene, draw_scenes, paint
from vltprune.data.records import Statement
from vltprune.data.sentences import FAMILIES, draw_sentence

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SyntheticPair:
    """Two synthetic images with sentences about them, and what the images show.

    Attributes:
        images: uint8 [2, 96, 96, 3], left before right.
        sentences: The sentences about the pair.
        labels: int64 [sentences], 1 for true and 0 for false.
        families: The family of each sentence, one of `sentences.FAMILIES`.
        object_map: uint8 [2, 96, 96], the object at each pixel: 0 for the background, i + 1 for `scenes[side][i]`.
        scenes: The objects of the left and the right image.
    """

    images: np.ndarray
    sentences: tuple[str, ...]
    labels: np.ndarray
    families: tuple[str, ...]
    object_map: np.ndarray
    scenes: tuple[Scene, Scene]


class SyntheticPairs:
    """The image pairs of a split of synthetic NLVR, generated on access (some milliseconds each)."""

    def __init__(self, split: str, size: int, seed: int = 0, sentences: int = 1) -> None:
        """Describe the split; nothing is generated yet.

        Args:
            split: "train", "val" or "test".
            size: The number of pairs.
            seed: The seed of the whole split.
            sentences: Sentences a pair.

        Raises:
            ValueError: If there is no such split, or if a number is below 1.
        """
        if split not in SPLITS:
            raise ValueError(f"SyntheticPairs has no split {split!r}; it has {', '.join(SPLITS)}")
        if size < 1 or sentences < 1:
            raise ValueError(f"SyntheticPairs needs at least one pair and one sentence, got {size=} and {sentences=}")
        self.split, self.size, self.seed, self.sentences = split, size, seed, sentences

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> SyntheticPair:
        if not 0 <= index < self.size:
            raise IndexError(f"there is no pair {index}: the split has {self.size}, 0 .. {self.size - 1}")
        key = (SPLITS.index(self.split), self.seed, index)
        scenes = draw_scenes(np.random.default_rng((*key, 0)))
        painted = [paint(scene, np.random.default_rng((*key, 1, side))) for side, scene in enumerate(scenes)]
        statements = self._statements(scenes, index, np.random.default_rng((*key, 2)))

        images, object_map = (np.stack(arrays) for arrays in zip(*painted, strict=True))
        texts, labels, families = zip(*statements, strict=True)
        return SyntheticPair(images, texts, np.array(labels, np.int64), families, object_map, scenes)

    def _statements(
        self, scenes: tuple[Scene, Scene], index: int, rng: np.random.Generator
    ) -> list[tuple[str, int, str]]:
        """The sentence, label and family of each statement about a pair."""
        statements = []
        for number in range(index * self.sentences, (index + 1) * self.sentences):
            # Existence can always be true or false: thirty colored shapes are never all there, nor all missing.
            for offset in range(len(FAMILIES)):
                family = FAMILIES[(number + offset) % len(FAMILIES)]
                statement = draw_sentence(scenes, family, rng)
                if statement is not None:
                    statements.append((statement[0], int(statement[1]), family))
                    break
        return statements


def normalize(images: np.ndarray) -> np.ndarray:
    """Turn synthetic images into a model's input.

    Args:
        images: uint8 [..., 96, 96, 3].

    Returns:
        float32 [..., 3, 96, 96] between -1 and 1.

    Raises:
        ValueError: If the images have another shape.
    """
    if images.shape[-3:] != (SIDE, SIDE, 3):
        raise ValueError(f"expected images [..., {SIDE}, {SIDE}, 3], got {list(images.shape)}")
    return np.moveaxis(images, -1, -3).astype(np.float32) / 127.5 - 1


class SyntheticNLVR(Sequence[Statement]):
    """Synthetic NLVR as a data set: the pairs of a split as the records that NLVR2 has, generated on access.

    The first sentence of a pair is its record's; the others are in `more`.

    Args:
        split: "train", "val" or "test".
        size: The number of pairs, and so of records.
        seed: The seed of the whole split.
        sentences: Sentences a pair.

    Attributes:
        pairs: The pairs, with what their images show.

    Raises:
        ValueError: If there is no such split, or if a number is below 1.
    """

    def __init__(self, split: str, size: int, seed: int = 0, sentences: int = 1) -> None:
        self.pairs = SyntheticPairs(split, size, seed, sentences)

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Statement: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Statement]: ...
    def __getitem__(self, index: int | slice) -> Statement | Sequence[Statement]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        pair = self.pairs[index]
        (sentence, label), *more = zip(pair.sentences, pair.labels.tolist(), strict=True)
        return Statement(index, tuple(pair.images), sentence, label, tuple(more))
