"""How the tiny models are trained on synthetic pairs: pairs in memory maps, stages that go on from checkpoints, log, report.

`train_nlvr_tiny.py` and `train_llava_tiny.py` say what their models learn.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from auxiliary_targets import Contents, patch_targets
from torch import Tensor, nn

import vltprune as vp
from vltprune.data import SyntheticPairs
from vltprune.data.drawing import SIDE
from vltprune.data.sentences import FAMILIES
from vltprune.data.word_tokenizer import WordTokenizer
from vltprune.models import zoo

LENGTH = 16  # tokens of the longest sentence
SENTENCES = 24  # drawn per train pair; each step takes some of them
VAL = 400  # pairs
SECONDS = 5 * 3600

Loss = Callable[[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]  # rows, chosen sentences -> loss, figures to log


@dataclass(frozen=True)
class Stage:
    """How one stage trains: pairs and sentences per step, steps in all, peak learning rate."""

    pairs: int
    sentences: int
    steps: int
    rate: float


class Drawn:
    """The pairs of a split in memory maps under a folder, drawn on first use (about 10 ms a pair)."""

    def __init__(self, folder: Path, split: str, size: int, sentences: int, patch: int) -> None:
        self.split, self.size, self.sentences, self.patch = split, size, sentences, patch
        self.folder = folder / f"{split}_{size}_{sentences}"
        shapes = {"images": (2, SIDE, SIDE, 3), "targets": (2, (SIDE // patch) ** 2, 6), "ids": (sentences, LENGTH)}
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
            maps["images"][index], maps["targets"][index] = pair.images, patch_targets(pair, self.patch)
            maps["ids"][index, :, : ids.shape[1]], maps["labels"][index] = ids, pair.labels
            maps["families"][index] = [FAMILIES.index(family) for family in pair.families]
        (self.folder / "done").touch()

    def images(self, rows: np.ndarray) -> Tensor:
        """Normalized images [2 * rows, 3, SIDE, SIDE], each pair's two in turn."""
        raw = torch.from_numpy(self.arrays["images"][rows]).flatten(0, 1)
        return raw.permute(0, 3, 1, 2).float() / 127.5 - 1

    def targets(self, rows: np.ndarray) -> Tensor:
        """Patch targets [2 * rows, patches, 6]."""
        return torch.from_numpy(self.arrays["targets"][rows]).flatten(0, 1)

    def said(self, rows: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, mask, labels, families of the chosen sentences [rows, k], flattened and cut to the longest."""
        ids, labels, families = (self.arrays[name][rows[:, None], chosen] for name in ("ids", "labels", "families"))
        ids = torch.from_numpy(ids).flatten(0, 1).long()
        ids = ids[:, : int((ids > 0).sum(1).max())]
        return ids, (ids > 0).long(), *(torch.from_numpy(part).flatten().long() for part in (labels, families))


class Turns:
    """How often each sentence of a pair is taken, relations more often than the rest, and first in one direction.

    The truth of a relation is the sign of a distance times a sign that the words set. Asked about all four relations
    at once, neither factor alone says anything, and the model stays at chance for thousands of steps; asked mostly
    "above" and "left of", the distance says much, and the sign is then learned from the exceptions.
    """

    STARTS = ((0.0, 10.0, 0.1), (0.35, 10.0, 1.7), (0.7, 3.0, 3.0))  # from which progress; weight forwards, backwards

    def __init__(self, ids: np.ndarray) -> None:
        index = {word: place for place, word in enumerate(WordTokenizer().words)}
        right_of = (ids[..., :-1] == index["right"]) & (ids[..., 1:] == index["of"])
        self.backwards = (ids == index["below"]).any(-1) | right_of.any(-1)
        self.relation = ids[..., 1] == index["in"]

    def choose(self, rng: np.random.Generator, rows: np.ndarray, count: int, progress: float) -> np.ndarray:
        """Which `count` sentences of each pair to take, [rows, count], without repeats."""
        _, forwards, backwards = max(start for start in self.STARTS if start[0] <= progress)
        weight = np.where(self.relation[rows], np.where(self.backwards[rows], backwards, forwards), 1.0)
        # The largest of u ** (1 / weight) are a weighted sample (Efraimidis and Spirakis, 2006).
        return (rng.random(weight.shape) ** (1 / weight)).argsort(1)[:, weight.shape[1] - count :]


class Training(ABC):
    """One run: a model, the heads that only training needs, the synthetic pairs, and a log.

    Each stage goes on from its last checkpoint; the first stage, "look", is of the image tower alone.

    Args:
        folder: Of pairs, checkpoints, log and report.
        size: Train pairs.
        patch: Side of the model's patches, in pixels.
        model: What is trained.
        heads: Name -> what only training needs.
    """

    log_every: ClassVar[int]
    keep_every: ClassVar[int]

    def __init__(self, folder: Path, size: int, patch: int, model: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        self.folder, self.spent, self.parts = folder, 0.0, {"model": model, **heads}
        folder.mkdir(parents=True, exist_ok=True)
        self.train = Drawn(folder, "train", size, SENTENCES, patch)
        self.val = Drawn(folder, "val", VAL, 12, patch)
        self.contents, self.turns = Contents(size), Turns(np.asarray(self.train.arrays["ids"]))
        self.log("drawn")

    @abstractmethod
    def begin(self, name: str) -> Loss:
        """The loss of a stage, of rows of the train pairs and the sentences chosen of each."""

    @abstractmethod
    def tuned(self, name: str) -> list[nn.Module]:
        """What a stage trains."""

    @abstractmethod
    def score(self, pairs: Drawn) -> dict[str, float]:
        """Accuracy overall and by family on every sentence of the pairs."""

    def log(self, text: str) -> None:
        """One line to the log and the screen."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        with (self.folder / "train.log").open("a") as file:
            file.write(line + "\n")

    def run(self, name: str, stage: Stage) -> None:
        """One stage from its last checkpoint to its end; nothing if it has ended."""
        tuned = [parameter for part in self.tuned(name) for parameter in part.parameters()]
        groups = [{"params": [p for p in tuned if p.ndim > 1]}, {"params": [p for p in tuned if p.ndim <= 1]}]
        groups[1]["weight_decay"] = 0.0
        optimizer = torch.optim.AdamW(groups, stage.rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        start = self._restore(name, optimizer)
        if start >= stage.steps:
            return
        loss, clock = self.begin(name), time.process_time() - self.spent
        rng, seen = np.random.default_rng((1, start)), []

        for step in range(start + 1, stage.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * schedule(step - 1, stage.steps)
            rows = np.sort(rng.choice(self.train.size, stage.pairs, replace=False))
            chosen = self.turns.choose(rng, rows, stage.sentences, step / stage.steps)
            seen.append(_step(*loss(rows, chosen), tuned, optimizer))
            self.spent = time.process_time() - clock
            if step % self.log_every == 0:
                figures = " ".join(f"{figure:.3f}" for figure in np.nanmean(seen[-self.log_every :], axis=0))
                self.log(f"{name} {step}, {self.spent / 60:.1f} min: {figures}")
            if step % self.keep_every == 0 or step == stage.steps:
                self._keep(name, step, optimizer)
                if name != "look":
                    self.log(f"{name} {step} on val: {self.score(self.val)}")
            if self.spent > SECONDS:
                raise SystemExit("five hours of the processor are spent")

    def publish(self, name: str) -> None:
        """Store the weights that the package carries, and what they answer of the test split, in fp32 and as stored."""
        model, test = self.parts["model"], Drawn(self.folder, "test", 1200, 6, self.train.patch)
        vp.save(model, zoo.WEIGHTS / name, dtype=torch.float16)
        report: dict[str, Any] = {"fp32": self.score(test)}
        model.load_state_dict({key: value.half().float() for key, value in model.state_dict().items()})
        report["fp16"] = self.score(test)
        report["minutes"] = round(self.spent / 60, 1)
        self.log(json.dumps(report))
        (self.folder / "report.json").write_text(json.dumps(report, indent=2))

    def _keep(self, name: str, step: int, optimizer: torch.optim.Optimizer) -> None:
        state: dict[str, Any] = {part: module.state_dict() for part, module in self.parts.items()}
        partial = self.folder / f"{name}.pt.part"
        torch.save(state | {"step": step, "spent": self.spent, "optimizer": optimizer.state_dict()}, partial)
        partial.rename(self.folder / f"{name}.pt")

    def _restore(self, name: str, optimizer: torch.optim.Optimizer) -> int:
        if not (self.folder / f"{name}.pt").exists():
            return 0
        state = torch.load(self.folder / f"{name}.pt", weights_only=True)
        for part, module in self.parts.items():
            module.load_state_dict(state[part])
        optimizer.load_state_dict(state["optimizer"])
        self.spent = state.get("spent", 0.0)  # the oldest have none
        return state["step"]


def _step(loss: Tensor, figures: Tensor, tuned: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
    """One step of the optimizer; the loss and the figures."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(tuned, 1.0)
    optimizer.step()
    return [float(loss.detach()), *figures.tolist()]


def schedule(step: int, steps: int, warmup: int = 150) -> float:
    """Linear warm-up, then a cosine to 0."""
    return min((step + 1) / warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


def by_family(hits: Tensor, families: Tensor) -> Tensor:
    """Accuracy in each family; not a number where a family is silent."""
    return torch.stack([hits[families == index].float().mean() for index in range(len(FAMILIES))])


def accuracies(hits: list[Tensor], families: list[Tensor]) -> dict[str, float]:
    """Accuracy overall and by family, of batches of statements."""
    each = by_family(torch.cat(hits), torch.cat(families)).tolist()
    named = {"all": float(torch.cat(hits).float().mean()), **dict(zip(FAMILIES, each, strict=True))}
    return {name: round(share, 4) for name, share in named.items()}
