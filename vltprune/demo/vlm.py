"""Measurements of a vision-language model on synthetic NLVR, dense and pruned: accuracy, visual tokens, MACs and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cost.visual_tokens import visual_tokens
from ..data import SyntheticPairs, normalize
from ..data.llava import is_true, prompt_ids
from ..pruning.model import is_pruned
from .measure import Tick

_CELLS = 64  # visual tokens of an image
_COUNTED = 4  # batches, whose tokens and MACs are counted


@dataclass(frozen=True)
class StatementBatch:
    """Statements about pairs of images.

    Attributes:
        inputs: What `llava_tiny` takes.
        labels: [statements] bool, whether each is true.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor


@dataclass(frozen=True)
class VlmResult:
    """What one model answered, and what it cost.

    Attributes:
        accuracy: Share of the statements that were judged right.
        visual_tokens: Visual tokens of a prompt that enter a layer of the language model, mean over layers.
        tower: MACs of a prompt's images.
        prefill: MACs of the language model on a prompt.
    """

    accuracy: float
    visual_tokens: float
    tower: float
    prefill: float


def statement_batches(
    split: str, pairs: int, seed: int = 0, batch_size: int = 32, tick: Tick | None = None
) -> list[StatementBatch]:
    """Draw the pairs of a split, with a statement each, as inputs of `llava_tiny`.

    Args:
        split: "train", "val" or "test".
        pairs: The number of pairs.
        seed: The seed of `SyntheticPairs`.
        batch_size: Pairs a batch; the last batch has the rest.
        tick: Called with the number of pairs just drawn.

    Returns:
        The batches, in the split's order.

    Raises:
        ValueError: For another split, and for numbers below 1.
    """
    drawn, batches = SyntheticPairs(split, pairs, seed), []
    for start in range(0, pairs, batch_size):
        part = [drawn[index] for index in range(start, min(start + batch_size, pairs))]
        # what the processor makes of them, which takes it several times as long as the drawing
        ids, mask = prompt_ids([pair.sentences[0] for pair in part], _CELLS)
        pixels = torch.from_numpy(normalize(np.concatenate([pair.images for pair in part])))
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        batches.append(StatementBatch(inputs, torch.tensor([pair.labels[0] for pair in part]).bool()))
        if tick is not None:
            tick(len(part))
    return batches


@torch.no_grad()
def evaluate_models(
    models: Mapping[str, Any], batches: Sequence[StatementBatch], tick: Tick | None = None
) -> dict[str, VlmResult]:
    """Evaluate models on the same statements. Tokens and MACs are of the first batches.

    Args:
        models: The models by name, in evaluation mode; at least one is pruned.
        batches: The statements.
        tick: Called with the number of statements that one model has just answered.

    Returns:
        The results by the models' names.
    """
    some = batches[:_COUNTED]
    results, dense = {}, next(model for model in models.values() if is_pruned(model))
    for name, model in models.items():
        hits = []
        for batch in batches:
            logits = model(**placed(model, batch.inputs), logits_to_keep=1).logits
            hits.append(is_true(logits).cpu() == batch.labels)
            if tick is not None:
                tick(len(batch.labels))
        accuracy = float(torch.cat(hits).float().mean())
        results[name] = VlmResult(accuracy, *_cost(model if is_pruned(model) else dense, some, not is_pruned(model)))
    return results


def _cost(model: Any, batches: Sequence[StatementBatch], of_dense: bool) -> tuple[float, float, float]:
    """Visual tokens, and MACs of tower and prefill, of a prompt; of the dense model of a pruned one, where asked for."""
    tokens, tower, prefill, prompts = [], 0.0, 0.0, 0
    for batch in batches:
        one = visual_tokens(model, placed(model, batch.inputs))
        macs = one.dense_macs if of_dense else one.macs
        tokens.append(one.dense if of_dense else one.average)
        tower, prefill, prompts = tower + macs["tower"], prefill + macs["prefill"], prompts + len(batch.labels)
    return statistics.fmean(tokens), tower / prompts, prefill / prompts


def placed(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs on a model's device, images in its dtype.

    Args:
        model: The model.
        inputs: What it takes.

    Returns:
        The same inputs.
    """
    weight = next(model.parameters())
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


@torch.no_grad()
def time_models(
    models: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    turns: int = 5,
    new_tokens: int = 8,
    tick: Tick | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """Time `generate` of all models by turns, so that a disturbance of the machine reaches all of them.

    One turn before is a warm-up that is not measured.

    Args:
        models: The models by name, in evaluation mode.
        inputs: What each is given.
        turns: How many times are measured.
        new_tokens: How many tokens follow the first, which the time of a token is the mean of.
        tick: Called with 1 after each run of a model.

    Returns:
        By the models' names the seconds of each turn: to the first new token, and of each token that follows.
    """
    options = {"do_sample": False, "eos_token_id": None}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            given, seconds = placed(model, inputs), []
            for new in (1, 1 + new_tokens):
                start = time.perf_counter()
                # the result comes back to the CPU, so that a GPU has ended
                model.generate(**given, **options, min_new_tokens=new, max_new_tokens=new).cpu()
                seconds.append(time.perf_counter() - start)
            if turn:
                found[name].append((seconds[0], (seconds[1] - seconds[0]) / new_tokens))
            if tick is not None:
                tick(1)
    return found
