"""Task interface: loads records, runs a model on them, and scores the predictions."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ...data.annotations import Entry
from ...data.images import ImageSource
from ...data.records import Record
from ...data.word_tokenizer import WordTokenizer
from ...models.med import MedEncoder
from ...models.wordpiece import BERT, CLS, DEC, ENC, BlipTokenizer
from ...pruning.model import dense_model
from ..results_log import Row

R = TypeVar("R", bound=Record)
Input = TypeVar("Input", bound=Record, contravariant=True)
Images = str | Path | Mapping[str, str | Path]  # a folder of images, or one for each data set of a file
LONGEST = 35  # tokens; BLIP truncates captions and questions to this, but not the sentences of NLVR2


@dataclass(frozen=True)
class Options:
    """Options of tasks; each task uses those that concern it.

    Attributes:
        vocabulary: BERT's vocabulary, as `BlipTokenizer.load` takes it. The tiny models and open_clip's have their own.
        answers: A file with the list of answers to rank; None to generate answers.
    """

    vocabulary: str | Path = BERT
    answers: str | Path | None = None


DEFAULTS = Options()


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes:
        encode: Sentences to `input_ids` and `attention_mask`, both [sentences, length].
        decode: `input_ids` [sentences, length] to sentences.
    """

    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor], list[str]]


class EvaluationStage(Protocol[Input]):
    """One pass over a data set: tokenizes the texts, runs the model, and scores the rows of all records."""

    def tokenize(self, records: Sequence[Input]) -> tuple[tuple[Tensor, ...], list[int]]:
        """Tokenize the texts of a batch.

        Returns:
            The text inputs of the model, and the number of texts of each record.

        Raises:
            ValueError: If the model cannot read a text.
        """
        ...

    def predict(self, model: Any, records: Sequence[Input], images: Tensor, texts: tuple[Tensor, ...]) -> list[Row]:
        """Run the model on a batch; each of its towers is called once at most.

        Args:
            model: The model, dense or pruned; each task says what it calls of it.
            records: The records of the batch.
            images: [batch, images a record, 3, height, width].
            texts: What `tokenize` returned.

        Returns:
            One row of plain JSON values a record.

        Raises:
            FloatingPointError: If the model's outputs are NaN or infinite.
        """
        ...

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """The metrics of the rows of all records, as fractions of 1."""
        ...


class Task(EvaluationStage[R], Protocol[R]):
    """A task, set to one model. `vltprune.registry.tasks.register(name)` makes a class a `--task`.

    The predictions of a task that is a `SupportsSubmission` are also written as its server takes them.
    """

    @staticmethod
    def load_records(data: str, images: Images, strict: bool) -> Sequence[R]:
        """Load the records of a data set.

        Args:
            data: An annotation file.
            images: The folder that its image paths begin in.
            strict: Whether an entry that cannot be parsed is a ValueError; otherwise it is skipped.

        Returns:
            The records, in the order of the data set.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If no entry can be parsed, or if several folders are given to a task whose images are of one data set.
        """
        ...

    @staticmethod
    def parse_entry(index: int, entry: Entry, images: Sequence[ImageSource]) -> R:
        """Parse one entry of the format that annotation files have; shards are read by it.

        Args:
            index: The record's index, as `Record.index`.
            entry: The entry, as an annotation file has it; its paths are not followed.
            images: The entry's images, in its order.

        Returns:
            The record.

        Raises:
            LookupError, TypeError, ValueError, AttributeError, RecursionError: If the entry has another format.
        """
        ...

    @classmethod
    def from_model(cls, model: nn.Module, options: Options) -> Task[R]:
        """Set the task to a model, dense or pruned.

        Args:
            model: The model, on any device.
            options: The vocabulary, and further options that concern the task.

        Returns:
            The task, which tokenizes as the model was trained.

        Raises:
            ValueError: If the model cannot do the task, or if the vocabulary is another model's; the message says what to give.
        """
        ...


@runtime_checkable
class SupportsSubmission(Protocol):
    """A task whose predictions a data set's server or evaluation code takes."""

    def submission(self, rows: Sequence[Row]) -> list[dict[str, object]]:
        """The predictions in the server's format, to be written as JSON."""
        ...


