"""What a task is: how its records are read, put to a model, and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from ..data.records import Record
from ..data.words import WordTokenizer
from ..text import BERT, CLS, BlipTokenizer

R = TypeVar("R", bound=Record)
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
class Words:
    """A model's way from sentences to `input_ids` and `attention_mask` [sentences, length], and from ids back."""

    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor], list[str]]


class Task(Protocol[R]):
    """One task, set to one model. Register a class with `vltprune.tasks.tasks.register(name)`: its name is then a `--task`.

    `answer` gives one row of plain JSON values a record; `score` needs nothing but the rows of all records.
    """

    @staticmethod
    def read(data: str, images: str | Path, strict: bool) -> Sequence[R]:
        """The records of an annotation file; their pictures' paths begin in the folder `images`."""
        ...

    @classmethod
    def of(cls, model: nn.Module, options: Options) -> Task[R]:
        """The task for a model, dense or pruned. ValueError for one that cannot do it, with one that can."""
        ...

    def texts(self, records: Sequence[R]) -> tuple[tuple[Tensor, ...], list[int]]:
        """The texts of a batch as the model takes them, and how many each record has."""
        ...

    def answer(
        self, model: Any, records: Sequence[R], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[dict[str, Any]]:
        """images [batch, images a record, 3, height, width]; each tower of the model is called once at most."""
        ...

    def score(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The metrics, shares of 1."""
        ...


def words_of(
    reader: Any, options: Options, clean: Callable[[str], str], first: str = CLS, max_length: int | None = None
) -> Words:
    """The words of a text tower: our closed vocabulary where it has its size, else BERT's, sentences cleaned as for BLIP.

    first, max_length: as of `BlipTokenizer.encode`. ValueError for a vocabulary that is not the tower's.
    """
    known, closed = reader.word.num_embeddings, WordTokenizer()
    if known in (len(closed), len(closed) + 2):  # a decoder's two more begin a sentence
        return Words(closed.encode, closed.decode)
    blip = BlipTokenizer.load(options.vocabulary)
    if len(blip) != known:
        raise ValueError(
            f"the vocabulary {options.vocabulary} has {len(blip)} ids, the model {known}: give the model's own"
        )

    def encode(sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        return blip.encode([clean(text) for text in sentences], first=first, max_length=max_length)

    return Words(encode, blip.decode)


def dense(model: Any) -> Any:
    """The dense host of a pruned model; a dense one as it is."""
    return model.pruning.host if hasattr(model, "pruning") else model
