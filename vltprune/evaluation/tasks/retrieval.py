"""Image-text retrieval in both directions, among all images and texts of a data set."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...data import Captioned, captions
from ...data.annotations import parse_captioned
from ...io.checkpoint import Recipe
from ...models.catalog import CONFIGURED, open_clip_name
from ...models.wordpiece import clean_caption, well_formed
from ...registry import tasks
from .. import metrics
from ..results_log import Row
from .base import DEFAULTS, LONGEST, Images, Options, dense, finite, one_folder, pack, tokenizer_for, unpack
from .matching import Matching


class ClipModel(Protocol):
    """A model of open_clip."""

    def encode_image(self, images: Tensor, normalize: bool) -> Tensor:
        """Encode images to features.

        Args:
            images: [batch, 3, height, width].
            normalize: Whether the features get length 1.

        Returns:
            The features, [batch, width].
        """
        ...

    def encode_text(self, input_ids: Tensor, normalize: bool) -> Tensor:
        """Encode texts to features.

        Args:
            input_ids: [texts, length].
            normalize: Whether the features get length 1.

        Returns:
            The features, [texts, width].
        """
        ...


class BlipModel(Protocol):
    """A model of BLIP, whose features are normalized."""

    def image_features(self, images: Tensor, /) -> Tensor:
        """Features [batch, width] of images [batch, 3, height, width]."""
        ...

    def text_features(self, input_ids: Tensor, attention_mask: Tensor, /) -> Tensor:
        """Encode texts to features of length 1.

        Args:
            input_ids: [texts, length].
            attention_mask: [texts, length], nonzero where a token is real.

        Returns:
            The features, [texts, width].
        """
        ...


@tasks.register("retrieval")
@dataclass(frozen=True)
class Retrieval:
    """Recall in both directions by the features of the two towers, each run once a record.

    Records of one image, as in files with an entry a caption, count as one image with all their captions. For open_clip's
    models, and for BLIP's that have `image_features` and `text_features` of one length.

    Attributes:
        encode: Captions to the text inputs of the model.
        image_features: The model and images [batch, 3, height, width] to features [batch, width].
        text_features: The model and its text inputs to features [texts, width].
        has_head: Whether the model also scores pairs, so that `matching` is a second stage for it.
    """

    encode: Callable[[Sequence[str]], tuple[Tensor, ...]]
    image_features: Callable[[Any, Tensor], Tensor]
    text_features: Callable[..., Tensor]
    has_head: bool = False

    @staticmethod
    def load_records(data: str, images: Images, strict: bool = False) -> Sequence[Captioned]:
        return captions(data, one_folder(images), strict=strict)

    parse_entry = staticmethod(parse_captioned)

    @classmethod
    def from_model(cls, model: nn.Module, options: Options = DEFAULTS) -> Retrieval:
        host = dense(model)
        recipe = getattr(host, "recipe", None)
        if hasattr(host, "encode_image") and recipe is not None:
            tokenize = _tokenizer(recipe)
            return cls(lambda texts: (tokenize([*map(well_formed, texts)]),), _clip_image, _clip_text)
        if hasattr(host, "match"):
            tokenizer = tokenizer_for(host, host.text, options, clean_caption, max_length=LONGEST)
            return cls(tokenizer.encode, _blip_image, _blip_text, has_head=True)
        raise ValueError(
            f"retrieval compares features of images and texts, and a {type(host).__name__} has none that were trained for "
            "it: use a model of open_clip by name, such as clip_vit_b_32, or a blip_retrieval"
        )

    def tokenize(self, records: Sequence[Captioned]) -> tuple[tuple[Tensor, ...], list[int]]:
        return self.encode([text for r in records for text in r.captions]), [len(r.captions) for r in records]

    def predict(self, model: Any, records: Sequence[Captioned], images: Tensor, texts: tuple[Tensor, ...]) -> list[Row]:
        counts = [len(record.captions) for record in records]
        repeated = [record for record in records for _ in record.captions]
        image = finite(self.image_features(model, images[:, 0]), records, "image features")
        text = finite(self.text_features(model, *texts), repeated, "text features").split(counts)
        return [
            {
                "image_name": record.image_name,
                "image": pack(image_feature.float()),
                "texts": [*map(pack, features.float())],
            }
            for record, image_feature, features in zip(records, image, text, strict=True)
        ]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        return metrics.recalls(*_similarity(rows))

    def matching(self, records: Sequence[Captioned], rows: Sequence[Row], k: int) -> Matching:
        """Build the second stage, over all rows that were not skipped.

        Args:
            records: The records of the first stage.
            rows: Its rows.
            k: How many nearest texts of each image, and images of each text, are scored again.

        Returns:
            The second stage, whose images are in the order of their first rows.
        """
        answered = [row for row in rows if "skipped" not in row]
        by_index = {record.index: record for record in records}
        groups = [[by_index[row["index"]] for row in group] for group in _by_image(answered)]
        merged = [replace(group[0], captions=tuple(text for r in group for text in r.captions)) for group in groups]
        return Matching(self.encode, merged, *_similarity(answered), k)


def _tokenizer(recipe: Recipe) -> Callable[[list[str]], Tensor]:
    """open_clip's tokenizer of a model's architecture and context length."""
    if recipe.backbone == CONFIGURED:
        return importlib.import_module("vltprune.models.clip").build_tokenizer(recipe.model_args["text_cfg"])
    length = recipe.model_args.get("force_context_length")
    return importlib.import_module("open_clip").get_tokenizer(open_clip_name(recipe.backbone), context_length=length)


def _similarity(rows: Sequence[Row]) -> tuple[Tensor, list[int]]:
    """Cosines [images, texts], and the index of each text's image; images in the order of their first rows."""
    groups = _by_image(rows)
    images = torch.stack([unpack(group[0]["image"]) for group in groups])
    texts = [[text for row in group for text in row["texts"]] for group in groups]
    text_features = torch.stack([unpack(text) for group in texts for text in group])
    return images @ text_features.T, [i for i, group in enumerate(texts) for _ in group]


def _by_image(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each image, in the order of the images' first rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["image_name"], []).append(row)
    return [*groups.values()]


def _clip_image(model: ClipModel, images: Tensor) -> Tensor:
    return model.encode_image(images, normalize=True)


def _clip_text(model: ClipModel, input_ids: Tensor) -> Tensor:
    return model.encode_text(input_ids, normalize=True)


def _blip_image(model: BlipModel, images: Tensor) -> Tensor:
    return model.image_features(images)


def _blip_text(model: BlipModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return model.text_features(input_ids, attention_mask)
