"""Whether tokens follow need: what DTP keeps of a drawn image, against how many things the image shows.

    python benchmarks/counts_and_things.py

Of the packaged models, on 512 validation pairs: mean tokens left behind each block that prunes, by number of things, and their
correlation over images. A count that is the same for all correlates with nothing. Then the accuracy, and the share of MACs
saved, where each image keeps its own share of tokens, where it keeps that of the image before it, where all keep the mean
share of their batch, and where the first block divides that by how many things the images show: what it is worth that counts
go to those who need them, to weights that learnt so. Five minutes of one core; with `--pairs 1024` nine. `--model FOLDER` does
so with another, such as `ablate_nlvr_tiny.py` leaves behind.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vltprune as vp
from vltprune import segments
from vltprune.data import SyntheticPairs
from vltprune.flops import Meter
from vltprune.layers import KeepRatioPredictor
from vltprune.layers.keepers import share
from vltprune.models import zoo
from vltprune.preprocessing import transforms
from vltprune.tasks import Nlvr
from vltprune.training.calls import calls_of

NAMES = ("blip_nlvr_tiny_madtp.p70", "blip_nlvr_tiny_madtp.p80")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--model", type=Path, help="the folder of another pruned model")
    options = parser.parse_args()
    pairs, folders = options.pairs, [zoo.WEIGHTS / name for name in NAMES]
    drawn = SyntheticPairs("val", pairs)
    things = np.array([len(scene) for i in range(pairs) for scene in drawn[i].scenes])
    for folder in folders if options.model is None else [options.model]:
        name, model = folder.name, vp.load(folder)
        task = Nlvr.of(model)
        calls = calls_of(task, Nlvr.read(f"synthetic:val:{pairs}", ""), transforms(model))
        for depth, counts in tokens_left(model, calls).items():
            means = ", ".join(f"{n}: {counts[things == n].mean():.1f}" for n in np.unique(things))
            print(f"{name}, block {depth}: tokens by things {means}; r = {np.corrcoef(things, counts)[0, 1]:.2f}")
        for whose, change in WHOSE.items():
            rows, saved = answered(model, calls, change, torch.from_numpy(things).float())
            print(f"{name}, {whose}: {task.score(rows)['accuracy']:.1%} at {saved:.1%} fewer MACs", flush=True)


@torch.no_grad()
def tokens_left(model: Any, calls: Sequence[Any]) -> dict[int, np.ndarray]:
    """Tokens of each image, [2 pairs], behind each block that prunes."""
    left: dict[int, list[int]] = {depth: [] for depth in map(int, vp.surgery.pruning(model).towers["image"].pruners)}
    for call in calls:
        with vp.collect() as traces:
            call(model)
        image = next(trace for trace in traces if trace.tower == "image")
        for depth, counts in left.items():
            counts += image.steps[depth].lengths
    return {depth: np.array(counts) for depth, counts in left.items()}


# shares [batch], things [batch], whether it is the first depth -> shares
Change = Callable[[Tensor, Tensor, bool], Tensor]


class Given(KeepRatioPredictor):
    """Another keeper's shares of tokens, [batch], changed before they become counts; `things` are set before each call."""

    def __init__(self, keeper: KeepRatioPredictor, change: Change, first: bool):
        super().__init__(keeper.site)
        self.keeper, self.change, self.first, self.guided = keeper, change, first, keeper.guided
        self.things = torch.empty(0)

    def forward(self, scores: Tensor, tokens: vp.PackedTokens, guidance: Any) -> Tensor:
        there = segments.count(tokens.free, tokens.layout)
        own = self.keeper(scores, tokens, guidance).minimum(there).double() / there
        return share(there, self.change(own, self.things, self.first).clamp(max=1.0))


def mean(shares: Tensor, *_: Any) -> Tensor:
    """The same for all of a batch."""
    return shares.mean().expand_as(shares)


WHOSE: dict[str, Change] = {
    "own shares": lambda shares, *_: shares,
    "another's": lambda shares, *_: shares.roll(1),
    "the mean of a batch": mean,
    "the mean by things": lambda shares, things, first: mean(shares) * (things / things.mean() if first else 1.0),
}


@torch.no_grad()
def answered(model: Any, calls: Sequence[Any], change: Change, things: Tensor) -> tuple[list[Any], float]:
    """Answers, and the share of MACs saved, with shares changed in every pruner of the image tower. things: of each image."""
    pruners = list(vp.surgery.pruning(model).towers["image"].pruners.values())
    own = [pruner.keeper for pruner in pruners]
    given = [Given(keeper, change, place == 0) for place, keeper in enumerate(own)]
    for pruner, keeper in zip(pruners, given, strict=True):
        pruner.keeper = keeper
    rows, saved = [], []
    for call, here in zip(
        calls, things.split([len(call.keywords["images"].flatten(0, 1)) for call in calls]), strict=True
    ):
        for keeper in given:
            keeper.things = here
        with vp.collect() as traces:
            rows += call(model)
        saved.append(Meter(model)(traces).reduction)
    for pruner, keeper in zip(pruners, own, strict=True):
        pruner.keeper = keeper
    return rows, float(np.mean(saved))


if __name__ == "__main__":
    main()
