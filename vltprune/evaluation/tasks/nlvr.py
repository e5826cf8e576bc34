"""NLVR2 and synthetic NLVR: is a sentence true of two images?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...data import Statement, SyntheticNLVR, nlvr2
from ...data.annotations import parse_statement
from ...data.llava import FALSE, IMAGE, TRUE, VOCABULARY, prompt_ids
from ...data.word_tokenizer import WordTokenizer
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
        if hasattr(getattr(host, "config", None), "image_token_id"):
            return PromptedNlvr.from_words(host)
        if getattr(host, "images_per_sentence", 1) != 2:
            raise ValueError(f"nlvr asks about two images, and a {type(host).__name__} reads one: use a blip_nlvr")
        return cls(tokenizer_for(host, host.text, options, lambda text: clean_caption(text, _WORDS), ENC))

    def tokenize(self, records: Sequence[Statement]) -> tuple[tuple[Tensor, ...], list[int]]:
        return self.tokenizer.encode([record.sentence for record in records]), [1] * len(records)

    def predict(
        self, model: Callable[..., Tensor], records: Sequence[Statement], images: Tensor, texts: tuple[Tensor, ...]
    ) -> list[Row]:
        probabilities = finite(self.logits(model, images, texts), records, "logits").softmax(-1)[:, 1].tolist()
        return [
            {"probability": probability, "label": record.label}
            for probability, record in zip(probabilities, records, strict=True)
        ]

    def logits(self, model: Callable[..., Tensor], images: Tensor, texts: tuple[Tensor, ...]) -> Tensor:
        """Run a model on a batch.

        Args:
            model: As in `predict`.
            images: [batch, 2, 3, height, width].
            texts: What `tokenize` returned.

        Returns:
            The logits of false and true, [batch, 2].
        """
        return model(images, *texts)

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        return {"accuracy": metrics.accuracy([row["probability"] for row in rows], [row["label"] for row in rows])}


@dataclass(frozen=True)
class PromptedNlvr(Nlvr):
    """Accuracy of true and false, for a vision-language model that answers with a word: `llava_tiny`, and others of its words.

    Attributes:
        tokenizer: The tokenizer of sentences.
        rows: How many tokens stand for an image in a prompt.
    """

    rows: int = 0

    @classmethod
    def from_words(cls, host: Any) -> PromptedNlvr:
        """Set the task to a dense vision-language model.

        Raises:
            ValueError: If its vocabulary is not that of `llava_tiny`.
        """
        config, words = host.config, WordTokenizer()
        known = config.get_text_config().vocab_size, config.image_token_id
        if known != (len(VOCABULARY), IMAGE):
            raise ValueError(
                f"nlvr asks a vision-language model in the {len(VOCABULARY)} words of llava_tiny, and this "
                f"{type(host).__name__} has {known[0]}: use llava_tiny, or a blip_nlvr"
            )
        rows = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return cls(Tokenizer(words.encode, words.decode), rows)

    def tokenize(self, records: Sequence[Statement]) -> tuple[tuple[Tensor, ...], list[int]]:
        return prompt_ids([record.sentence for record in records], self.rows), [1] * len(records)

    def logits(self, model: Callable[..., Any], images: Tensor, texts: tuple[Tensor, ...]) -> Tensor:
        ids, mask = texts
        out = model(input_ids=ids, attention_mask=mask, pixel_values=images.flatten(0, 1), logits_to_keep=1)
        return out.logits[:, -1, [FALSE, TRUE]]


def _synthetic(data: str) -> SyntheticNLVR:
    match = re.fullmatch(rf"{SYNTHETIC}(\w+)(?::(\d+)(?:x(\d+))?)?", data)
    if match is None:
        raise ValueError(f"{data!r}: write synthetic:SPLIT, such as synthetic:test, or synthetic:train:16000x8")
    split, pairs, sentences = match.groups()
    return SyntheticNLVR(split, int(pairs or _PAIRS), sentences=int(sentences or 1))
