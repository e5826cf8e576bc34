"""Captions: COCO, Flickr30k, Flickr8k; NoCaps in the same form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import metrics
from ..data import Captioned, captions
from ..registry import tasks
from .base import DEFAULTS, Options, Words, dense, words_of


@tasks.register("caption")
@dataclass(frozen=True)
class Caption:
    """BLEU and CIDEr of one caption an image, by the models whose `generate` continues a `prompt` (BlipCaption)."""

    words: Words
    prompt: int  # how many tokens of a caption are not the model's

    @staticmethod
    def read(data: str, images: str | Path, strict: bool = False) -> Sequence[Captioned]:
        return captions(data, images, strict=strict)

    @classmethod
    def of(cls, model: nn.Module, options: Options = DEFAULTS) -> Caption:
        """ValueError as of `Task`; ImportError, before the work begins, without the package that scores captions."""
        host = dense(model)
        if not (hasattr(host, "prompt") and hasattr(host, "generate")):
            raise ValueError(f"caption asks for captions, and a {type(host).__name__} writes none: use a blip_caption")
        metrics.pycocoevalcap()
        return cls(words_of(host.decoder.body, options, str), len(host.prompt))

    def texts(self, records: Sequence[Captioned]) -> tuple[tuple[Tensor, ...], list[int]]:
        return (), [1] * len(records)

    def answer(
        self, model: Any, records: Sequence[Captioned], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[dict[str, Any]]:
        written = self.words.decode(model.generate(images[:, 0])[:, self.prompt :])
        return [
            {"id": record.id, "caption": text, "captions": list(record.captions)}
            for text, record in zip(written, records, strict=True)
        ]

    def score(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        places = {str(row["index"]): row for row in rows}  # ids may repeat: training files have an entry a caption
        return metrics.caption_scores(
            {place: row["caption"] for place, row in places.items()},
            {place: row["captions"] for place, row in places.items()},
        )
