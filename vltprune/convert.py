"""Foreign checkpoints to our keys. What a file is, is told by its keys; what is left over is listed, never dropped."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_LAYER = r"text_encoder\.encoder\.layer\.(\d+)\."
_RULES: tuple[tuple[str, str], ...] = (
    (r"visual_encoder\.", "visual."),
    (r"text_encoder\.embeddings\.word_embeddings\.", "text.word."),
    (r"text_encoder\.embeddings\.position_embeddings\.", "text.position."),
    (r"text_encoder\.embeddings\.LayerNorm\.", "text.embedding_norm."),
    (_LAYER + r"attention\.self\.(query|key|value)\.", r"text.layers.\1.attention.\2."),
    (_LAYER + r"attention\.output\.dense\.", r"text.layers.\1.attention.output."),
    (_LAYER + r"attention\.output\.LayerNorm\.", r"text.layers.\1.attention_norm."),
    (_LAYER + r"crossattention\.self(\d)\.(query|key|value)\.", r"text.layers.\1.cross.streams.\2.\3."),
    (_LAYER + r"crossattention\.self\.(query|key|value)\.", r"text.layers.\1.cross.streams.0.\2."),
    (_LAYER + r"crossattention\.output\.dense(\d)\.", r"text.layers.\1.cross.streams.\2.output."),
    (_LAYER + r"crossattention\.output\.dense\.", r"text.layers.\1.cross.streams.0.output."),
    (_LAYER + r"crossattention\.output\.merge_layer\.", r"text.layers.\1.cross.merge."),
    (_LAYER + r"crossattention\.output\.LayerNorm\.", r"text.layers.\1.cross.norm."),
    (_LAYER + r"intermediate\.dense\.", r"text.layers.\1.fc1."),
    (_LAYER + r"output\.dense\.", r"text.layers.\1.fc2."),
    (_LAYER + r"output\.LayerNorm\.", r"text.layers.\1.norm."),
    (r"cls_head\.", "head."),
)
_DERIVED = {"text_encoder.embeddings.position_ids"}  # buffers of the reference that carry nothing
_ANCHORS = "space_dict"


def is_blip(keys: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of Salesforce's BLIP, or of the MADTP reference built on it."""
    return any(key.startswith("visual_encoder.") for key in keys)


def from_blip(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """A state dict of Salesforce's BLIP or the MADTP reference, in the keys of our Blip; and the shared anchors, if any.

    Returns the dense model's state and the reference's `space_dict` [anchors, dim], or None. Keys without a rule keep
    their name, so that loading lists them as unexpected.
    """
    dense = {_rename(key): value for key, value in state.items() if key not in _DERIVED and key != _ANCHORS}
    return dense, state.get(_ANCHORS)


def _rename(key: str) -> str:
    for pattern, ours in _RULES:
        match = re.match(pattern, key)
        if match:
            return match.expand(ours) + key[match.end() :]
    return key
