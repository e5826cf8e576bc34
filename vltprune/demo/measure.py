"""Measurements of the demo: accuracy, cost, kept tokens and time of models on synthetic NLVR."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..cost.sample_cost import SampleCost, SampleCostMeter
from ..data import SyntheticPairs, normalize
from ..data.sentences import FAMILIES
from ..data.word_tokenizer import WordTokenizer
from ..pruning.model import is_pruned
from ..pruning.trace import collect
from ..utils.modes import evaluating

Tick = Callable[[int], object]


@dataclass(frozen=True)
class QuestionBatch:
    """A batch of image pairs with one sentence each.

    Attributes:
        images: uint8 [batch, 2, height, width, 3], left before right.
        sentences: One sentence about each pair.
        labels: int64 [batch], 1 for a true sentence and 0 for a false one.
        families: The family of each sentence, one of `sentences.FAMILIES`.
    """

    images: np.ndarray
    sentences: tuple[str, ...]
    labels: np.ndarray
    families: tuple[str, ...]

    def inputs_for(self, model: nn.Module) -> tuple[Tensor, ...]:
        """What a `BlipNlvr` takes, on its device, the images in its dtype.

        Returns:
            images [batch, 2, 3, height, width], and input_ids and attention_mask [batch, length].
        """
        weight = next(model.parameters(), torch.empty(0))
        images = torch.from_numpy(normalize(self.images)).to(weight.device, weight.dtype)
        return (images, *(text.to(weight.device) for text in WordTokenizer().encode(self.sentences)))

    def select(self, index: int) -> QuestionBatch:
        """The batch of one of its questions."""
        one = slice(index, index + 1)
        return QuestionBatch(self.images[one], self.sentences[one], self.labels[one], self.families[one])


def generate_batches(
    split: str, pairs: int, seed: int = 0, batch_size: int = 16, tick: Tick | None = None
) -> list[QuestionBatch]:
    """Generate the pairs of a split, with one sentence each.

    Args:
        split: "train", "val" or "test".
        pairs: The number of pairs.
        seed: The seed of `SyntheticPairs`.
        batch_size: Pairs a batch; the last batch has the rest.
        tick: Called with the number of pairs just generated.

    Returns:
        The batches, in the split's order.

    Raises:
        ValueError: For another split, and for numbers below 1.
    """
    generated = SyntheticPairs(split, pairs, seed)
    batches = []
    for start in range(0, pairs, batch_size):
        batch = [generated[i] for i in range(start, min(start + batch_size, pairs))]
        batches.append(
            QuestionBatch(
                images=np.stack([pair.images for pair in batch]),
                sentences=tuple(pair.sentences[0] for pair in batch),
                labels=np.array([int(pair.labels[0]) for pair in batch]),
                families=tuple(pair.families[0] for pair in batch),
            )
        )
        if tick is not None:
            tick(len(batch))
    return batches


@dataclass(frozen=True)
class ModelResult:
    """Predictions, cost and time of one model.

    Attributes:
        probability: [questions], the probability that the model gave to "true".
        labels: [questions], 1 for a true sentence and 0 for a false one.
        families: The family of each sentence.
        macs: Multiply-accumulates a sentence, both images included, mean over questions.
        dense_macs: The same of the dense model, on tokens that are no padding.
        kept: Per tower, mean tokens that entered, then mean tokens that left each block.
        seconds: Seconds a batch, one for each timed batch; empty if the model was not timed.
        padding: Multiply-accumulates a sentence that the dense model spends on padding besides.
    """

    probability: np.ndarray
    labels: np.ndarray
    families: tuple[str, ...]
    macs: float = float("nan")
    dense_macs: float = float("nan")
    kept: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seconds: tuple[float, ...] = ()
    padding: float = 0.0

    @property
    def correct(self) -> np.ndarray:
        """bool [questions]: whether each prediction is right; a NaN never is."""
        return ((self.probability > 0.5) == (self.labels == 1)) & np.isfinite(self.probability)

    @property
    def accuracy(self) -> float:
        """The share of questions that were answered right."""
        return float(self.correct.mean())

    @property
    def macs_saved(self) -> float:
        """The share of the dense model's MACs that was saved; padding counts neither as spent nor as saved."""
        return 1 - self.macs / self.dense_macs

    @property
    def kept_ratio(self) -> float:
        """Image tokens that left a block, as a share of those that entered the tower, mean over blocks."""
        entered, *leaving = self.kept["image"]
        return statistics.fmean(leaving) / entered

    def accuracy_by_family(self) -> dict[str, float]:
        """Accuracy on each family of sentences that was asked."""
        families = np.array(self.families)
        asked = [name for name in FAMILIES if (families == name).any()]
        return {name: float(self.correct[families == name].mean()) for name in asked}


