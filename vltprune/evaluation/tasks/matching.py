"""Retrieval, second stage: image-text pairs that are near by their features, scored again by a matching head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...data import Captioned, Record
from .. import metrics
from .base import finite, pack, unpack

Match = Callable[[Tensor, Tensor], Tensor]  # rows of images and of texts, [pairs] each, to how well they match [pairs]

MOST = 128  # what BLIP judges again on Flickr30k; 256 on COCO
_TOGETHER = 256  # texts that one call judges: popular images are near to thousands, and this bounds the memory
_UNJUDGED = -1e4


@dataclass(frozen=True)
class Pairs(Record):
    """An image, by its row among all, and texts [n] int64, by their columns, that one call judges against it."""

    row: int
    texts: Tensor


@dataclass(frozen=True)
class Matching:
    """BLIP's second stage (Li et al., arXiv 2201.12086, section 5.1), put to a model like a task; its records are `pairs`.

    For each image the `most` texts nearest by features are judged by the matching head, and for each text the `most`
    nearest images. The head's logit for "they match" is added to the cosine of the features, neither scaled, as in BLIP;
    what was not judged comes last. A pair near in both directions is judged once. Image tokens are computed anew for
    each call, so that none are stored; what grows with the data set are a few matrices [images, texts], 4 bytes an entry.

    encode      captions to `input_ids` and `attention_mask`
    records     those that have features, in the order of the similarity's rows
    similarity  [images, texts]; text_to_image [texts], the row of each text's image
    """

    encode: Callable[[Sequence[str]], tuple[Tensor, ...]]
    records: Sequence[Captioned]
    similarity: Tensor
    text_to_image: Sequence[int]
    most: int

    @property
    def fingerprint(self) -> str:
        """Of the similarity, which says what is judged: for whoever goes on with a second stage."""
        return hashlib.blake2b(self.similarity.contiguous().numpy().tobytes(), digest_size=16).hexdigest()

    def pairs(self) -> list[Pairs]:
        """What is to be judged, image after image."""
        wanted = torch.zeros_like(self.similarity, dtype=torch.bool)

        def note(images: Tensor, texts: Tensor) -> Tensor:
            wanted[images, texts] = True
            return torch.zeros(len(images))

        rerank(self.similarity, note, self.most)  # asks for the very pairs that `score` will ask for
        found: list[Pairs] = []
        for row, record in enumerate(self.records):
            for texts in wanted[row].nonzero().squeeze(1).split(_TOGETHER):
                found.append(Pairs(len(found), record.images, row, texts))
        return found

    def tokenize(self, records: Sequence[Pairs]) -> tuple[tuple[Tensor, ...], list[int]]:
        wanted = [self._captions[text] for record in records for text in record.texts.tolist()]
        return self.encode(wanted), [len(record.texts) for record in records]

    def predict(
        self, model: Any, records: Sequence[Pairs], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[dict[str, Any]]:
        """As of `Task`, for one image at a time or images with equally many texts."""
        each = [record for record in records for _ in record.texts]
        logits = finite(model(images[:, 0], *texts), each, "matching logits")[:, 1]
        logits = logits.split([len(record.texts) for record in records])
        return [
            {"image": record.row, "pairs": len(some), "texts": pack(record.texts.int()), "match": pack(some.float())}
            for record, some in zip(records, logits, strict=True)
        ]

    def score(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Recalls over all images and texts; pairs that no row has come last, as if they had not been near."""
        judged = torch.full_like(self.similarity, _UNJUDGED)
        for row in rows:
            judged[row["image"], unpack(row["texts"], torch.int32).long()] = unpack(row["match"])
        by_image, by_text = rerank(self.similarity, lambda images, texts: judged[images, texts], self.most)
        return metrics.recalls(by_image, self.text_to_image, by_text=by_text)

    @cached_property
    def _captions(self) -> list[str]:
        return [text for record in self.records for text in record.captions]


def rerank(similarity: Tensor, match: Match, most: int = 256) -> tuple[Tensor, Tensor]:
    """BLIP's second stage: the nearest of each image and of each text, judged again by a model that sees both.

    similarity [images, texts]; match(rows of images, rows of texts) -> [pairs], added to the similarity; most: how many
    nearest are judged (BLIP: 256 on COCO, 128 on Flickr30k). Returns what ranks texts for an image and what ranks images
    for a text, both [images, texts], for `metrics.recalls(first, text_to_image, by_text=second)`; pairs not judged come last.
    ValueError for similarities, and FloatingPointError for matches, that are NaN or infinite.
    """
    if not similarity.isfinite().all():
        raise ValueError("similarity holds NaN or infinity, and nothing can be ranked by it: check the features")

    def turned(texts: Tensor, images: Tensor) -> Tensor:
        return match(images, texts)

    return _judged(similarity, match, most), _judged(similarity.T, turned, most).T


def _judged(similarity: Tensor, match: Match, most: int) -> Tensor:
    """The best of each row [rows, columns], judged; last of all the others."""
    result = torch.full_like(similarity, _UNJUDGED)
    for row, scores in enumerate(similarity):
        best, columns = scores.topk(min(most, len(scores)))
        judged = best + match(torch.full_like(columns, row), columns)
        if not judged.isfinite().all():
            raise FloatingPointError(f"a match in row {row} is NaN or infinite, and nothing can be ranked by it")
        result[row, columns] = judged
    return result
