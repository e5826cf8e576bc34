"""An instance of noise that a dense model takes: what commands count, export and describe a model on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.find import find_composite
from ..io.preprocessing import image_size
from . import common

ANSWER = 5  # tokens; BLIP's answers are short


def instance_for(host: nn.Module, tokens: int | None = None) -> tuple[Tensor, ...]:
    """One instance of noise on the device and in the dtype of a dense model.

    Args:
        host: the dense model.
        tokens: the length of the sentence, as in `instance`.

    Returns:
        The model's positional inputs.

    Raises:
        ValueError: as `instance`.
    """
    device, dtype = next(host.parameters()).device, common.dtype_of(host)
    return tuple(one.to(device, dtype if one.is_floating_point() else None) for one in instance(host, tokens))


def instance(host: Any, tokens: int | None = None) -> tuple[Tensor, ...]:
    """One instance of noise that a dense model takes.

    Args:
        host: the dense model.
        tokens: the length of the sentence. None for the model's own: at most 35 of BLIP, the whole context of CLIP.

    Returns:
        The model's positional inputs, on the CPU in single precision: images, and a sentence where it reads one.

    Raises:
        ValueError: for a sentence that the model does not read, or that is too long for it; for a model of transformers
            that takes more than images and a sentence, and is not LLaVA.
    """
    generator = torch.Generator().manual_seed(0)
    if type(host).__module__.startswith("transformers."):
        return _transformers(host, tokens, generator)
    composite = find_composite(host)
    towers = {"image": host} if composite is None else {t: m for t, (m, _) in composite.towers(host).items()}
    images = torch.randn(1, 3, *image_size(towers["image"]), generator=generator)
    if composite is None:
        if tokens is not None:
            raise ValueError(f"--tokens: a {type(host).__name__} reads no sentence: leave the option out")
        return (images,)
    if hasattr(host, "images_per_sentence"):
        images = images if host.images_per_sentence == 1 else images.repeat(2, 1, 1, 1)[None]
        reader = host.text if hasattr(host, "text") else host.decoder.body
        longest, vocabulary = reader.position.num_embeddings, reader.word.num_embeddings
        length = tokens or min(35, max(longest // 2, 1))
        ids = torch.randint(1, vocabulary, (1, length), generator=generator)
        answers = (torch.ones_like(ids), ids[:, :ANSWER]) if hasattr(host, "rank") else ()
        return images, ids, *answers
    return images, _clip_text(towers["text"], tokens, generator)


def _clip_text(tower: Any, tokens: int | None, generator: torch.Generator) -> Tensor:
    """A sentence for open_clip: noise, then its end, which has the highest id, then padding."""
    length: int = getattr(tower, "context_length", None) or 77
    vocabulary: int = getattr(tower, "vocab_size", None) or 49408
    tokens = tokens or length
    if tokens > length:
        raise ValueError(f"--tokens {tokens}: this model reads sentences of at most {length} tokens")
    text = torch.zeros(1, length, dtype=torch.long)
    text[0, :tokens] = torch.randint(1, vocabulary - 1, (tokens,), generator=generator)
    text[0, tokens - 1] = vocabulary - 1
    return text


def _transformers(host: Any, tokens: int | None, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Images and a sentence, those of them that a model of transformers takes, in its order."""
    takes = list(inspect.signature(host.forward).parameters)
    named = {}
    if "pixel_values" in takes:
        vision = getattr(host.config, "vision_config", host.config)
        sides = _pair(getattr(vision, "image_size", None))
        named["pixel_values"] = torch.randn(1, getattr(vision, "num_channels", 3), *sides, generator=generator)
    if "input_ids" in takes:
        text = host.config.get_text_config()
        most = getattr(text, "max_position_embeddings", None) or 512
        length = tokens or min(35, most // 2)
        if length > most:
            raise ValueError(f"--tokens {length}: this model reads sentences of at most {most} tokens")
        named["input_ids"] = torch.randint(1, text.vocab_size, (1, length), generator=generator)
    elif tokens is not None:
        raise ValueError(f"--tokens: a {type(host).__name__} reads no sentence: leave the option out")
    if type(host).__name__ == "LlavaForConditionalGeneration":
        named["input_ids"] = _with_image(host, named["input_ids"], named["pixel_values"])
    elif set(takes[: len(named)]) != set(named) or hasattr(host.config, "image_token_id"):
        raise ValueError(
            f"a {type(host).__name__} takes more than an image and a sentence, and no example of it is known: give one in "
            "Python, as vltprune.count_macs(model, **inputs)"
        )
    return tuple(named[name] for name in takes[: len(named)])


def _with_image(host: Any, words: Tensor, images: Tensor) -> Tensor:
    """A prompt of LLaVA [1, length]: the placeholders of an image, and words behind them, [1, words]."""
    like = next(host.parameters())
    with torch.no_grad():
        rows = len(host.get_image_features(images.to(like)).pooler_output[0])
    image = host.config.image_token_id
    # no word is one of them
    return torch.cat([torch.full((1, rows), image), words.masked_fill(words == image, image - 1)], 1)


def _pair(size: Any) -> tuple[int, int]:
    """A side or two, in pixels; 224 for a model that takes any."""
    if size is None:
        size = 224
    return (size, size) if isinstance(size, int) else tuple(size)
