"""Whether need can be told: what a share of patches costs a photograph, foretold from what its first blocks made of it.

    python benchmarks/need_foretold.py --data FLICKR8K --work WORK
    python benchmarks/need_foretold.py --data PAGES --work WORK_OF_PAGES

WORK holds the dense model that `flickr8k_retrieval.py dense` trains. Its image tower is pruned where that script prunes it, by
the attention that patches receive, to one share of them; nothing is trained but the foreteller: kernel ridge regression from
tokens of the dense model, fitted on the first 3,000 records of train, its width the number of features, kernel and ridge by
the last fifth of them. It foretells what each share from 0.3 to 1 costs a photograph, by two measures: damage, 1 - the cosine
of its feature and its dense one, and loss, the contrastive loss of it and of its captions among the others of its split. From
two sorts of features: `early`, mean and deviation over patches at the input and behind the third block, and the class token
there; and `finished`, the dense feature, which no rule for counts can have.

Printed are, on the 1,000 records of dev: how much of the variance between photographs is foretold, of the mean over shares from
0.4 to 0.8 ("level") and of the difference between these two ("slope", which is what more patches would mend); and the recall
that is gained over one share for all, at the same MACs, where each has the share at which foretold cost and price of MACs
together are least: means over prices that save so much, R@1, 5, 10 both ways, of each of five captions. Eight minutes of one
core a data set.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from flickr8k_retrieval import AT
from need_of_instances import SHARES, between, recall
from torch import Tensor

import vltprune as vp
from vltprune.data import captions
from vltprune.flops import Meter
from vltprune.preprocessing import transforms
from vltprune.tasks import Retrieval

FIT, JUDGED, CAPTIONS, BATCH = 3000, 1000, 5, 100
LOW, HIGH = SHARES.index(0.4), SHARES.index(0.8)
SAVED = ((0.25, 0.4), (0.4, 0.5), (0.5, 0.6), (0.6, 0.7))
PRICES, RIDGES = torch.logspace(-3, 3, 121), (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


class Split:
    """One split's photographs: features at each share [shares, n, dim], captions [5, n, dim], early tokens, MACs."""

    def __init__(self, dense: Any, records: Any):
        task, prepare = Retrieval.of(dense), transforms(dense)
        images = torch.stack([prepare(picture) for record in records for picture in record.pictures()])
        words = [[record.captions[i] for record in records] for i in range(CAPTIONS)]
        self.text = torch.stack([task.text_features(dense, *task.encode(one)) for one in words])
        self.early = torch.cat([early(dense.visual.trunk, some) for some in images.split(BATCH)])
        features, costs = [], []
        for share in SHARES:
            parts = {
                "at": {"image": AT["image"]},
                "guide": None,
                "scorer": "self_attention",
                "keep": f"ratio(ratio={share})",
            }
            model = vp.prune(dense, vp.preset("madtp").replace(**parts))
            with vp.collect() as traces:
                features.append(task.image_features(model, images))
            cost = Meter(model)(traces)
            costs.append(cost.towers["image"].sum() / cost.dense["image"].sum())
        self.image, self.costs, self.scale = torch.stack(features), torch.stack(costs).float(), dense.logit_scale.exp()

    def damage(self) -> Tensor:
        """[n, shares]: 1 - the cosine with the dense feature."""
        return 1 - (self.image * self.image[-1]).sum(-1).T

    def loss(self) -> Tensor:
        """[n, shares]: the mean over captions, and over both ways; all others' images are dense where captions ask."""
        total = torch.zeros(self.image.shape[1], len(SHARES))
        for text in self.text:
            others = (self.scale * text @ self.image[-1].T).fill_diagonal_(float("-inf")).logsumexp(1)
            for i, image in enumerate(self.image):
                own = self.scale * (image * text).sum(1)
                total[:, i] -= (self.scale * image @ text.T).log_softmax(1).diag() + own - torch.logaddexp(others, own)
        return total / (2 * CAPTIONS)

    def recall(self, image: Tensor) -> float:
        """In %, of these features in the place of the dense ones."""
        return sum(recall(image, text) for text in self.text) / CAPTIONS

    @cached_property
    def static(self) -> list[tuple[float, float]]:
        """MACs, as a share of the dense ones, and recall, of each share."""
        return list(zip(self.costs.tolist(), map(self.recall, self.image), strict=True))


