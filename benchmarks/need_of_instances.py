"""Whether counts follow need: what one share of tokens costs each photograph and caption, and who keeps more there.

    python benchmarks/need_of_instances.py --data FLICKR8K --work WORK
    python benchmarks/need_of_instances.py --data FLICKR8K --work WORK --trained "static count, short"

WORK holds the dense model that `flickr8k_retrieval.py dense` trains. The first 400 records of dev, their first captions;
nothing is trained. Both towers are pruned where that script prunes them. An instance's damage at a share is 1 - the cosine
between its feature with that share of tokens, by the attention that they receive, and its dense one; its need is the mean,
over shares from 0.4 to 0.8, of its damage over everybody's.

Printed are, of each keeper at 70 % fewer MACs: recall, the mean of R@1, 5, 10 both ways; recall as static, where all instances
have, at each depth of each tower, the mean share of tokens that the keeper leaves there, these shares raised to one power so
that the MACs are the same (interpolated, for counts are whole); and the rank correlation of a photograph's need with how many
of its tokens stay behind the first depth that prunes, and behind the last. Then, of each tower, recall with the other one
whole: of a static share; where each instance has the share at which damage and MACs together are least, at the same cost; and
the same where the damage at a share is what the instance's other shares let expect, a parabola in the logarithm of the cost.
The first knows the damage, and so also which share happens to suit an instance, for no reason that anything else could tell;
the second knows no more than that this instance needs much, or little, or gains by more. With `--trained`, the last alone, of
a model that `ablate --short` trained (seed 1) with a static share. Ten minutes of one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from flickr8k_retrieval import AT
from torch import Tensor

import vltprune as vp
from vltprune import segments
from vltprune.budget import fit_guide
from vltprune.data import captions
from vltprune.flops import Meter
from vltprune.layers import Ratio
from vltprune.preprocessing import transforms
from vltprune.surgery import pruning
from vltprune.tasks import Retrieval
from vltprune.training.calls import calls_of

RECORDS, KNOB, REDUCTION = 400, 64, 0.7
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
NEED = slice(1, 6)  # of them: from 0.4 to 0.8
PRICES = (0.3, 0.5, 0.8, 1.2)  # of the dense MACs, in units of damage
KEEPERS = ("ratio", "learned", "top_p", "distortion", "threshold")


class Towers:
    """The records, and what models make of them."""

    def __init__(self, work: Path, data: Path):
        self.dense: Any = vp.load(work / "dense" / "model").eval()
        self.task, prepare = Retrieval.of(self.dense), transforms(self.dense)
        records = captions(data / "dev.json", data)[:RECORDS]
        self.images = torch.stack([prepare(picture) for record in records for picture in record.pictures()])
        self.words = self.task.encode([record.captions[0] for record in records])
        self.knob_calls = calls_of(self.task, records[:KNOB], prepare)
        self.features = self.run(self.dense)

    def run(self, model: Any) -> dict[str, Tensor]:
        """Features of both towers, [records, dim], of length 1."""
        image = self.task.image_features(model, self.images)
        return {"image": image, "text": self.task.text_features(model, *self.words)}

    def pruned(self, keep: str) -> Any:
        """The dense model, pruned; without a guide where the keeper reads none."""
        model = vp.preset("madtp").replace(at=AT, keep=keep)
        if keep == "threshold":
            pruned = vp.prune(self.dense, model.replace(keep="threshold(turn='temperature')"))
            fit_guide(pruned, self.knob_calls)
            return pruned
        return vp.prune(self.dense, model.replace(guide=None, scorer="self_attention"))


def recall(image: Tensor, text: Tensor) -> float:
    """The mean of R@1, 5, 10 both ways, in %, of one caption each: features [records, dim], of length 1."""
    ranks = [(of > of.diag()[:, None]).sum(1) for of in (image @ text.T, text @ image.T)]
    return 100 * sum((rank < k).float().mean().item() for rank in ranks for k in (1, 5, 10)) / 6


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data set")
    parser.add_argument("--work", type=Path, required=True, help="folder of the dense model's run")
    parser.add_argument("--trained", help="a variant that was trained with a static share, instead of the dense model")
    options = parser.parse_args()
    towers = Towers(options.work, options.data)
    trained = options.trained and options.work / f"{options.trained.replace(' ', '_')}_{REDUCTION:g}_1" / "model"
    keeps = [f"ratio(ratio={share})" for share in SHARES]
    runs = [statically(towers, vp.load(trained, keep=keep) if trained else towers.pruned(keep)) for keep in keeps]
    damage = {
        tower: torch.stack([1 - (features[tower] * towers.features[tower]).sum(-1) for features, _ in runs])
        for tower in AT
    }
    need = {tower: (one / one.mean(1, keepdim=True))[NEED].mean(0) for tower, one in damage.items()}
    if not trained:
        print("".ljust(12) + "recall".rjust(8) + "as static".rjust(11) + "need, tokens at first and at last".rjust(36))
        print("dense".ljust(12) + f"{recall(**towers.features):8.1f}")
        for keeper in KEEPERS:
            print(keeper.ljust(12) + told(towers, keeper, need["image"]), flush=True)
    for tower in AT:
        print(f"\n{tower}: need varies by {need[tower].std():.2f} of its mean")
        compare(tower, runs, damage[tower])


def statically(towers: Towers, model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features of a model with a static share, and per tower [records]: MACs over the mean of the dense ones."""
    with vp.collect() as traces:
        features = towers.run(model)
    cost = Meter(model)(traces)
    return features, {tower: macs.sum(0) / cost.dense[tower].sum(0).mean() for tower, macs in cost.towers.items()}


