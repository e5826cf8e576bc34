"""NLVR2, and the drawn pairs that are like it: is a sentence true of two images?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import metrics
from ..data import Statement, SyntheticStatements, nlvr2
from ..data.words import WordTokenizer
from ..registry import tasks
from ..text import ENC, BlipTokenizer, clean_caption
from .base import Tokenize, dense

SYNTHETIC, _PAIRS = "synthetic:", 1800
_WORDS, _TOKENS = 40, 35  # what BLIP cuts NLVR2's sentences at


@tasks.register("nlvr")
@dataclass(frozen=True)
class Nlvr:
    """Accuracy of true and false, by the models whose call gives those two logits (BlipNlvr)."""

    tokenize: Tokenize

    @staticmethod
    def read(data: str, images: str | Path, strict: bool = False) -> Sequence[Statement]:
        """An annotation file of NLVR2, or "synthetic:SPLIT": pairs drawn on the spot, which need no `images`."""
        if data.startswith(SYNTHETIC):
            return SyntheticStatements(data.removeprefix(SYNTHETIC), _PAIRS)
        return nlvr2(data, images, strict=strict)

    @classmethod
    def of(cls, model: nn.Module, vocabulary: str | Path | None = None) -> Nlvr:
        """vocabulary: BERT's, as `BlipTokenizer.load` takes it; the tiny models have their own. ValueError as of `Task`."""
        host = dense(model)
        if getattr(host, "images_per_sentence", 1) != 2:
            raise ValueError(f"nlvr asks about two images, and a {type(host).__name__} reads one: use a blip_nlvr")
        if host.text.word.num_embeddings == len(WordTokenizer()):
            return cls(WordTokenizer().encode)
        blip = BlipTokenizer.load(vocabulary) if vocabulary is not None else BlipTokenizer.load()

        def tokenize(sentences: Sequence[str]) -> tuple[Tensor, ...]:
            return blip.encode([clean_caption(text, _WORDS) for text in sentences], first=ENC, max_length=_TOKENS)

        return cls(tokenize)

    def texts(self, records: Sequence[Statement]) -> tuple[tuple[Tensor, ...], list[int]]:
        return self.tokenize([record.sentence for record in records]), [1] * len(records)

    def answer(
        self, model: Any, records: Sequence[Statement], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[dict[str, Any]]:
        chances = model(images, *texts).softmax(-1)[:, 1].tolist()
        return [{"chance": chance, "label": record.label} for chance, record in zip(chances, records, strict=True)]

    def score(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {"accuracy": metrics.accuracy([row["chance"] for row in rows], [row["label"] for row in rows])}