def evaluate_models(
    models: Mapping[str, nn.Module], batches: Sequence[QuestionBatch], tick: Tick | None = None
) -> dict[str, ModelResult]:
    """Evaluate every model on the same batches, in evaluation mode.

    Args:
        models: The models by name. At least one must be pruned: a dense model's cost is taken from a pruned one's.
        batches: The questions.
        tick: Called with the number of sentences that one model has just answered.

    Returns:
        The results by the models' names, without seconds.

    Raises:
        FloatingPointError: If a model's logits are NaN or infinite.
    """
    results = {}
    for name, model in models.items():
        with evaluating(model):
            results[name] = _evaluate(model, batches, tick)
    pruned = next(result for result in results.values() if result.kept)
    entered = {tower: (tokens[0],) * len(tokens) for tower, tokens in pruned.kept.items()}

    def with_dense_cost(result: ModelResult) -> ModelResult:
        return replace(
            result, macs=pruned.dense_macs, dense_macs=pruned.dense_macs, kept=entered, padding=pruned.padding
        )

    return {name: result if result.kept else with_dense_cost(result) for name, result in results.items()}


@torch.no_grad()
def _evaluate(model: nn.Module, batches: Sequence[QuestionBatch], tick: Tick | None) -> ModelResult:
    cost_meter = SampleCostMeter(model) if is_pruned(model) else None
    probabilities: list[Tensor] = []
    costs: list[SampleCost] = []
    for batch in batches:
        with collect(threads=False) as traces:
            probabilities.append(true_probability(model, batch))
        if cost_meter is not None:
            costs += cost_meter(traces, [1] * len(batch.labels))
        if tick is not None:
            tick(len(batch.labels))

    labels = np.concatenate([batch.labels for batch in batches])
    families = tuple(family for batch in batches for family in batch.families)
    result = ModelResult(torch.cat(probabilities).numpy(), labels, families)
    return _with_mean_cost(result, costs) if costs else result


def true_probability(model: nn.Module, batch: QuestionBatch) -> Tensor:
    """The probability that a model gives to "true".

    Args:
        model: A dense or pruned `BlipNlvr`.
        batch: The questions.

    Returns:
        float32 [batch], on the CPU.

    Raises:
        FloatingPointError: If the model's logits are NaN or infinite.
    """
    probability = model(*batch.inputs_for(model)).float().softmax(-1)[:, 1].cpu()
    if not probability.isfinite().all():
        raise FloatingPointError("the model's logits are NaN or infinite, which is no answer: check its weights")
    return probability


def _with_mean_cost(result: ModelResult, costs: Sequence[SampleCost]) -> ModelResult:
    kept = {tower: np.mean([cost.kept[tower] for cost in costs], axis=0) for tower in costs[0].kept}
    return replace(
        result,
        macs=statistics.fmean(cost.macs for cost in costs),
        dense_macs=statistics.fmean(cost.dense_macs for cost in costs),
        padding=statistics.fmean(cost.padding for cost in costs),
        kept={tower: tuple(tokens.tolist()) for tower, tokens in kept.items()},
    )


@torch.no_grad()
def time_models(
    models: Mapping[str, nn.Module], batches: Sequence[QuestionBatch], tick: Tick | None = None
) -> dict[str, tuple[float, ...]]:
    """Time every model on every batch, in evaluation mode.

    The models alternate on each batch, so that a disturbance of the machine reaches all of them. The first batch also runs
    once beforehand, as a warm-up that is not measured.

    Args:
        models: The models by name.
        batches: The questions.
        tick: Called with 1 after each measured run.

    Returns:
        By the models' names, the seconds of each batch.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()):
        for run, batch in _with_warm_up(batches):
            names = [*models][run % len(models) :] + [*models][: run % len(models)]
            for name in names:
                inputs = batch.inputs_for(models[name])
                _synchronize(inputs[0])
                start = time.perf_counter()
                models[name](*inputs)
                _synchronize(inputs[0])
                if run:
                    seconds[name].append(time.perf_counter() - start)
                    if tick is not None:
                        tick(1)
    return {name: tuple(times) for name, times in seconds.items()}


def _with_warm_up(batches: Sequence[QuestionBatch]) -> Iterator[tuple[int, QuestionBatch]]:
    """The first batch as run 0, then all batches from run 1 on."""
    yield 0, batches[0]
    yield from enumerate(batches, start=1)


def _synchronize(on: Tensor) -> None:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)


def speedup(seconds: Sequence[float], dense: Sequence[float]) -> float:
    """How many times as fast as the dense model a model is: the median over batches of the ratio on one batch.

    Args:
        seconds: The model's seconds, one for each batch.
        dense: The dense model's seconds on the same batches.

    Returns:
        The median ratio; above 1 for a faster model.

    Raises:
        ValueError: For different numbers of batches, and for none.
    """
    return statistics.median(b / a for a, b in zip(seconds, dense, strict=True))
