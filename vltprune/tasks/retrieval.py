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
from ..text import clean_caption
from .base import DEFAULTS, LONGEST, Options, dense, words_of

Match = Callable[[Tensor, Tensor], Tensor]  # rows of images and of texts, [pairs] each, to how well they match [pairs]


@tasks.register("retrieval")
@dataclass(frozen=True)
class Retrieval:
    """Recall in both directions, by features of the two towers alone; each is run once a record.

    For open_clip's models, and for BLIP's that have `image_features` and `text_features` of one length. BLIP's second
    stage, `rerank`, is not part of it.
    """

    encode: Callable[[Sequence[str]], tuple[Tensor, ...]]
    image_features: Callable[[Any, Tensor], Tensor]
    text_features: Callable[..., Tensor]

    @staticmethod
    def read(data: str, images: str | Path, strict: bool = False) -> Sequence[Captioned]:
        return captions(data, images, strict=strict)

    @classmethod
    def of(cls, model: nn.Module, options: Options = DEFAULTS) -> Retrieval:
        host = dense(model)
        recipe = getattr(host, "recipe", None)
        if hasattr(host, "encode_image") and recipe is not None:
            tokenize: Any = importlib.import_module("open_clip").get_tokenizer(open_clip_name(recipe.backbone))
            return cls(lambda texts: (tokenize(list(texts)),), _clip_image, _clip_text)
        if hasattr(host, "match"):
            words = words_of(host.text, options, clean_caption, max_length=LONGEST)
            return cls(words.encode, _blip_image, _blip_text)
        raise ValueError(
            f"retrieval compares features of images and texts, and a {type(host).__name__} has none that were trained for "
            "it: use a model of open_clip by name, such as clip_vit_b_32, or a blip_retrieval"
        )

    def texts(self, records: Sequence[Captioned]) -> tuple[tuple[Tensor, ...], list[int]]:
        return self.encode([text for r in records for text in r.captions]), [len(r.captions) for r in records]

    def answer(
        self, model: Any, records: Sequence[Captioned], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[dict[str, Any]]:
        seen = self.image_features(model, images[:, 0])
        read = self.text_features(model, *texts).split([len(record.captions) for record in records])
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


def _clip_image(model: Any, images: Tensor) -> Tensor:
    return model.encode_image(images, normalize=True)


def _clip_text(model: Any, input_ids: Tensor) -> Tensor:
    return model.encode_text(input_ids, normalize=True)


def _blip_image(model: Any, images: Tensor) -> Tensor:
    return model.image_features(images)


def _blip_text(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return model.text_features(input_ids, attention_mask)


def _pack(feature: Tensor) -> str:
    """[dim] float32 as text, a third longer than its bytes."""
    return base64.b64encode(feature.float().cpu().numpy().tobytes()).decode("ascii")


def _unpack(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).copy())
