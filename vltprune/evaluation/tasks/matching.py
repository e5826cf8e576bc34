"""Second stage of retrieval: a matching head scores the pairs that are nearest by their features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...data import Captioned, Record
from .. import metrics
from ..results_log import Row
from .base import finite, pack, unpack

Match = Callable[[Tensor, Tensor], Tensor]  # indices of images and of texts, [pairs] each, to scores [pairs]

K_TEST = 128  # BLIP's on Flickr30k; 256 on COCO
_TEXTS_PER_CALL = 256  # bounds the memory: some images are near to thousands of texts
_UNSCORED = -1e4


@dataclass(frozen=True)
class Pairs(Record):
    """An image and the texts that one call scores against it.

    Attributes:
        index: The record's index in `Matching.pairs`.
        images: The image alone, as of `Record`.
        row: The image's index among all images.
        texts: int64 [n], the texts' indices among all texts.
    """

    row: int
    texts: Tensor


@dataclass(frozen=True)
class Matching:
    """BLIP's second stage of retrieval (Li et al., arXiv 2201.12086, section 5.1); its records are `pairs`.

    For each image the matching head scores the k texts nearest by features, and for each text the k nearest images. The
    head's logit for "they match" is added to the cosine of the features, neither scaled, as in BLIP. Pairs without a score
    rank last. A pair that is near in both directions is scored once. Image tokens are computed in each call and not
    stored; memory grows by a few matrices [images, texts] of 4 bytes an entry.

    Attributes:
        encode: Captions to `input_ids` and `attention_mask`.
        records: One record an image, in the order of the similarity's rows.
        similarity: [images, texts].
        text_to_image: [texts], the index of each text's image.
        k: How many nearest texts and images are scored.
    """

    encode: Callable[[Sequence[str]], tuple[Tensor, ...]]
    records: Sequence[Captioned]
    similarity: Tensor
    text_to_image: Sequence[int]
    k: int

    @property
    def fingerprint(self) -> str:
        """The digest of the similarity, which determines the pairs; a stopped second stage resumes only on the same one."""
        return hashlib.blake2b(self.similarity.contiguous().numpy().tobytes(), digest_size=16).hexdigest()

    def pairs(self) -> list[Pairs]:
        """The pairs to score, image after image."""
        wanted = torch.zeros_like(self.similarity, dtype=torch.bool)

        def mark(images: Tensor, texts: Tensor) -> Tensor:
            wanted[images, texts] = True
            return torch.zeros(len(images))

        rerank(self.similarity, mark, self.k)  # asks for the same pairs as `score`
        found: list[Pairs] = []
        for row, record in enumerate(self.records):
            for texts in wanted[row].nonzero().squeeze(1).split(_TEXTS_PER_CALL):
                found.append(Pairs(len(found), record.images, row, texts))
        return found

    def tokenize(self, records: Sequence[Pairs]) -> tuple[tuple[Tensor, ...], list[int]]:
        wanted = [self._captions[text] for record in records for text in record.texts.tolist()]
        return self.encode(wanted), [len(record.texts) for record in records]

    def predict(
        self, model: Callable[..., Tensor], records: Sequence[Pairs], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[Row]:
        """Score the pairs of one image, or of images with equally many texts.

        Args:
            model: The model, dense or pruned; called on images and texts it returns two logits a pair, [pairs, 2].
            records: The pairs of the batch.
            images: [batch, 1, 3, height, width].
            texts: What `tokenize` returned, [pairs, length] each.

        Returns:
            One row a record: the image's index, the number of pairs, and the packed texts and scores.

        Raises:
            FloatingPointError: If a logit is NaN or infinite.
        """
        repeated = [record for record in records for _ in record.texts]
        logits = finite(model(images[:, 0], *texts), repeated, "matching logits")[:, 1]
        logits = logits.split([len(record.texts) for record in records])
        return [
            {"image": record.row, "pairs": len(match), "texts": pack(record.texts.int()), "match": pack(match.float())}
            for record, match in zip(records, logits, strict=True)
        ]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """Recalls over all images and texts; pairs without a row rank last."""
        scores = torch.full_like(self.similarity, _UNSCORED)
        for row in rows:
            scores[row["image"], unpack(row["texts"], torch.int32).long()] = unpack(row["match"])
        by_image, by_text = rerank(self.similarity, lambda images, texts: scores[images, texts], self.k)
        return metrics.recalls(by_image, self.text_to_image, by_text=by_text)

    @cached_property
    def _captions(self) -> list[str]:
        return [text for record in self.records for text in record.captions]


def rerank(similarity: Tensor, match: Match, k: int = 256) -> tuple[Tensor, Tensor]:
    """Add a matching score to the nearest pairs of each image and of each text, as in BLIP's second stage.

    Args:
        similarity: [images, texts].
        match: Indices of images and of texts, [pairs] each, to scores [pairs], which are added to the similarity.
        k: How many nearest texts and images are scored; BLIP: 256 on COCO, 128 on Flickr30k.

    Returns:
        What ranks texts for an image, and what ranks images for a text, both [images, texts], for
        `metrics.recalls(first, text_to_image, by_text=second)`. Pairs without a score rank last.

    Raises:
        ValueError: If similarities are NaN or infinite.
        FloatingPointError: If scores are NaN or infinite.
    """
    if not similarity.isfinite().all():
        raise ValueError("similarity holds NaN or infinity, and nothing can be ranked by it: check the features")

    def transposed(texts: Tensor, images: Tensor) -> Tensor:
        return match(images, texts)

    return _rescored(similarity, match, k), _rescored(similarity.T, transposed, k).T


def _rescored(similarity: Tensor, match: Match, k: int) -> Tensor:
    """The k best of each row [rows, columns] with their scores added; the others rank last."""
    result = torch.full_like(similarity, _UNSCORED)
    for row, scores in enumerate(similarity):
        best, columns = scores.topk(min(k, len(scores)))
        rescored = best + match(torch.full_like(columns, row), columns)
        if not rescored.isfinite().all():
            raise FloatingPointError(f"a match in row {row} is NaN or infinite, and nothing can be ranked by it")
        result[row, columns] = rescored
    return result
