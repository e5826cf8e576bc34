"""Example records of a compression's report: what each layer kept of them, and what was answered.

Of a compression's report, this alone runs a model.
"""

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
class Said:
    """What was answered, in words, and whether it is right; None where that is no question of yes or no."""

    text: str
    right: bool | None = None


@dataclass(frozen=True)
class Example:
    """One record. asked: the sentence or question, or nothing; truth: what people say; said: answers, one a cost; film:
    what the image tower kept, None for a model that prunes no images; words: of the text, and what became of each."""

    index: int
    asked: str
    truth: str
    said: Sequence[Said]
    film: Image.Image | None
    words: Sequence[tuple[str, kept_tokens.TokenState]]


def examples(
    name: str, task: Any, model: nn.Module, records: Sequence[Any], answered: Sequence[Rows], count: int = 6
) -> list[Example]:
    """The first `count` records that were answered at every cost: none is chosen by how.

    name, task: the task by its name, and set to the model; model: pruned, with its knob where it is to be shown; records:
    those of the evaluations; answered: the evaluations' rows, one evaluation a cost. Raises what pictures and models raise.
    """
    asked, told = _ASKED[name]
    by_index = {record.index: record for record in records}
    rows = [{row["index"]: row for row in evaluation if "skipped" not in row} for evaluation in answered]
    first = [index for index in by_index if all(index in evaluation for evaluation in rows)][:count]
    said = [told(by_index, [*evaluation.values()], [evaluation[index] for index in first]) for evaluation in rows]
    return [
        Example(index, *asked(by_index[index]), [one[place] for one in said], *_looked(task, model, by_index[index]))
        for place, index in enumerate(first)
    ]


@torch.no_grad()
def _looked(
    task: Any, model: nn.Module, record: Record
) -> tuple[Image.Image | None, list[tuple[str, kept_tokens.TokenState]]]:
    """What became of one record's pictures and of its first text, as the model answers it."""
    prepare, device = transforms(model), next(model.parameters()).device
    images = record.load_tensor(prepare)
    texts, _ = task.tokenize([record])
    with evaluating(model), collect(threads=False) as traces:
        task.predict(model, [record], images[None].to(device), tuple(text.to(device) for text in texts))
    towers = {trace.tower: trace for trace in traces}

    seen = [prepare.to_image(image) for image in images]
    film = kept_tokens.record_strip(seen, towers["image"]) if "image" in towers else None
    return film, _words(task, towers["text"], texts) if "text" in towers else []


def _words(task: Any, trace: PruneTrace, texts: tuple[Tensor, ...]) -> list[tuple[str, kept_tokens.TokenState]]:
    """The first text's pieces, and what had become of each behind the last layer; none where a task cannot spell ids."""
    spell = getattr(getattr(task, "tokenizer", None), "decode", None)
    if spell is None or len(texts) != 2:
        return []
    ids = texts[0][0][texts[1][0].bool()]
    free = trace.input_tokens.free[trace.input_tokens.layout.instance == 0].cpu()
    if len(ids) != len(free):
        return []
    fates = kept_tokens.instance_states(trace, 0)[-1].tolist()
    pieces = spell(ids[free][:, None])
    return [(piece, kept_tokens.TokenState(fate)) for piece, fate in zip(pieces, fates, strict=True) if piece]


def _judged(records: Mapping[int, Any], rows: Rows, chosen: Rows) -> list[Said]:
    return [
        Said(f"{str(chance > 0.5).lower()} ({max(chance, 1 - chance):.0%})", (chance > 0.5) == bool(row["label"]))
        for row in chosen
        for chance in [row["probability"]]
    ]


def _answered(records: Mapping[int, Any], rows: Rows, chosen: Rows) -> list[Said]:
    """By VQA accuracy, right where anybody said the same; not judged where answers are one's, or belong together."""
    people = [len(row["answers"]) > 1 and not row["is_answer_set"] for row in chosen]
    return [
        Said(row["answer"], metrics.vqa_accuracy(row["answer"], row["answers"]) > 0 if several else None)
        for row, several in zip(chosen, people, strict=True)
    ]


def _written(records: Mapping[int, Any], rows: Rows, chosen: Rows) -> list[Said]:
    return [Said(row["caption"]) for row in chosen]


def _found(records: Mapping[int, Any], rows: Rows, chosen: Rows) -> list[Said]:
    """The text nearest to each image, of all that were read; right where it is one of its own, and no other is as near, as
    `metrics.recalls` has it."""
    texts = torch.stack([unpack(text) for row in rows for text in row["texts"]])
    places = [(row["index"], place) for row in rows for place in range(len(row["texts"]))]
    owners, said = np.array([row["image_name"] for row in rows for _ in row["texts"]]), []
    for row in chosen:
        near, own = texts @ unpack(row["image"]), torch.from_numpy(owners == row["image_name"])
        right = bool(near[own].max() > near.masked_fill(own, -torch.inf).max())
        index, place = places[int(near.masked_fill(own != right, -torch.inf).argmax())]
        text = records[index].captions[place]
        said.append(Said(text if right else f"{text} (of record {index})", right))
    return said


def _counted(answers: Sequence[str]) -> str:
    return ", ".join(f"{answer} ({n})" if n > 1 else answer for answer, n in Counter(answers).most_common())


# what a record asks and what is true, and what rows say of it: functions of a record, and of records, rows, chosen rows
_ASKED: Mapping[str, tuple[Callable[[Any], tuple[str, str]], Callable[[Mapping[int, Any], Rows, Rows], list[Said]]]] = {
    "nlvr": (lambda record: (record.sentence, str(bool(record.label)).lower()), _judged),
    "vqa": (lambda record: (record.question, _counted(record.answers) or "held back"), _answered),
    "caption": (lambda record: ("", " / ".join(record.captions)), _written),
    "retrieval": (lambda record: ("", " / ".join(record.captions)), _found),
}
