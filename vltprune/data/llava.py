"""Processor of `llava_tiny`, and its inputs from two images and a statement. Needs transformers (extra `hf`).

A prompt reads "left <image> right <image> : both images contain a circle ?". The model answers "true" or "false".
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .drawing import SIDE
from .images import ImageSource, load_image
from .word_tokenizer import NLVR_WORDS, PAD, UNK, WordTokenizer

# Ids are positions in this line. A statement keeps the ids of WordTokenizer, [CLS] being ":" here and [SEP] "?".
VOCABULARY = ("[PAD]", ":", "?", "[UNK]", *NLVR_WORDS, "<image>", "true", "false", "</s>")
IMAGE, TRUE, FALSE, END = (VOCABULARY.index(word) for word in ("<image>", "true", "false", "</s>"))
PROMPT = "left <image> right <image> : {} ?"
_SIDES = (VOCABULARY.index("left"), VOCABULARY.index("right"))
_LONGEST = 32


def llava_processor(patch_size: int = 12) -> Any:
    """Build the processor of `llava_tiny`: transformers' LlavaProcessor over a tokenizer of a closed vocabulary.

    Its tokenizer takes words without regard to case, and an unknown word as [UNK]; it pads on the left, as `generate` needs.
    Images are squeezed to 96 px.

    Args:
        patch_size: Side of the model's patches, in pixels: how many tokens stand for an image.

    Returns:
        A LlavaProcessor, to be called with `images=` and `text=`.

    Raises:
        ImportError: Without transformers.
    """
    transformers = _transformers()
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"height": SIDE, "width": SIDE},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=_word_level(),
            pad_token=VOCABULARY[PAD],
            unk_token=VOCABULARY[UNK],
            eos_token=VOCABULARY[END],
            extra_special_tokens={"image_token": VOCABULARY[IMAGE]},
            padding_side="left",
        ),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy leaves out
    )


def statement_inputs(
    pairs: Sequence[Sequence[ImageSource] | np.ndarray], statements: str | Sequence[str], processor: Any = None
) -> Mapping[str, Tensor]:
    """Inputs of `llava_tiny` from pairs of images and a statement about each.

    Args:
        pairs: The left and the right image of each statement, by path or as pixels uint8 [height, width, 3].
        statements: As many statements as there are pairs; one alone may be given as text.
        processor: Of `llava_processor`; None builds one.

    Returns:
        input_ids and attention_mask, int64 [statements, length], padded on the left, and pixel_values, float32
        [2 statements, 3, 96, 96]: what `model(**inputs)` and `model.generate(**inputs)` take.

    Raises:
        ValueError: If there are no statements, if there are as many pairs no more, for a pair of other than two images, and
            for a word outside the vocabulary; with the nearest words.
        ImageError: For an image that cannot be decoded.
        ImportError: Without transformers.

    Example:
        >>> from vltprune.data import SyntheticPairs
        >>> from vltprune.data.llava import statement_inputs
        >>> left, right = SyntheticPairs("test", 1)[0].images
        >>> inputs = statement_inputs([(left, right)], "both images contain a circle")
        >>> inputs["input_ids"].shape, inputs["pixel_values"].shape
        (torch.Size([1, 137]), torch.Size([2, 3, 96, 96]))
    """
    texts = [statements] if isinstance(statements, str) else list(statements)
    if len(texts) != len(pairs):
        raise ValueError(f"statement_inputs needs a pair of images a statement: got {len(pairs)} and {len(texts)}")
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"a statement is about two images, got pairs of {sorted({len(pair) for pair in pairs})}")
    # refuses what it does not know, where the processor would write [UNK]
    words = WordTokenizer(max_positions=_LONGEST)
    texts = [PROMPT.format(text) for text in words.decode(words.encode(texts)[0])]
    images = [[load_image(image) for image in pair] for pair in pairs]
    processor = llava_processor() if processor is None else processor
    return processor(images=images, text=texts, padding=True, return_tensors="pt")


def prompt_ids(statements: Sequence[str], rows: int, answers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Token ids of the prompts of `llava_tiny`, as its processor makes them; it needs no transformers.

    Args:
        statements: At least one.
        rows: How many tokens stand for an image.
        answers: Whether each statement is true: the answers' tokens, "true" or "false" and the end, stand behind the prompts.
            None for prompts alone.

    Returns:
        input_ids and attention_mask, int64 [statements, length], padded on the left.

    Raises:
        ValueError: If there are no statements, and for a word outside the vocabulary; with the nearest words.
    """
    images = [token for side in _SIDES for token in (side, *[IMAGE] * rows)]
    words, mask = WordTokenizer(max_positions=_LONGEST).encode(statements)
    prompts = [[*images, *ids[there].tolist()] for ids, there in zip(words, mask.bool(), strict=True)]
    if answers is not None:
        prompts = [[*ids, TRUE if answer else FALSE, END] for ids, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[PAD] * (longest - len(ids)) + ids for ids in prompts])
    return input_ids, (input_ids != PAD).long()


def is_true(logits: Tensor) -> Tensor:
    """Whether the model says that a statement is true.

    Args:
        logits: [statements, length, vocabulary], of inputs padded on the left.

    Returns:
        Bool [statements].
    """
    return logits[:, -1, TRUE] > logits[:, -1, FALSE]


def _word_level() -> Any:
    tokenizers: Any = importlib.import_module("tokenizers")
    models, normalizers, splits = (
        importlib.import_module(f"tokenizers.{name}") for name in ("models", "normalizers", "pre_tokenizers")
    )
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=VOCABULARY[UNK]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splits.WhitespaceSplit()
    return tokenizer


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            "LLaVA's processor is one of transformers, which is not installed: pip install 'vltprune[hf]'"
        ) from error
