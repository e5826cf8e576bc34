"""Synthetic NLVR: image pairs with true and false sentences, generated from a seed, without a download.

An item is two 96 px images and K sentences, each true or false of the pair. How it is distributed:

- Each image holds 3 to 6 things that do not touch, on clutter. A thing is a circle, square, triangle, star or cross;
  red, green, blue, yellow, purple or white; small (14 to 17 px) or large (23 to 27 px). How likely each shape and each
  color is, the two images share: one draw from a Dirichlet(1.5) per pair.
- The sentence families (existence, attribute, count, comparison, spatial, negation) take turns: sentence j of item i
  belongs to family (i K + j) mod 6, unless that family has nothing to say that could be either true or false of the
  pair; then the next one speaks.
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
from vltprune.data.sentences import FAMILIES, say

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SyntheticPair:
    """Two images, what is said of them, and what is in them.

    `images` uint8 [2, 96, 96, 3], left then right. `sentences`, `labels` (1 true, 0 false) and `families` have one
    entry per sentence. `object_map` uint8 [2, 96, 96] says whose each pixel is: 0 the ground's, i + 1 `scenes[side][i]`'s.
    """

    images: np.ndarray
    sentences: tuple[str, ...]
    labels: np.ndarray
    families: tuple[str, ...]
    object_map: np.ndarray
    scenes: tuple[Scene, Scene]

    def attribute_maps(self) -> np.ndarray:
        """Shape, color and size at each pixel, uint8 [3, 2, 96, 96]: 0 on the ground, else 1 + the index."""
        tables = np.zeros((2, 3, max(map(len, self.scenes)) + 1), np.uint8)
        for side, scene in enumerate(self.scenes):
            for index, thing in enumerate(scene, start=1):
                tables[side, :, index] = np.array(thing[:3]) + 1
        return np.stack([tables[side][:, self.object_map[side]] for side in range(2)], axis=1)


class SyntheticPairs:
    """The pairs of a split, drawn when asked for (some milliseconds each).

    `split` is "train", "val" or "test"; `size` how many pairs; `seed` another draw of them all; `sentences` how many
    sentences each pair carries.
    """

    def __init__(self, split: str, size: int, seed: int = 0, sentences: int = 1) -> None:
        if split not in SPLITS:
            raise ValueError(f"SyntheticPairs has no split {split!r}; it has {', '.join(SPLITS)}")
        if size < 1 or sentences < 1:
            raise ValueError(f"SyntheticPairs needs at least one pair and one sentence, got {size=} and {sentences=}")
        self.split, self.size, self.seed, self.sentences = split, size, seed, sentences

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> SyntheticPair:
        if not 0 <= index < self.size:
            raise IndexError(f"pair {index} of {self.size}")
        key = (SPLITS.index(self.split), self.seed, index)
        scenes = draw_scenes(np.random.default_rng((*key, 0)))
        painted = [paint(scene, np.random.default_rng((*key, 1, side))) for side, scene in enumerate(scenes)]
        said = self._say(scenes, index, np.random.default_rng((*key, 2)))

        images, object_map = (np.stack(arrays) for arrays in zip(*painted, strict=True))
        texts, labels, families = zip(*said, strict=True)
        return SyntheticPair(images, texts, np.array(labels, np.int64), families, object_map, scenes)

    def _say(self, scenes: tuple[Scene, Scene], index: int, rng: np.random.Generator) -> list[tuple[str, int, str]]:
        said = []
        for turn in range(index * self.sentences, (index + 1) * self.sentences):
            # Existence can always go both ways: thirty colored shapes are never all there, nor all missing.
            for step in range(len(FAMILIES)):
                family = FAMILIES[(turn + step) % len(FAMILIES)]
                answer = say(scenes, family, rng)
                if answer is not None:
                    said.append((answer[0], int(answer[1]), family))
                    break
        return said


def normalize(images: np.ndarray) -> np.ndarray:
    """uint8 images [..., 96, 96, 3] as the models take them: float32 [..., 3, 96, 96] between -1 and 1."""
    if images.shape[-3:] != (SIDE, SIDE, 3):
        raise ValueError(f"expected images [..., {SIDE}, {SIDE}, 3], got {list(images.shape)}")
    return np.moveaxis(images, -1, -3).astype(np.float32) / 127.5 - 1


class SyntheticNLVR(Sequence[Statement]):
    """The pairs of a split as the records that NLVR2 has too, drawn when asked for: each with a sentence, and `more`."""

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
