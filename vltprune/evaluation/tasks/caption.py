"""Image captioning: COCO, Flickr30k, Flickr8k, and NoCaps in the same form."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ...data import Captioned, captions
from ...data.annotations import parse_captioned
from ...registry import tasks
from .. import caption_metrics
from ..results_log import Row
from .base import DEFAULTS, Images, Options, Tokenizer, dense, number, one_folder, tokenizer_for

_COCO = re.compile(r"COCO_[a-z]+\d+_0*(\d+)\.jpg$")  # the files of COCO carry the ids of its images


class WritesCaptions(Protocol):
    """A model that this task runs."""

    def generate(self, images: Tensor, /) -> Tensor:
        """The input_ids [batch, length] of one caption an image, of images [batch, 3, height, width]."""
        ...


@tasks.register("caption")
@dataclass(frozen=True)
class Caption:
    """BLEU, ROUGE-L, CIDEr and SPICE of one generated caption an image, for models with a `prompt` (`BlipCaption`).

    A metric whose program cannot run is missing, and `unscored` says why. `submission` is COCO's results format.

    Attributes:
        tokenizer: The tokenizer of captions.
        prompt: How many tokens of the prompt begin every caption.
    """

    tokenizer: Tokenizer
    prompt: int  # tokens of the prompt, which begin every caption

    @staticmethod
    def load_records(data: str, images: Images, strict: bool = False) -> Sequence[Captioned]:
        return captions(data, one_folder(images), strict=strict)

    parse_entry = staticmethod(parse_captioned)

    @classmethod
    def from_model(cls, model: nn.Module, options: Options = DEFAULTS) -> Caption:
        """Set the task to a model; warns where its captions cannot be scored on this machine.

        Args:
            model: The model, dense or pruned.
            options: The vocabulary; answers do not concern this task.

        Returns:
            The task.

        Raises:
            ValueError: If the model writes no captions, or if the vocabulary is another model's.
        """
        host = dense(model)
        if not (hasattr(host, "prompt") and hasattr(host, "generate")):
            raise ValueError(f"caption asks for captions, and a {type(host).__name__} writes none: use a blip_caption")
        if missing := caption_metrics.caption_scorer_lacks():
            warnings.warn(f"captions are written, and not scored: {missing}", stacklevel=2)
        return cls(tokenizer_for(host, host.decoder.body, options, str), len(host.prompt))

    def tokenize(self, records: Sequence[Captioned]) -> tuple[tuple[Tensor, ...], list[int]]:
        return (), [1] * len(records)

    def predict(
        self, model: WritesCaptions, records: Sequence[Captioned], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[Row]:
        generated = self.tokenizer.decode(model.generate(images[:, 0])[:, self.prompt :])
        return [
            {"id": record.id, "original_id": record.original_id, "caption": text, "captions": list(record.captions)}
            for text, record in zip(generated, records, strict=True)
        ]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        if caption_metrics.caption_scorer_lacks():
            return {}
        by_index = {str(row["index"]): row for row in rows}  # ids may repeat: training files have an entry a caption
        return caption_metrics.caption_scores(
            {index: row["caption"] for index, row in by_index.items()},
            {index: row["captions"] for index, row in by_index.items()},
        )

    def unscored(self, scores: Mapping[str, float]) -> dict[str, str]:
        if not scores:
            return {"captions": caption_metrics.caption_scorer_lacks() or "there were none"}
        return {} if "SPICE" in scores else {"SPICE": caption_metrics.spice_lacks() or "its program failed"}

    def submission(self, rows: Sequence[Row]) -> list[dict[str, object]]:
        """COCO's results format: `image_id`, as the annotations have it, and `caption`, of each image."""
        return [{"image_id": _image_id(row), "caption": row["caption"]} for row in rows]


def _image_id(row: Row) -> str | int | float:
    """The identifier of the annotations; without one, COCO's number in the image's path, or the path."""
    original_id = row.get("original_id")
    if original_id is not None:
        return original_id
    found = _COCO.search(row["id"])
    return number(found[1] if found else row["id"])
