"""Examples of a compression's report: single records, every model's prediction, and what each layer kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...data import Record
from ...evaluation import metrics
from ...evaluation.tasks.base import unpack
from ...io.preprocessing import transforms
from ...pruning.trace import PruneTrace, collect
from ...utils.modes import evaluating
from ...viz import kept_tokens

Rows = Sequence[Mapping[str, Any]]  # of an evaluation, one a record


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one record.

    Attributes:
        text: The prediction in words.
        correct: Whether it is right; None where that cannot be decided.
    """

    text: str
    correct: bool | None = None


@dataclass(frozen=True)
class Example:
    """One record of the report.

    Attributes:
        index: The record's index.
        prompt: The sentence or question; empty where there is none.
        reference: The right answer, or what people wrote.
        predictions: The prediction of each model.
        strip: What each layer of the image tower kept; None for a model that prunes no images.
        words: The words of the first text, and their states after the last layer; empty for a text that is not pruned.
    """

    index: int
    prompt: str
    reference: str
    predictions: Sequence[Prediction]
    strip: Image.Image | None
    words: Sequence[tuple[str, kept_tokens.TokenState]]


def examples(
    name: str, task: Any, model: nn.Module, records: Sequence[Any], record_rows: Sequence[Rows]
) -> list[Example]:
    """The first six records that every model answered, however they were answered.

    Args:
        name: The task's name.
        task: The task, set to the model.
        model: The pruned model, with the knob at which to show what it keeps.
        records: The records of the evaluations.
        record_rows: For each model, the rows of its evaluation, one a record.

    Returns:
        The examples, in the order of the records; fewer where fewer were answered.

    Raises:
        OSError: An image cannot be decoded. What the model raises is passed on.
    """
    describe_record, describe_rows = _TASKS[name]
    by_index = {record.index: record for record in records}
    rows = [{row["index"]: row for row in evaluation if "skipped" not in row} for evaluation in record_rows]
    first = [index for index in by_index if all(index in evaluation for evaluation in rows)][:6]
    predictions = [
        describe_rows(by_index, [*evaluation.values()], [evaluation[index] for index in first]) for evaluation in rows
    ]
    return [
        Example(
            index,
            *describe_record(by_index[index]),
            [of_model[i] for of_model in predictions],
            *_kept(task, model, by_index[index]),
        )
        for i, index in enumerate(first)
    ]


@torch.no_grad()
def _kept(
    task: Any, model: nn.Module, record: Record
) -> tuple[Image.Image | None, list[tuple[str, kept_tokens.TokenState]]]:
    """What the model kept of one record's images and of its first text."""
    prepare, device = transforms(model), next(model.parameters()).device
    images = record.load_tensor(prepare)
    texts, _ = task.tokenize([record])
    with evaluating(model), collect(threads=False) as traces:
        task.predict(model, [record], images[None].to(device), tuple(text.to(device) for text in texts))
    towers = {trace.tower: trace for trace in traces}

    inputs = [prepare.to_image(image) for image in images]
    strip = kept_tokens.record_strip(inputs, towers["image"]) if "image" in towers else None
    return strip, _words(task, towers["text"], texts) if "text" in towers else []


def _words(task: Any, trace: PruneTrace, texts: tuple[Tensor, ...]) -> list[tuple[str, kept_tokens.TokenState]]:
    """The first text's words and their states after the last layer; none where the task has no tokenizer to decode ids."""
    decode = getattr(getattr(task, "tokenizer", None), "decode", None)
    if decode is None or len(texts) != 2:
        return []
    ids = texts[0][0][texts[1][0].bool()]
    free = trace.input_tokens.free[trace.input_tokens.layout.instance == 0].cpu()
    if len(ids) != len(free):
        return []
    states = kept_tokens.instance_states(trace, 0)[-1].tolist()
    words = decode(ids[free][:, None])
    return [(word, kept_tokens.TokenState(state)) for word, state in zip(words, states, strict=True) if word]


def _judged(records: Mapping[int, Any], rows: Rows, chosen: Rows) -> list[Prediction]:
    return [
        Prediction(f"{str(value > 0.5).lower()} ({max(value, 1 - value):.0%})", (value > 0.5) == bool(row["label"]))
        for row in chosen
        for value in [row["probability"]]
    ]


def _answered(records: Mapping[int, Any], rows: Rows, chosen: Rows) -> list[Prediction]:
    """Right where anybody gave the same answer; undecided where one person answered, or the answers form a set."""
    people = [len(row["answers"]) > 1 and not row["is_answer_set"] for row in chosen]
    return [
        Prediction(row["answer"], metrics.vqa_accuracy(row["answer"], row["answers"]) > 0 if several else None)
        for row, several in zip(chosen, people, strict=True)
    ]


def _written(records: Mapping[int, Any], rows: Rows, chosen: Rows) -> list[Prediction]:
    return [Prediction(row["caption"]) for row in chosen]


def _found(records: Mapping[int, Any], rows: Rows, chosen: Rows) -> list[Prediction]:
    """The nearest text of each image; right where it is one of the image's own and no other is as near, as in
    `metrics.recalls`."""
    texts = torch.stack([unpack(text) for row in rows for text in row["texts"]])
    sources = [(row["index"], number) for row in rows for number in range(len(row["texts"]))]
    text_to_image = np.array([row["image_name"] for row in rows for _ in row["texts"]])
    predictions = []
    for row in chosen:
        near, own = texts @ unpack(row["image"]), torch.from_numpy(text_to_image == row["image_name"])
        correct = bool(near[own].max() > near.masked_fill(own, -torch.inf).max())
        index, number = sources[int(near.masked_fill(own != correct, -torch.inf).argmax())]
        text = records[index].captions[number]
        predictions.append(Prediction(text if correct else f"{text} (of record {index})", correct))
    return predictions


def _counted(answers: Sequence[str]) -> str:
    return ", ".join(f"{answer} ({n})" if n > 1 else answer for answer, n in Counter(answers).most_common())


# By task: a function from a record to prompt and reference, and one from records, rows and chosen rows to predictions.
_TASKS: Mapping[
    str, tuple[Callable[[Any], tuple[str, str]], Callable[[Mapping[int, Any], Rows, Rows], list[Prediction]]]
] = {
    "nlvr": (lambda record: (record.sentence, str(bool(record.label)).lower()), _judged),
    "vqa": (lambda record: (record.question, _counted(record.answers) or "held back"), _answered),
    "caption": (lambda record: ("", " / ".join(record.captions)), _written),
    "retrieval": (lambda record: ("", " / ".join(record.captions)), _found),
}
