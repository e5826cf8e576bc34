"""What a task is: how its records are read, put to a model, and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from ..data.records import Record

R = TypeVar("R", bound=Record)
Tokenize = Callable[[Sequence[str]], tuple[Tensor, ...]]  # sentences to what a model takes, [sentences, ...] each


class Task(Protocol[R]):
    """One task, set to one model. Register a class with `vltprune.tasks.tasks.register(name)`: its name is then a `--task`.

    `answer` gives one row of plain JSON values a record; `score` needs nothing but the rows of all records.
    """

    @staticmethod
    def read(data: str, images: str | Path, strict: bool) -> Sequence[R]:
        """The records of an annotation file; their pictures' paths begin in the folder `images`."""
        ...

    @classmethod
    def of(cls, model: nn.Module, vocabulary: str | Path | None) -> Task[R]:
        """The task for a model, dense or pruned. ValueError for one that cannot do it, with what can."""
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


def dense(model: Any) -> Any:
    """The dense host of a pruned model; a dense one as it is."""
    return model.pruning.host if hasattr(model, "pruning") else model
