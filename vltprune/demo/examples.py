"""Examples of the demo: single questions, every model's prediction, and what each layer kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn

from ..pruning.trace import PruneTrace, collect
from ..viz import kept_tokens
from ..viz.kept_tokens import TokenState
from .measure import ModelResult, QuestionBatch, true_probability

_EXAMPLES = 8


@dataclass(frozen=True)
class Example:
    """One question of the report.

    Attributes:
        sentence: The sentence about the two images.
        family: The sentence's family.
        label: Whether the sentence is true.
        probabilities: The probability that each model gave to "true", by the models' names.
        strips: What each layer of the image tower kept of both images, by the names of some models.
        words: The sentence's words and their states after the last layer, by the names of models that prune words.
    """

    sentence: str
    family: str
    label: bool
    probabilities: Mapping[str, float]
    strips: Mapping[str, Image.Image]
    words: Mapping[str, Sequence[tuple[str, TokenState]]]


def select_examples(
    models: Mapping[str, nn.Module],
    batches: Sequence[QuestionBatch],
    results: Mapping[str, ModelResult],
    illustrated: Sequence[str],
) -> list[Example]:
    """Select the first question of each family, then the first of the others, whatever was answered.

    Args:
        models: The models by name.
        batches: The questions, in batches of one size (the last may be smaller).
        results: Every model's result on all the questions.
        illustrated: Names of the pruned models whose kept tokens are drawn.

    Returns:
        The examples, families first: eight, or one a family where there are more.

    Raises:
        FloatingPointError: If the logits of a model to draw are NaN or infinite.
    """
    families = next(iter(results.values())).families
    first = {family: families.index(family) for family in dict.fromkeys(families)}
    rest = [i for i in range(len(families)) if i not in first.values()]
    chosen = [*first.values(), *rest][: max(_EXAMPLES, len(first))]
    illustrated_models = {name: models[name] for name in illustrated}
    return [_example(illustrated_models, batches, results, question) for question in chosen]


def _example(
    models: Mapping[str, nn.Module],
    batches: Sequence[QuestionBatch],
    results: Mapping[str, ModelResult],
    question: int,
) -> Example:
    batch, index = divmod(question, len(batches[0].labels))
    one = batches[batch].select(index)
    images = [Image.fromarray(image) for image in one.images[0]]
    strips, words = {}, {}
    for name, model in models.items():
        with torch.no_grad(), collect(threads=False) as traces:
            true_probability(model, one)
        for trace in traces:
            if trace.tower == "image":
                strips[name] = kept_tokens.record_strip(images, trace)
            else:
                words[name] = kept_words(one.sentences[0], trace)
    probabilities = {name: float(result.probability[question]) for name, result in results.items()}
    return Example(one.sentences[0], one.families[0], bool(one.labels[0]), probabilities, strips, words)


def kept_words(sentence: str, trace: PruneTrace) -> list[tuple[str, TokenState]]:
    """The words of a traced batch's first sentence, and what the text tower left of each.

    Args:
        sentence: The sentence, as `WordTokenizer` was given it.
        trace: The trace of the text tower's call.

    Returns:
        Each word with its state after the last layer.

    Raises:
        ValueError: If the sentence has more or fewer tokens than the trace.
    """
    last = kept_tokens.instance_states(trace, 0)[-1]
    words = [*sentence.lower().strip().removesuffix(".").split(), "[SEP]"]
    return [(word, TokenState(state)) for word, state in zip(words, last.tolist(), strict=True)][:-1]
