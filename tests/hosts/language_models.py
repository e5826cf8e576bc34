"""Tiny language models of each type with a host, prompts with visual rows, and the dense computation with tokens masked."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Config,
    Qwen2Model,
    Qwen2VLTextConfig,
    Qwen2VLTextModel,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)

import vltprune as vp

LAYERS = 4
DIM = 32
SIZES = {
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7}
MODELS = {
    "llama": (LlamaModel, LlamaConfig, {}),
    "mistral": (MistralModel, MistralConfig, {"sliding_window": None}),
    "mistral_window": (MistralModel, MistralConfig, {"sliding_window": 7}),
    "qwen2": (Qwen2Model, Qwen2Config, {}),
    "qwen2_window": (
        Qwen2Model,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen2_vl": (Qwen2VLTextModel, Qwen2VLTextConfig, MROPE),
    "qwen2_5_vl": (Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig, MROPE),
    "qwen3": (Qwen3Model, Qwen3Config, {"head_dim": 8}),
    "qwen3_vl": (Qwen3VLTextModel, Qwen3VLTextConfig, {"head_dim": 8, **MROPE}),
    "gemma": (GemmaModel, GemmaConfig, {"head_dim": 8}),
    "gemma2": (Gemma2Model, Gemma2Config, {"attn_logit_softcapping": 2.0, **GEMMA}),
    "gemma3": (
        Gemma3TextModel,
        Gemma3TextConfig,
        {"layer_types": ["sliding_attention", "full_attention"] * 2, **GEMMA},
    ),
}
WITH_MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@functools.cache
def language_model(name):
    """Always the same random model. Attention is eager, whose masks are written out, so that the dense one can be masked."""
    cls, config, options = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = cls(config(**{**SIZES, **options}, attn_implementation="eager")).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def prompt(name, sizes=((3, 12, 4),), left=True, seed=0):
    """A padded batch of prompts of `sizes` (text before, visual, text behind), as a composite calls its language model."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(sum, sizes))
    x = torch.randn(len(sizes), longest, DIM, generator=generator)
    mask, visual = (
        torch.zeros(len(sizes), longest, dtype=torch.long),
        torch.zeros(len(sizes), longest, dtype=torch.bool),
    )
    for row, (before, image, behind) in enumerate(sizes):
        start = longest - before - image - behind if left else 0
        mask[row, start : start + before + image + behind] = 1
        visual[row, start + before : start + before + image] = True
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if name in WITH_MROPE:
        # rows and columns of a grid of four patches a row; a text goes on behind the largest
        column = (visual.cumsum(1) - 1).clamp(min=0)
        grid = torch.stack([torch.zeros_like(column), column // 4, column % 4])
        start = (mask.bool() & ~visual & (visual.cumsum(1) == 0)).sum(1, keepdim=True)
        positions = torch.where(visual, grid + start, positions)
    return {"inputs_embeds": x, "attention_mask": mask, "position_ids": positions, "visual_pos_masks": visual}


def both_ways(model, call):
    """Masks of a Gemma, by kind of layer where it has kinds: the tokens of an image see each other, all others see backward."""
    valid, visual = call["attention_mask"].bool(), call["visual_pos_masks"]
    place = torch.arange(valid.shape[1])
    back = place[:, None] - place
    windows = {"full_attention": back >= 0, "sliding_attention": (back >= 0) & (back < GEMMA["sliding_window"])}
    masks = {}
    for kind, causal in windows.items():
        seen = (causal | visual[:, :, None] & visual[:, None]) & valid[:, None] & valid[:, :, None]
        masks[kind] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    return masks if type(model) is not GemmaModel else masks["full_attention"]


def continued(call, x):
    """The call on a prompt with the embeddings of further tokens [batch, new, dim] behind it."""
    new = x.shape[1]
    positions = call["position_ids"]
    more = positions[..., -1:] + 1 + torch.arange(new)
    out = dict(call)
    out["inputs_embeds"] = torch.cat([call["inputs_embeds"], x], 1)
    out["attention_mask"] = torch.cat([call["attention_mask"], torch.ones(len(x), new, dtype=torch.long)], 1)
    out["position_ids"] = torch.cat([positions, more], -1)
    out["visual_pos_masks"] = torch.cat([call["visual_pos_masks"], torch.zeros(len(x), new, dtype=torch.bool)], 1)
    return out


def only_new(call, new):
    """The same call where all but the last `new` tokens are in the cache."""
    out = {name: value[..., -new:] for name, value in call.items() if name in ("position_ids", "visual_pos_masks")}
    return {**out, "inputs_embeds": call["inputs_embeds"][:, -new:], "attention_mask": call["attention_mask"]}


@contextlib.contextmanager
def masked(model, gone):
    """Hides keys in each layer of a dense model: gone[depth], [batch, at most length] bool."""

    def hide(depth, layer, args, named):
        lost, mask = gone[depth], named["attention_mask"].clone()
        lost = torch.nn.functional.pad(lost, (0, mask.shape[-1] - lost.shape[1]))
        named["attention_mask"] = mask.masked_fill(lost[:, None, None], torch.finfo(mask.dtype).min)
        return args, named

    hooks = [
        layer.register_forward_pre_hook(functools.partial(hide, depth), with_kwargs=True)
        for depth, layer in enumerate(model.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gone(trace, valid):
    """Which tokens of a prompt each layer does not read, from what a pruned model collected: [batch, length] bool each."""
    layers, instance, position = [], trace.input_tokens.layout.instance, trace.input_tokens.position
    for layer in trace.layers:
        for step in layer.steps:
            if step.place == "before" and step.reduction is not None:
                instance, position = step.layout.instance, position[step.reduction.index]
        stays = torch.zeros_like(valid)
        stays[instance, position] = True
        layers.append(valid & ~stays)
        instance, position = layer.layout.instance, layer.position
    return layers


def dense(model, call):
    """The dense model's output for a call, [batch, length, dim]."""
    deep = {} if "Qwen3VL" in type(model).__name__ else {"visual_pos_masks": None, "deepstack_visual_embeds": None}
    named = {name: value for name, value in call.items() if name not in deep}
    return model(**named, use_cache=False).last_hidden_state


def dense_logits(case, inputs, sequences, gone):
    """A vision-language model's logits of each new token, all at once, with the keys hidden that a pruned one dropped."""
    ids, new = sequences[:, :-1], sequences.shape[1] - 1 - inputs["input_ids"].shape[1]
    more = torch.ones(len(ids), new, dtype=torch.int64)
    positions = case.positions(inputs)
    last = positions[..., -1:] + 1 + torch.arange(new)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], more], 1)}
    whole["position_ids"] = torch.cat([positions, last], -1)
    if case.types is not None:
        # PaliGemma's tokens of type 0 see each other, and what it writes sees backward
        written = more * ("PaliGemma" in type(case.model).__name__)
        whole[case.types] = torch.cat([inputs[case.types], written], 1)
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    language = model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
    with masked(language, gone):
        return model(**whole, use_cache=False).logits[:, -new - 1 :]


def pruned_twice(case: Any, keep: str) -> Any:
    """The case's model, pruned between its image tower and its language model, and in the first layer of that."""
    parts = {"scorer": "key_norm", "reducer": "drop", "keep": keep}
    config = vp.PruneConfig(**parts | {"scorer": "equal"}, place="output", then=[vp.Stage(**parts, at={"language": 0})])
    return vp.prune(case.model, config)
