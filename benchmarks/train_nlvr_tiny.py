"""Trains the dense `blip_nlvr_tiny` on synthetic pairs, from nothing, on one CPU core.

    OMP_NUM_THREADS=1 python benchmarks/train_nlvr_tiny.py --work /tmp/nlvr

Four stages, each resumed from where it was left (delete its files to run it again):
  draw   train pairs, their sentences and per-patch targets, to memory maps
  look   the image tower alone learns what each patch shows
  read   the text tower and the head learn to answer from the frozen image tower's tokens
  join   everything together, the patch targets kept as a small extra loss
Then the test split is answered with weights rounded to fp16, and `dense.pt` and `report.json` are written.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nlvr_tiny_targets import Contents, PatchHeads, PhraseHeads, patch_targets
from torch import Tensor, nn

from vltprune.data import SyntheticPairs
from vltprune.data.drawing import SIDE
from vltprune.data.sentences import FAMILIES
from vltprune.data.words import WordTokenizer
from vltprune.models.blip import BlipNlvr

PATCH, WIDTH = 8, 128
CELLS = (SIDE // PATCH) ** 2
LENGTH = 16  # tokens of the longest sentence
GROUNDED = 1  # the text layer after which a phrase should have found its things; those above reason on it
SENTENCES = 24  # drawn per train pair; each step takes some of them


@dataclass
class Stage:
    """How one stage trains: pairs and sentences per step, steps in all, peak learning rate."""

    pairs: int
    sentences: int
    steps: int
    rate: float


STAGES = {"look": Stage(8, 0, 3600, 1e-3), "read": Stage(12, 8, 7000, 1e-3), "join": Stage(12, 8, 1800, 3e-4)}


def build_model() -> BlipNlvr:
    """The tiny model, with its text tower's matrices drawn for its width: BERT's 0.02 is meant for 768."""
    torch.manual_seed(0)
    sizes = dict(vision_width=WIDTH, vision_depth=6, vision_heads=4, text_width=WIDTH, text_depth=4, text_heads=4)
    model = BlipNlvr(SIDE, PATCH, vocab_size=len(WordTokenizer()), max_positions=32, merge_from=2, **sizes)
    for module in (*model.text.modules(), *model.head.modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


class Drawn:
    """Pairs drawn ahead into memory maps under a folder; drawn on first use."""

    def __init__(self, folder: Path, split: str, size: int, sentences: int) -> None:
        self.split, self.size, self.sentences = split, size, sentences
        self.folder = folder / f"{split}_{size}_{sentences}"
        shapes = dict(images=(2, SIDE, SIDE, 3), targets=(2, CELLS, 6), ids=(sentences, LENGTH))
        shapes |= dict(labels=(sentences,), families=(sentences,))
        self.shapes = {name: (size, *shape) for name, shape in shapes.items()}
        if not (self.folder / "done").exists():
            self._draw()
        self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in self.shapes}

    def _draw(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {name: self.folder / f"{name}.npy" for name in self.shapes}
        out = {
            name: np.lib.format.open_memmap(files[name], "w+", np.uint8, shape) for name, shape in self.shapes.items()
        }
        words = WordTokenizer()
        pairs = SyntheticPairs(self.split, self.size, sentences=self.sentences)
        for index in range(self.size):
            pair = pairs[index]
            ids = words.encode(pair.sentences)[0].numpy()
            out["images"][index], out["targets"][index] = pair.images, patch_targets(pair, PATCH)
            out["ids"][index, :, : ids.shape[1]], out["labels"][index] = ids, pair.labels
            out["families"][index] = [FAMILIES.index(family) for family in pair.families]
        for array in out.values():
            array.flush()
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


class Cache:
    """The frozen image tower's tokens of every pair, fp16, in a memory map; filled on first use."""

    def __init__(self, folder: Path, model: BlipNlvr, pairs: Drawn) -> None:
        file = folder / f"tokens_{pairs.split}_{pairs.size}.npy"
        if not file.with_suffix(".done").exists():
            out = np.lib.format.open_memmap(file, "w+", np.float16, (pairs.size, 2, 1 + CELLS, WIDTH))
            for rows in np.array_split(np.arange(pairs.size), max(pairs.size // 32, 1)):
                with torch.no_grad():
                    out[rows] = model.visual(pairs.images(rows)).unflatten(0, (-1, 2)).numpy()
            file.with_suffix(".done").touch()
        self.tokens = np.load(file, mmap_mode="r")

    def __call__(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.tokens[rows]).flatten(0, 1).float()


class Training:
    """One run: the model, the patch heads, the drawn pairs, and a log."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.model, self.heads, self.phrases = build_model(), PatchHeads(WIDTH), PhraseHeads(WIDTH)
        self.train = Drawn(folder, "train", size, SENTENCES)
        self.val = Drawn(folder, "val", 400, 12)
        self.contents = Contents(size)
        self.log("drawn")

    def log(self, text: str) -> None:
        """One line to the log and the screen."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        with (self.folder / "train.log").open("a") as file:
            file.write(line + "\n")

    def run(self, name: str) -> None:
        """One stage from its last checkpoint to its end; nothing if it has ended."""
        stage, loss, tuned = STAGES[name], getattr(self, name)(), self._tuned(name)
        groups = [
            dict(params=[p for p in tuned if (p.ndim > 1) == decayed], weight_decay=0.05 * decayed)
            for decayed in (0, 1)
        ]
        optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98), fused=True)
        start = self._restore(name, optimizer)
        rng, began, seen = np.random.default_rng((1, start)), time.time(), []
        for step in range(start, stage.steps):
            rows = np.sort(rng.choice(self.train.size, stage.pairs, replace=False))
            chosen = rng.permuted(np.tile(np.arange(SENTENCES), (stage.pairs, 1)), axis=1)[:, : stage.sentences]
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * schedule(step, stage.steps)
            total, figures = loss(rows, chosen)
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(tuned, 1.0)
            optimizer.step()
            seen.append([float(total.detach()), *figures.tolist()])
            if (step + 1) % 100 == 0 or step + 1 == stage.steps:
                self._report(name, step + 1, np.nanmean(seen, axis=0), (time.time() - began) / (step + 1 - start))
                seen = []
            if (step + 1) % 500 == 0 or step + 1 == stage.steps:
                self._keep(name, step + 1, optimizer)

    def _tuned(self, name: str) -> list[nn.Parameter]:
        eyes = [*self.model.visual.parameters(), *self.heads.parameters()]
        reader = [*self.model.text.parameters(), *self.model.head.parameters(), *self.phrases.parameters()]
        return {"look": eyes, "read": reader, "join": eyes + reader}[name]

    def look(self):
        """Loss of the image tower alone."""
        return lambda rows, chosen: self.heads.loss(
            self.model.visual(self.train.images(rows)), self.train.targets(rows)
        )

    def read(self):
        """Loss of the text tower on cached image tokens."""
        self.cache = Cache(self.folder, self.model.eval(), self.train)
        self.model.train()
        return lambda rows, chosen: self._answer(self.cache(rows), rows, chosen, 1.0)

    def join(self):
        """Loss of both towers."""

        def loss(rows: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
            memory = self.model.visual(self.train.images(rows))
            answer, figures = self._answer(memory, rows, chosen, 0.3)
            return answer + 0.1 * self.heads.loss(memory, self.train.targets(rows))[0], figures

        return loss

    def _answer(self, memory: Tensor, rows: np.ndarray, chosen: np.ndarray, guided: float) -> tuple[Tensor, Tensor]:
        ids, mask, labels, families = self.train.said(rows, chosen)
        x = self.model.text.embed(ids)
        for index, layer in enumerate(self.model.text.layers):
            x = layer(x, memory, mask.bool()[:, None, None])
            if index == GROUNDED:
                words = x
            if index == GROUNDED + 1:
                summary = x[:, 0]

        pairs = np.repeat(rows, chosen.shape[1])
        grounding, found = self.phrases.loss(words, summary, ids.numpy(), pairs, self.contents)

        logits = self.model.head(x[:, 0])
        answer = F.cross_entropy(logits, labels)
        figures = torch.cat([answer.detach()[None], found, by_family(logits.argmax(-1) == labels, families)])
        return answer + guided * grounding, figures

    def _report(self, name: str, step: int, figures: np.ndarray, seconds: float) -> None:
        self.log(
            f"{name} {step} {seconds:.3f} s/step loss {figures[0]:.4f} " + " ".join(f"{x:.3f}" for x in figures[1:])
        )
        threads = 2 if (self.folder / "USE2").exists() else 1
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if step % 500 == 0 and name != "look":
            self.log(f"{name} {step} val {score(self.model, self.val)}")

    def _keep(self, name: str, step: int, optimizer: torch.optim.Optimizer) -> None:
        state = dict(
            step=step,
            model=self.model.state_dict(),
            heads=self.heads.state_dict(),
            phrases=self.phrases.state_dict(),
            optimizer=optimizer.state_dict(),
        )
        torch.save(state, self.folder / f"{name}.pt.part")
        (self.folder / f"{name}.pt.part").rename(self.folder / f"{name}.pt")

    def _restore(self, name: str, optimizer: torch.optim.Optimizer) -> int:
        if not (self.folder / f"{name}.pt").exists():
            return 0
        state = torch.load(self.folder / f"{name}.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        if "phrases" in state:
            self.phrases.load_state_dict(state["phrases"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]


def schedule(step: int, steps: int, warmup: int = 150) -> float:
    """Linear warm-up, then a cosine to 0."""
    return min((step + 1) / warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


def by_family(hits: Tensor, families: Tensor) -> Tensor:
    """Accuracy in each family; not a number where a family is silent."""
    return torch.stack([hits[families == index].float().mean() for index in range(len(FAMILIES))])


@torch.no_grad()
def score(model: BlipNlvr, pairs: Drawn, batch: int = 25) -> dict[str, float]:
    """Accuracy overall and by family on every sentence of the pairs."""
    model.eval()
    hits, families = [], []
    for rows in np.array_split(np.arange(pairs.size), pairs.size // batch):
        chosen = np.tile(np.arange(pairs.sentences), (len(rows), 1))
        ids, mask, labels, said = pairs.said(rows, chosen)
        logits = model.head(model.text(ids, mask, model.visual(pairs.images(rows)))[:, 0])
        hits.append(logits.argmax(-1) == labels)
        families.append(said)
    model.train()
    named = zip(FAMILIES, by_family(torch.cat(hits), torch.cat(families)).tolist(), strict=True)
    return {"all": round(float(torch.cat(hits).float().mean()), 4)} | {family: round(x, 4) for family, x in named}


def main() -> None:
    """Every stage, then the test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pairs, checkpoints, log and result")
    parser.add_argument("--pairs", type=int, default=16000, help="train pairs")
    args = parser.parse_args()
    torch.set_num_threads(1)

    training = Training(args.work, args.pairs)
    for name in STAGES:
        training.run(name)

    model, test = training.model, Drawn(args.work, "test", 1200, 6)
    torch.save(model.state_dict(), args.work / "dense.pt")
    report = {"fp32": score(model, test)}
    model.load_state_dict({key: value.half().float() for key, value in model.state_dict().items()})
    report["fp16"] = score(model, test)
    training.log(json.dumps(report))
    (args.work / "report.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
