"""Accuracy, cost, kept tokens and time of models on synthetic pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cost.sample_cost import SampleCost, SampleCostMeter
from ..data import SyntheticPair, SyntheticPairs, normalize
from ..data.sentences import FAMILIES
from ..data.word_tokenizer import WordTokenizer
from ..pruning.model import is_pruned
from ..pruning.trace import collect
from ..utils.modes import evaluating


@dataclass(frozen=True)
class Questions:
    """A batch: pictures uint8 [batch, 2, height, width, 3], one sentence about each pair, labels (1 true), families."""

    pictures: np.ndarray
    sentences: tuple[str, ...]
    labels: np.ndarray
    families: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a BlipNlvr takes: images, input_ids, attention_mask."""
        return (torch.from_numpy(normalize(self.pictures)), *WordTokenizer().encode(self.sentences))

    def only(self, place: int) -> Questions:
        """The batch of one of them."""
        one = slice(place, place + 1)
        return Questions(self.pictures[one], self.sentences[one], self.labels[one], self.families[one])


def draw(
    split: str, pairs: int, seed: int = 0, batch: int = 16, tick: Callable[[int], object] | None = None
) -> list[Questions]:
    """The pairs of a split with one sentence each, in batches; tick: called with the number of pairs just drawn."""
    drawn = SyntheticPairs(split, pairs, seed)
    batches = []
    for start in range(0, pairs, batch):
        some = [drawn[i] for i in range(start, min(start + batch, pairs))]
        sentences, families = (tuple(each[0] for each in column) for column in _columns(some))
        labels = np.array([int(pair.labels[0]) for pair in some])
        batches.append(Questions(np.stack([pair.images for pair in some]), sentences, labels, families))
        if tick is not None:
            tick(len(some))
    return batches


def _columns(pairs: Sequence[SyntheticPair]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    return [pair.sentences for pair in pairs], [pair.families for pair in pairs]


@dataclass(frozen=True)
class Outcome:
    """How one model did.

    chance    [questions] the probability it gave to "true"; labels and families are the questions'
    macs      mean multiply-accumulates a sentence, both images included; dense_macs, of the dense model, and padding, what
              that spends on padding besides
    kept      per tower: mean tokens that entered, then mean tokens leaving each block
    seconds   a batch, once per batch and round of the race; empty if there was none
    """

    chance: np.ndarray
    labels: np.ndarray
    families: tuple[str, ...]
    macs: float = float("nan")
    dense_macs: float = float("nan")
    kept: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seconds: tuple[float, ...] = ()
    padding: float = 0.0

    @property
    def right(self) -> np.ndarray:
        """[questions] bool; NaN is never right."""
        return ((self.chance > 0.5) == (self.labels == 1)) & np.isfinite(self.chance)

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def saved(self) -> float:
        """The share of the dense MACs that was saved; padding counts neither as spent nor as saved."""
        return 1 - self.macs / self.dense_macs

    @property
    def kept_share(self) -> float:
        """Image tokens that left a block, as a share of those that entered the tower, mean over blocks."""
        entered, *leaving = self.kept["image"]
        return statistics.fmean(leaving) / entered

    def timed(self, seconds: tuple[float, ...]) -> Outcome:
        """The same, with the seconds of a race."""
        return replace(self, seconds=seconds)

    def by_family(self) -> dict[str, float]:
        """Accuracy of each family that was asked about."""
        asked = np.array(self.families)
        return {name: float(self.right[asked == name].mean()) for name in FAMILIES if (asked == name).any()}


def evaluate(
    models: Mapping[str, nn.Module], batches: Sequence[Questions], tick: Callable[[int], object] | None = None
) -> dict[str, Outcome]:
    """Every model on the same batches, in evaluation mode.

    tick: called with the number of sentences each model has just answered.
    What dense models cost is read off the pruned ones, of which there must be one.
    """
    outcomes = {}
    for name, model in models.items():
        with evaluating(model):
            outcomes[name] = _evaluate(model, batches, tick)
    pruned = next(outcome for outcome in outcomes.values() if outcome.kept)
    entered = {tower: (sizes[0],) * len(sizes) for tower, sizes in pruned.kept.items()}
    dense = {"macs": pruned.dense_macs, "dense_macs": pruned.dense_macs, "kept": entered, "padding": pruned.padding}
    return {name: outcome if outcome.kept else replace(outcome, **dense) for name, outcome in outcomes.items()}


@torch.no_grad()
def _evaluate(model: nn.Module, batches: Sequence[Questions], tick: Callable[[int], object] | None) -> Outcome:
    cost_meter = SampleCostMeter(model) if is_pruned(model) else None
    chances: list[Tensor] = []
    spent: list[SampleCost] = []
    for batch in batches:
        with collect(threads=False) as traces:
            chances.append(model(*batch.inputs).softmax(-1)[:, 1])
        if not chances[-1].isfinite().all():
            raise FloatingPointError("the model's logits are NaN or infinite, which is no answer: check its weights")
        if cost_meter is not None:
            spent += cost_meter(traces, [1] * len(batch.labels))
        if tick is not None:
            tick(len(batch.labels))

    labels = np.concatenate([batch.labels for batch in batches])
    families = tuple(family for batch in batches for family in batch.families)
    outcome = Outcome(torch.cat(chances).numpy(), labels, families)
    return outcome if cost_meter is None else replace(outcome, **_means(spent))


def _means(spent: Sequence[SampleCost]) -> dict[str, Any]:
    kept = {tower: np.mean([one.kept[tower] for one in spent], axis=0) for tower in spent[0].kept}
    return {
        "macs": statistics.fmean(one.macs for one in spent),
        "dense_macs": statistics.fmean(one.dense_macs for one in spent),
        "padding": statistics.fmean(one.padding for one in spent),
        "kept": {tower: tuple(sizes.tolist()) for tower, sizes in kept.items()},
    }


@torch.no_grad()
def race(
    models: Mapping[str, nn.Module], batches: Sequence[Questions], tick: Callable[[int], object] | None = None
) -> dict[str, tuple[float, ...]]:
    """Seconds of every model on every batch, in evaluation mode.

    The models take turns, so that what disturbs the machine disturbs all. The first batch is run once more beforehand,
    unmeasured. tick: called with 1 after each run that counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()):
        for turn, batch in _turns(batches):
            inputs = batch.inputs
            names = [*models][turn % len(models) :] + [*models][: turn % len(models)]
            for name in names:
                start = time.perf_counter()
                models[name](*inputs)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
                    if tick is not None:
                        tick(1)
    return {name: tuple(times) for name, times in seconds.items()}


def _turns(batches: Sequence[Questions]) -> Iterator[tuple[int, Questions]]:
    yield 0, batches[0]
    yield from enumerate(batches, start=1)


def relative_time(seconds: Sequence[float], dense: Sequence[float]) -> float:
    """Median over the batches of a model's time relative to the dense model's on the same batch."""
    return statistics.median(a / b for a, b in zip(seconds, dense, strict=True))
