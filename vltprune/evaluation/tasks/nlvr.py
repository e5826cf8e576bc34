"""NLVR2 and synthetic NLVR: is a sentence true of two images?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...data import Statement, SyntheticNLVR, nlvr2
from ...data.annotations import parse_statement
from ...models.wordpiece import ENC, clean_caption
from ...registry import tasks
from .. import metrics
from ..results_log import Row
from .base import DEFAULTS, Images, Options, Tokenizer, dense, finite, one_folder, tokenizer_for

SYNTHETIC, _PAIRS = "synthetic:", 1800
_WORDS = 40  # BLIP truncates NLVR2's sentences to this


@tasks.register("nlvr")
@dataclass(frozen=True)
class Nlvr:
    """Accuracy of true and false, for models that return two logits for two images and a sentence (`BlipNlvr`).

    Attributes:
        tokenizer: The tokenizer of sentences.
    """

    tokenizer: Tokenizer

    @staticmethod
    def load_records(data: str, images: Images, strict: bool = False) -> Sequence[Statement]:
        """Load an annotation file of NLVR2, or synthetic NLVR, which needs no `images`.

        Args:
            data: A file, "synthetic:SPLIT" for 1,800 pairs, "synthetic:SPLIT:PAIRS" or "synthetic:SPLIT:PAIRSxSENTENCES".
            images: The folder that the file's image paths begin in.
            strict: Whether an entry that cannot be parsed is a ValueError; otherwise it is skipped.

        Returns:
            The records, in the order of the data set.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If the address of synthetic NLVR has another form, or as of `Task.load_records`.
        """
        if data.startswith(SYNTHETIC):
            return _synthetic(data)
        return nlvr2(data, one_folder(images), strict=strict)

    parse_entry = staticmethod(parse_statement)

    @classmethod
    def from_model(cls, model: nn.Module, options: Options = DEFAULTS) -> Nlvr:
        host = dense(model)
        if getattr(host, "images_per_sentence", 1) != 2:
            raise ValueError(f"nlvr asks about two images, and a {type(host).__name__} reads one: use a blip_nlvr")
        return cls(tokenizer_for(host, host.text, options, lambda text: clean_caption(text, _WORDS), ENC))

    def tokenize(self, records: Sequence[Statement]) -> tuple[tuple[Tensor, ...], list[int]]:
        return self.tokenizer.encode([record.sentence for record in records]), [1] * len(records)

    def predict(
        self, model: Callable[..., Tensor], records: Sequence[Statement], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[Row]:
        probabilities = finite(model(images, *texts), records, "logits").softmax(-1)[:, 1].tolist()
        return [
            {"probability": probability, "label": record.label}
            for probability, record in zip(probabilities, records, strict=True)
        ]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        return {"accuracy": metrics.accuracy([row["probability"] for row in rows], [row["label"] for row in rows])}


def _synthetic(data: str) -> SyntheticNLVR:
    match = re.fullmatch(rf"{SYNTHETIC}(\w+)(?::(\d+)(?:x(\d+))?)?", data)
    if match is None:
        raise ValueError(f"{data!r}: write synthetic:SPLIT, such as synthetic:test, or synthetic:train:16000x8")
    split, pairs, sentences = match.groups()
    return SyntheticNLVR(split, int(pairs or _PAIRS), sentences=int(sentences or 1))
