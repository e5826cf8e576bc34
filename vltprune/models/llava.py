"""LLaVA of transformers in sizes of one's own: the model of `llava_tiny`. Needs transformers (extra `hf`).

Liu et al., Visual Instruction Tuning, arXiv 2304.08485: the last but one layer of a CLIP image tower, a projector of two linear
layers, and a Llama.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

_INSTALL = "LLaVA is a model of transformers, which is not installed: pip install 'vltprune[hf]'"


def build_llava(
    image_size: int,
    patch_size: int,
    vision_width: int,
    vision_depth: int,
    vision_heads: int,
    text_width: int,
    text_depth: int,
    text_heads: int,
    text_hidden: int,
    vocab_size: int,
    max_positions: int,
    image_id: int,
    eos_id: int,
    pad_id: int = 0,
) -> nn.Module:
    """Build transformers' LlavaForConditionalGeneration with random weights.

    Args:
        image_size: Side of the images, in pixels.
        patch_size: Side of a patch, in pixels.
        vision_width: Width of the image tower; its MLPs are four times as wide.
        vision_depth: Layers of the image tower. The language model sees the patches behind the last but one.
        vision_heads: Attention heads of the image tower.
        text_width: Width of the language model.
        text_depth: Layers of the language model.
        text_heads: Attention heads of the language model, for queries as for keys.
        text_hidden: Hidden width of the language model's MLPs.
        vocab_size: Number of token ids.
        max_positions: Longest prompt and answer, in tokens, visual ones included.
        image_id: Token that stands for each patch in a prompt.
        eos_id: Token that ends an answer.
        pad_id: Token that fills a row.

    Returns:
        The model, of transformers' own class.

    Raises:
        ImportError: Without transformers.
    """
    transformers = _transformers()
    vision = transformers.CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_depth,
        num_attention_heads=vision_heads,
        projection_dim=vision_width,
        hidden_act="gelu",
    )
    text = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=text_width,
        intermediate_size=text_hidden,
        num_hidden_layers=text_depth,
        num_attention_heads=text_heads,
        max_position_embeddings=max_positions,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=eos_id,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=(image_size // patch_size) ** 2,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(_INSTALL) from error