def told(towers: Towers, keeper: str, need: Tensor) -> str:
    """A line of the table. need [records], of photographs."""
    model = towers.pruned(keeper)
    vp.calibrate(model, towers.knob_calls, REDUCTION)
    if keeper == "ratio":  # the same count for all
        return f"{recall(**towers.run(model)):8.1f}"
    left = watch(model)
    with vp.collect() as traces:
        line = f"{recall(**towers.run(model)):8.1f}"
    shares, reduction = means(left), Meter(model)(traces).reduction
    line += f"{as_static(lambda: recall(**towers.run(model)), shares, reduction, model):11.1f}"
    counts = next(trace.lengths for trace in traces if trace.tower == "image")
    return line + "".join(f"{correlation(need, torch.tensor(counts[at])):18.2f}" for at in (AT["image"][0], -1))


def watch(model: Any) -> dict[Any, list[Tensor]]:
    """Filled as the model runs: what share of an instance's tokens each pruner leaves, [batch] a run."""
    left: dict[Any, list[Tensor]] = {}

    def note(pruner: Any, _: Any, inputs: Any, counts: Tensor) -> None:
        there = segments.count(inputs[1].free, inputs[1].layout)
        left.setdefault(pruner, []).append(counts.minimum(there) / there)

    for tower in pruning(model).towers.values():
        for pruner in tower.pruners.values():
            pruner.keeper.register_forward_hook(partial(note, pruner))
    return left


def means(left: dict[Any, list[Tensor]]) -> dict[Any, float]:
    """The mean share that each pruner leaves."""
    return {pruner: torch.cat(shares).mean().item() for pruner, shares in left.items()}


def as_static(measure: Callable[[], float], shares: dict[Any, float], reduction: float, model: Any) -> float:
    """What is measured with one share for all at each pruner: these to one power, between the two nearest to the reduction."""
    low, high, tried = 0.5, 1.5, set()
    for _ in range(6):
        power = (low + high) / 2
        for pruner, share in shares.items():
            pruner.keeper = Ratio(pruner.scorer.site, share**power)
        with vp.collect() as traces:
            measured = measure()
        saved = Meter(model)(traces).reduction
        tried.add((1 - saved, measured))
        low, high = (low, power) if saved > reduction else (power, high)
    return between(sorted(tried), 1 - reduction)


def compare(tower: str, runs: Sequence[Any], damage: Tensor) -> None:
    """Recall of a static share, of shares by an oracle, and of shares by what may be expected, at equal costs."""
    features, costs = (torch.stack([run[part][tower] for run in runs]) for part in (0, 1))
    each = torch.arange(len(damage[0]))

    def of(one: Tensor) -> float:
        return recall(**{**runs[-1][0], tower: one})

    static = [(cost.mean().item(), of(one)) for cost, one in zip(costs, features, strict=True)]
    for name, known in (("an oracle", damage), ("what may be expected", expected(damage, costs))):
        for price in PRICES:
            best = (known + price * costs).argmin(0)
            cost = costs[best, each].mean().item()
            own, same = of(features[best, each]), between(static, cost)
            print(f"  {1 - cost:.0%} fewer MACs: {same:.1f} by a static share, {own:.1f} by {name}")


def expected(damage: Tensor, costs: Tensor) -> Tensor:
    """[shares, records]: the damage at each share as an instance's others let expect it.

    Fitted, each share left out in its turn, is how far an instance's damage is off the mean of all.
    """
    place = costs.mean(1).float().log()
    basis = torch.stack([place**power for power in range(3)], 1)
    fit, mean = basis @ torch.linalg.pinv(basis), damage.mean(1, keepdim=True)
    off = damage - mean
    return mean + off - (off - fit @ off) / (1 - fit.diag())[:, None]


def between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Linear between the two nearest of the points, which ascend."""
    for (left, low), (right, high) in pairwise(points):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left)
    raise ValueError(f"{at} lies outside of {points[0][0]} .. {points[-1][0]}")


def correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, ties at their mean rank."""
    return torch.corrcoef(torch.stack([_ranks(one), _ranks(other)]))[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    below, up_to = (values[:, None] > values).sum(1), (values[:, None] >= values).sum(1)
    return (below + up_to - 1).double() / 2


if __name__ == "__main__":
    main()
