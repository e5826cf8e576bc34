"""Conversion of BLIP checkpoints of Salesforce, the MADTP reference and transformers to this library's keys."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_Rules = tuple[tuple[str, str], ...]

_LAYER = r"encoder\.layer\.(\d+)\."
_BERT: _Rules = (
    (r"embeddings\.word_embeddings\.", "word."),
    (r"embeddings\.position_embeddings\.", "position."),
    (r"embeddings\.LayerNorm\.", "embedding_norm."),
    (_LAYER + r"attention\.self\.(query|key|value)\.", r"layers.\1.attention.\2."),
    (_LAYER + r"attention\.output\.dense\.", r"layers.\1.attention.output."),
    (_LAYER + r"attention\.output\.LayerNorm\.", r"layers.\1.attention_norm."),
    (_LAYER + r"crossattention\.self(\d)\.(query|key|value)\.", r"layers.\1.cross.streams.\2.\3."),
    (_LAYER + r"crossattention\.self\.(query|key|value)\.", r"layers.\1.cross.streams.0.\2."),
    (_LAYER + r"crossattention\.output\.dense(\d)\.", r"layers.\1.cross.streams.\2.output."),
    (_LAYER + r"crossattention\.output\.dense\.", r"layers.\1.cross.streams.0.output."),
    (_LAYER + r"crossattention\.output\.merge_layer\.", r"layers.\1.cross.merge."),
    (_LAYER + r"crossattention\.output\.LayerNorm\.", r"layers.\1.cross.norm."),
    (_LAYER + r"intermediate\.dense\.", r"layers.\1.fc1."),
    (_LAYER + r"output\.dense\.", r"layers.\1.fc2."),
    (_LAYER + r"output\.LayerNorm\.", r"layers.\1.norm."),
)
_VIT: _Rules = (
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.position_embedding", "pos_embed"),
    (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"post_layernorm\.", "norm."),
)
_HEAD: _Rules = ((r"transform\.dense\.", "transform."), (r"transform\.LayerNorm\.", "norm."), (r"bias$", "bias"))
_SAME: _Rules = (("", ""),)

# the prefix of their keys, the prefix of ours, rules for what follows it
_PARTS: tuple[tuple[str, str, _Rules], ...] = (
    ("visual_encoder.", "visual.", _SAME),  # Salesforce, MADTP
    ("vision_model.", "visual.", _VIT),  # transformers
    ("text_encoder.", "text.", _BERT),
    ("text_decoder.bert.", "decoder.body.", _BERT),
    ("text_decoder.cls.predictions.", "decoder.", _HEAD),
    ("cls_head.", "head.", _SAME),
    ("itm_head.", "head.", _SAME),
    ("vision_proj.", "image_projection.", _SAME),
    ("text_proj.", "text_projection.", _SAME),
    ("temp", "temperature", ((r"$", ""),)),
)
# buffers, and what only training needed: EMA models, queues of features
_NOT_LOADED = re.compile(
    r".*\.position_ids|(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*|(image|text|idx)_queue|queue_ptr|ptr_queue"
)
_PREDICTIONS = "text_decoder.cls.predictions."
# the second name of a tied weight -> the first
_TIED = {
    _PREDICTIONS + "decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    _PREDICTIONS + "decoder.bias": _PREDICTIONS + "bias",
}
_ANCHORS = "space_dict"
# only a checkpoint of BLIP's pretraining has both
_PRETRAINING_PARTS = ("text_decoder.", "itm_head.")


def is_blip(keys: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has BLIP's keys as Salesforce, the MADTP reference or transformers name them."""
    return any(key.startswith(("visual_encoder.", "vision_model.")) for key in keys)


def from_blip(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Convert BLIP's state dict, of Salesforce, the MADTP reference or transformers, to this library's keys.

    Position embeddings for images of another size are interpolated to the model's grid, bicubically, as BLIP does. EMA models,
    feature queues and second names of tied weights are left out; of a pretraining checkpoint, which serves every task, also the
    parts that the model lacks. transformers has no temperature for the retrieval models, and then the model's stays.

    Args:
        state: The checkpoint's state dict.
        like: The state dict of the dense model that it is for.

    Returns:
        The dense model's state dict, and the reference's anchors (`space_dict`, [anchors, dim]) or None. Keys without a rule
        keep their names, so that loading lists them as unexpected.
    """
    kept = {key: value for key, value in state.items() if not _NOT_LOADED.fullmatch(key) and key != _ANCHORS}
    dense = {_rename(key): value for key, value in _untied(kept).items()}

    if all(any(key.startswith(part) for key in state) for part in _PRETRAINING_PARTS):
        parts = {key.partition(".")[0] for key in like}
        dense = {key: value for key, value in dense.items() if key.partition(".")[0] in parts or key in state}
    if "visual.pos_embed" in dense and "visual.pos_embed" in like:
        dense["visual.pos_embed"] = _resized(dense["visual.pos_embed"], like["visual.pos_embed"].shape[1])
    if "temperature" in like and any(key.startswith("vision_model.") for key in state):
        dense.setdefault("temperature", like["temperature"])
    return dense, state.get(_ANCHORS)


def _rename(key: str) -> str:
    for theirs, ours, rules in _PARTS:
        if key.startswith(theirs):
            rest = key.removeprefix(theirs)
            for pattern, replacement in rules:
                match = re.match(pattern, rest)
                if match:
                    return ours + match.expand(replacement) + rest[match.end() :]
    return key


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tied weight under its first name only. A second name with other values stays, to be listed as unexpected."""
    for second, first in _TIED.items():
        if second in state and torch.equal(state.setdefault(first, state[second]), state[second]):
            del state[second]
    return state


def _resized(position: Tensor, tokens: int) -> Tensor:
    """Position embeddings [1, 1 + patches, width] of a square grid, class token first, for another number of tokens."""
    old, new = math.isqrt(position.shape[1] - 1), math.isqrt(tokens - 1)
    if old == new or old**2 != position.shape[1] - 1 or new**2 != tokens - 1:
        return position
    grid = rearrange(position[:, 1:], "1 (h w) d -> 1 d h w", h=old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([position[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")], 1)
