"""Retrieval: which text belongs to an image, and which image to a text, among all of a data set."""

from __future__ import annotations

import base64
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import metrics
from ..data import Captioned, captions
from ..factory import open_clip_name
from ..registry import tasks
from .base import Tokenize, dense

Match = Callable[[Tensor, Tensor], Tensor]  # rows of images and of texts, [pairs] each, to how well they match [pairs]


@tasks.register("retrieval")
@dataclass(frozen=True)
class Retrieval:
    """Recall in both directions, by features of the two towers alone (open_clip's models); each is run once a record."""

    tokenize: Tokenize

    @staticmethod
    def read(data: str, images: str | Path, strict: bool = False) -> Sequence[Captioned]:
        return captions(data, images, strict=strict)

    @classmethod
    def of(cls, model: nn.Module, vocabulary: str | Path | None = None) -> Retrieval:
        """vocabulary: nothing to choose, open_clip knows its own. ValueError as of `Task`."""
        host = dense(model)
        recipe = getattr(host, "recipe", None)
        if not hasattr(host, "encode_image") or recipe is None:
            raise ValueError(
                f"retrieval compares features of images and texts, and a {type(host).__name__} gives none: use a model of "
                "open_clip by name, such as clip_vit_b_32"
            )
        encode: Any = importlib.import_module("open_clip").get_tokenizer(open_clip_name(recipe.backbone))
        return cls(lambda sentences: (encode(list(sentences)),))

    def texts(self, records: Sequence[Captioned]) -> tuple[tuple[Tensor, ...], list[int]]:
        return self.tokenize([text for r in records for text in r.captions]), [len(r.captions) for r in records]

    def answer(
        self, model: Any, records: Sequence[Captioned], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[dict[str, Any]]:
        seen = model.encode_image(images[:, 0], normalize=True)
        read = model.encode_text(*texts, normalize=True).split([len(record.captions) for record in records])
        return [{"image": _pack(one), "texts": [*map(_pack, some)]} for one, some in zip(seen, read, strict=True)]

    def score(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        images = torch.stack([_unpack(row["image"]) for row in rows])
        texts = torch.stack([_unpack(text) for row in rows for text in row["texts"]])
        owners = [i for i, row in enumerate(rows) for _ in row["texts"]]
        return metrics.recalls(images @ texts.T, owners)


def rerank(similarity: Tensor, match: Match, most: int = 256) -> tuple[Tensor, Tensor]:
    """BLIP's second stage: the nearest of each image and of each text, judged again by a model that sees both.

    similarity [images, texts]; match(rows of images, rows of texts) -> [pairs], added to the similarity; most: how many
    nearest are judged (BLIP: 256 on COCO, 128 on Flickr30k). Returns what ranks texts for an image and what ranks images
    for a text, both [images, texts], for `metrics.recalls(first, owners, by_text=second)`; pairs not judged come last.
    """

    def turned(texts: Tensor, images: Tensor) -> Tensor:
        return match(images, texts)

    return _judged(similarity, match, most), _judged(similarity.T, turned, most).T


def _judged(similarity: Tensor, match: Match, most: int) -> Tensor:
    """The best of each row [rows, columns], judged; -1e4 elsewhere."""
    result = torch.full_like(similarity, -1e4)
    for row, scores in enumerate(similarity):
        best, columns = scores.topk(min(most, len(scores)))
        result[row, columns] = best + match(torch.full_like(columns, row), columns)
    return result


def _pack(feature: Tensor) -> str:
    """[dim] float32 as text, a third longer than its bytes."""
    return base64.b64encode(feature.float().cpu().numpy().tobytes()).decode("ascii")


def _unpack(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).copy())
