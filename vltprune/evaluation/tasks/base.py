"""Task interface: how records are read, given to a model, and scored."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ...data.images import ImageSource
from ...data.records import Record
from ...data.word_tokenizer import WordTokenizer
from ...models.wordpiece import BERT, CLS, DEC, ENC, BlipTokenizer
from ...pruning.model import dense_model

R = TypeVar("R", bound=Record)
Read = TypeVar("Read", bound=Record, contravariant=True)
Images = str | Path | Mapping[str, str | Path]  # a folder of pictures, or one for each data set that a file draws from
LONGEST = 35  # tokens; what BLIP cuts captions and questions at, but not the sentences of NLVR2


@dataclass(frozen=True)
class Options:
    """What a task may be told besides its records. Each task takes what concerns it.

    vocabulary  BERT's, as `BlipTokenizer.load` takes it; the tiny models have their own words, and open_clip's theirs
    answers     a file with the list of answers to choose from; None: answers in free words
    """

    vocabulary: str | Path = BERT
    answers: str | Path | None = None


DEFAULTS = Options()


@dataclass(frozen=True)
class Tokenizer:
    """A model's way from sentences to `input_ids` and `attention_mask` [sentences, length], and from ids back."""

    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor], list[str]]


class EvaluationStage(Protocol[Read]):
    """What is asked of a model, record by record. `predict` gives one row of plain JSON values a record; `score` needs
    nothing but the rows of all records."""

    def tokenize(self, records: Sequence[Read]) -> tuple[tuple[Tensor, ...], list[int]]:
        """The texts of a batch as the model takes them, and how many each record has."""
        ...

    def predict(
        self, model: Any, records: Sequence[Read], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[dict[str, Any]]:
        """images [batch, images a record, 3, height, width]; each tower of the model is called once at most."""
        ...

    def score(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The metrics, shares of 1."""
        ...


class Task(EvaluationStage[R], Protocol[R]):
    """One task, set to one model. `vltprune.registry.tasks.register(name)` makes a class a `--task`.

    One that is a `SupportsSubmission` too gets its file of results written.
    """

    @staticmethod
    def load_records(data: str, images: Images, strict: bool) -> Sequence[R]:
        """The records of an annotation file; their pictures' paths begin in the folder `images`."""
        ...

    @staticmethod
    def parse_entry(index: int, entry: Mapping[str, Any], images: Sequence[ImageSource]) -> R:
        """The record of one entry, of the form that annotation files have, with its pictures at hand (from shards).

        Raises one of `annotations.UNREADABLE` for another form.
        """
        ...

    @classmethod
    def from_model(cls, model: nn.Module, options: Options) -> Task[R]:
        """The task for a model, dense or pruned. ValueError for one that cannot do it, with one that can."""
        ...


@runtime_checkable
class SupportsSubmission(Protocol):
    """A task whose answers are scored elsewhere too: by a data set's server, or its own evaluation code."""

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The answered rows in the form that is asked for there, to be written as JSON."""
        ...


@runtime_checkable
class SupportsUnscored(Protocol):
    """A task whose scores may not all be had on every machine."""

    def unscored(self, scores: Mapping[str, float]) -> dict[str, str]:
        """What is not among the `scores` of its rows, and the reason for each, with what to do about it."""
        ...


def tokenizer_for(
    host: Any,
    reader: Any,
    options: Options,
    clean: Callable[[str], str],
    first: str = CLS,
    max_length: int | None = None,
) -> Tokenizer:
    """The words of a text tower: our closed vocabulary where it has its size, else BERT's, sentences cleaned as for BLIP.

    host: the dense model that the tower `reader` stands in; first, max_length: as of `BlipTokenizer.encode`, but none is
    longer than the tower takes. ValueError for a vocabulary that is not the tower's.
    """
    known, longest, closed = reader.word.num_embeddings, reader.position.num_embeddings, WordTokenizer()
    if known in (len(closed), len(closed) + 2):  # a decoder's two more begin a sentence
        return Tokenizer(closed.encode, closed.decode)
    blip = BlipTokenizer.load(options.vocabulary, max_positions=longest)
    if len(blip) != known:
        raise ValueError(
            f"the vocabulary {options.vocabulary} has {len(blip)} ids, the model {known}: give the model's own"
        )
    _check_ids(host, blip)
    cut = None if max_length is None else min(max_length, longest)

    def encode(sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        return blip.encode([clean(text) for text in sentences], first=first, max_length=cut)

    return Tokenizer(encode, blip.decode)


def _check_ids(host: Any, blip: BlipTokenizer) -> None:
    """ValueError where a model was built to mark sentences by other ids than the vocabulary's."""
    meant = {"enc_id": blip.id(ENC), "bos_id": blip.id(DEC), "eos_id": blip.id("[SEP]")}
    wrong = {name: id for name, id in meant.items() if getattr(host, name, id) != id}
    if wrong:
        there = " ".join(f"{name}={getattr(host, name)}" for name in wrong)
        right = " ".join(f"{name}={id}" for name, id in wrong.items())
        raise ValueError(f"the model has {there}, and its vocabulary {right}: build the model with {right}")


def dense(model: Any) -> Any:
    """The dense host of a pruned model; a dense one as it is."""
    return dense_model(model)


def one_folder(images: Images) -> str | Path:
    """ValueError for several folders, from a task whose files draw from one data set."""
    if isinstance(images, Mapping):
        raise ValueError(f"images of {', '.join(images)}: this task draws from one data set, give one folder")
    return images


def finite(scores: Tensor, records: Iterable[Record], what: str) -> Tensor:
    """What a model gave for records, scores [records, ...], as it is. FloatingPointError that names a record for NaN or
    infinity: no answer can be read off them."""
    bad = (~scores.flatten(1).isfinite().all(1)).nonzero()
    if len(bad):
        index = [record.index for record in records][int(bad[0])]
        raise FloatingPointError(
            f"the model's {what} of entry {index} are NaN or infinite, which is no answer: check its weights, or compute in "
            "full precision"
        )
    return scores


def number(id: str) -> int | str:
    """An identifier that was made here, not given: a number where it is one."""
    return int(id) if id.isdecimal() and str(int(id)) == id else id


def pack(values: Tensor) -> str:
    """Numbers of any one type as text, a third longer than their bytes: for rows that are JSON."""
    return base64.b64encode(values.cpu().numpy().tobytes()).decode("ascii")


def unpack(text: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `pack` packed, [n], given its type."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)
