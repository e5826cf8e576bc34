"""Where `train_nlvr_tiny.py` keeps what it would otherwise compute every epoch: drawn pairs, and frozen image tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from nlvr_tiny_targets import patch_targets
from torch import Tensor

from vltprune.data import SyntheticPairs
from vltprune.data.drawing import SIDE
from vltprune.data.sentences import FAMILIES
from vltprune.data.words import WordTokenizer
from vltprune.models.blip import BlipNlvr

PATCH = 8
CELLS = (SIDE // PATCH) ** 2
LENGTH = 16  # tokens of the longest sentence


class Drawn:
    """The pairs of a split in memory maps under a folder, drawn on first use (about 10 ms a pair)."""

    def __init__(self, folder: Path, split: str, size: int, sentences: int) -> None:
        self.split, self.size, self.sentences = split, size, sentences
        self.folder = folder / f"{split}_{size}_{sentences}"
        shapes = {"images": (2, SIDE, SIDE, 3), "targets": (2, CELLS, 6), "ids": (sentences, LENGTH)}
        shapes |= {"labels": (sentences,), "families": (sentences,)}
        self.shapes = {name: (size, *shape) for name, shape in shapes.items()}
        if not (self.folder / "done").exists():
            self._draw()
        self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in self.shapes}

    def _draw(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        maps = {}
        for name, shape in self.shapes.items():
            maps[name] = np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", np.uint8, shape)

        words, pairs = WordTokenizer(), SyntheticPairs(self.split, self.size, sentences=self.sentences)
        for index in range(self.size):
            pair = pairs[index]
            ids = words.encode(pair.sentences)[0].numpy()
            maps["images"][index], maps["targets"][index] = pair.images, patch_targets(pair, PATCH)
            maps["ids"][index, :, : ids.shape[1]], maps["labels"][index] = ids, pair.labels
            maps["families"][index] = [FAMILIES.index(family) for family in pair.families]
        (self.folder / "done").touch()

    def images(self, rows: np.ndarray) -> Tensor:
        """Normalised images [2 * rows, 3, SIDE, SIDE], each pair's two in turn."""
        raw = torch.from_numpy(self.arrays["images"][rows]).flatten(0, 1)
        return raw.permute(0, 3, 1, 2).float() / 127.5 - 1

    def targets(self, rows: np.ndarray) -> Tensor:
        """Patch targets [2 * rows, CELLS, 6]."""
        return torch.from_numpy(self.arrays["targets"][rows]).flatten(0, 1)

    def said(self, rows: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, mask, labels, families of the chosen sentences [rows, k], flattened and cut to the longest."""
        ids, labels, families = (self.arrays[name][rows[:, None], chosen] for name in ("ids", "labels", "families"))
        ids = torch.from_numpy(ids).flatten(0, 1).long()
        ids = ids[:, : int((ids > 0).sum(1).max())]
        return ids, (ids > 0).long(), *(torch.from_numpy(part).flatten().long() for part in (labels, families))


class ImageTokens:
    """A frozen image tower's tokens of every drawn pair, fp16 in a memory map; computed on first use."""

    def __init__(self, folder: Path, model: BlipNlvr, pairs: Drawn) -> None:
        file = folder / f"tokens_{pairs.split}_{pairs.size}.npy"
        if not file.with_suffix(".done").exists():
            self._compute(file, model, pairs)
        self.tokens = np.load(file, mmap_mode="r")

    @torch.no_grad()
    def _compute(self, file: Path, model: BlipNlvr, pairs: Drawn) -> None:
        shape = (pairs.size, 2, 1 + CELLS, model.visual.embed_dim)
        tokens = np.lib.format.open_memmap(file, "w+", np.float16, shape)
        for rows in np.array_split(np.arange(pairs.size), max(pairs.size // 32, 1)):
            tokens[rows] = model.visual(pairs.images(rows)).unflatten(0, (-1, 2)).numpy()
        file.with_suffix(".done").touch()

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Memory [2 * rows, 1 + CELLS, width]."""
        return torch.from_numpy(self.tokens[rows]).flatten(0, 1).float()