@runtime_checkable
class SupportsUnscored(Protocol):
    """A task some of whose metrics need what a machine may lack."""

    def unscored(self, scores: Mapping[str, float]) -> dict[str, str]:
        """The metrics that are missing from `scores`, each with the reason and what to install."""
        ...


def tokenizer_for(
    host: nn.Module,
    tower: MedEncoder,
    options: Options,
    clean: Callable[[str], str],
    first: str = CLS,
    max_length: int | None = None,
) -> Tokenizer:
    """The tokenizer of a BLIP text tower: `WordTokenizer` for a vocabulary of its size, else BERT's.

    Args:
        host: The dense model.
        tower: Its text encoder or decoder.
        options: Options with the path of BERT's vocabulary.
        clean: Applied to each sentence.
        first: The first token, as of `BlipTokenizer.encode`.
        max_length: Longest sentence in tokens; the tower's own maximum holds as well.

    Returns:
        The tokenizer of the tower's own token ids.

    Raises:
        ValueError: If the vocabulary is not the tower's.
    """
    known, longest, closed = tower.word.num_embeddings, tower.position.num_embeddings, WordTokenizer()
    if known in (len(closed), len(closed) + 2):  # a decoder has two more tokens, which begin a sentence
        return Tokenizer(closed.encode, closed.decode)
    blip = BlipTokenizer.load(options.vocabulary, max_positions=longest)
    if len(blip) != known:
        raise ValueError(
            f"the vocabulary {options.vocabulary} has {len(blip)} ids, the model {known}: give the model's own"
        )
    _check_ids(host, blip)
    length = None if max_length is None else min(max_length, longest)

    def encode(sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        return blip.encode([clean(text) for text in sentences], first=first, max_length=length)

    return Tokenizer(encode, blip.decode)


def _check_ids(host: nn.Module, blip: BlipTokenizer) -> None:
    """ValueError where a model was built with other ids of special tokens than the vocabulary's."""
    meant = {"enc_id": blip.id(ENC), "bos_id": blip.id(DEC), "eos_id": blip.id("[SEP]")}
    wrong = {name: id for name, id in meant.items() if getattr(host, name, id) != id}
    if wrong:
        there = " ".join(f"{name}={getattr(host, name)}" for name in wrong)
        right = " ".join(f"{name}={id}" for name, id in wrong.items())
        raise ValueError(f"the model has {there}, and its vocabulary {right}: build the model with {right}")


def dense(model: nn.Module) -> Any:
    """Return the dense model of a pruned one; a dense one as it is.

    The type is Any, since tasks look for attributes of many classes.
    """
    return dense_model(model)


def one_folder(images: Images) -> str | Path:
    """The folder of images, for a task whose files have images of one data set.

    Raises:
        ValueError: If several folders are given.
    """
    if isinstance(images, Mapping):
        raise ValueError(f"images of {', '.join(images)}: this task's images are of one data set, give one folder")
    return images


def finite(scores: Tensor, records: Iterable[Record], what: str) -> Tensor:
    """Check a model's outputs.

    Args:
        scores: [records, ...].
        records: The records that they are of.
        what: What to call them in the error.

    Returns:
        The scores.

    Raises:
        FloatingPointError: If one is NaN or infinite; the message names the record.
    """
    bad = (~scores.flatten(1).isfinite().all(1)).nonzero()
    if len(bad):
        index = [record.index for record in records][int(bad[0])]
        raise FloatingPointError(
            f"the model's {what} of entry {index} are NaN or infinite, which is no answer: check its weights, or compute in "
            "full precision"
        )
    return scores


def number(id: str) -> int | str:
    """An identifier that the annotations lack: as a number where it is one."""
    return int(id) if id.isdecimal() and str(int(id)) == id else id


def pack(values: Tensor) -> str:
    """Encode a tensor of any type as base64 text, for rows of JSON."""
    return base64.b64encode(values.cpu().numpy().tobytes()).decode("ascii")


def unpack(text: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode what `pack` encoded.

    Args:
        text: The text that `pack` returned.
        dtype: The type of the tensor that was packed; another one gives wrong values.

    Returns:
        The values, [n], flat: the shape is not packed.
    """
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)