def early(trunk: Any, images: Tensor) -> Tensor:
    """[n, 5 dim]: mean and deviation over patches at the input and behind the third block, and the class token there."""
    parts, tokens = [], trunk._pos_embed(trunk.patch_embed(images))
    for blocks in (trunk.blocks[:0], trunk.blocks[:3]):
        for block in blocks:
            tokens = block(tokens)
        parts += [tokens[:, 1:].mean(1), tokens[:, 1:].std(1)]
    return torch.cat([*parts, tokens[:, 0]], 1)


def foretold(known: Tensor, wanted: Tensor, asked: Tensor) -> Tensor:
    """Kernel ridge regression: known [m, dim] and what is wanted of them [m, k]; asked [n, dim] -> [n, k]."""
    mean, deviation = known.mean(0), known.std(0) + 1e-6
    known, asked = ((one - mean).double() / deviation for one in (known, asked))
    middle, wanted, cut = wanted.mean(0), (wanted - wanted.mean(0)).double(), len(known) * 4 // 5

    def fitted(kernel: Any, ridge: float, upto: int, at: Tensor) -> Tensor:
        within = kernel(known[:upto], known[:upto]) + ridge * torch.eye(upto, dtype=torch.float64)
        return kernel(at, known[:upto]) @ torch.linalg.solve(within, wanted[:upto])

    def error(choice: tuple[Any, float]) -> float:
        return (fitted(*choice, cut, known[cut:]) - wanted[cut:]).square().sum().item()

    best = min(((kernel, ridge) for kernel in (_linear, _gaussian) for ridge in RIDGES), key=error)
    return middle + fitted(*best, len(known), asked).float()


def _linear(one: Tensor, other: Tensor) -> Tensor:
    return one @ other.T / one.shape[1]


def _gaussian(one: Tensor, other: Tensor) -> Tensor:
    return (-torch.cdist(one, other).square() / (2 * one.shape[1])).exp()


def explained(truth: Tensor, told: Tensor) -> float:
    """Of the variance between photographs, [n] each; what both splits differ by, such as in their number, is no part of it."""
    return 1 - ((truth - told).var() / truth.var()).item()


def gains(split: Split, told: Tensor) -> str:
    """Recall over that of one share for all, a cell each range of MACs saved. told [n, shares]."""
    found: list[tuple[float, float]] = []
    for price in PRICES:
        chosen = (told + price * split.costs).argmin(1)
        cost = split.costs[chosen].mean().item()
        if SAVED[0][0] <= 1 - cost < SAVED[-1][1]:
            own = split.recall(split.image[chosen, torch.arange(len(chosen))])
            found.append((1 - cost, own - between(split.static, cost)))
    cells = ([gain for saved, gain in found if low <= saved < high] for low, high in SAVED)
    return "".join(f"{sum(cell) / len(cell):+12.1f}" if cell else " " * 12 for cell in cells)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data set")
    parser.add_argument("--work", type=Path, required=True, help="folder of the dense model's run")
    options = parser.parse_args()
    dense = vp.load(options.work / "dense" / "model").eval()
    records = {name: captions(options.data / f"{name}.json", options.data) for name in ("train", "dev")}
    train, dev = Split(dense, records["train"][:FIT]), Split(dense, records["dev"][:JUDGED])
    print(
        "told of, from".ljust(24) + "level   slope" + "".join(f"{f'{low:.0%}-{high:.0%}':>12}" for low, high in SAVED)
    )
    for name in ("damage", "loss"):
        truth, learnt = getattr(dev, name)(), getattr(train, name)()
        for sort, known, asked in (
            ("early", train.early, dev.early),
            ("finished", train.image[-1], dev.image[-1]),
        ):
            told = foretold(known, learnt, asked)
            level = explained(truth[:, LOW : HIGH + 1].mean(1), told[:, LOW : HIGH + 1].mean(1))
            slope = explained(truth[:, LOW] - truth[:, HIGH], told[:, LOW] - told[:, HIGH])
            print(f"{name}, {sort}".ljust(24) + f"{level:5.2f}   {slope:5.2f}" + gains(dev, told), flush=True)


if __name__ == "__main__":
    main()
