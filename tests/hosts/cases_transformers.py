"""Small towers and models of transformers, one for each option that a host has to honour."""

from __future__ import annotations

from dataclasses import replace

import torch
import transformers as hf
from checks import Case, randomize
from transformers_pairs import blip_case, blip_text_case, clip_image_case, clip_text_case, two_towers_case
from transformers_parts import ENDS, IDLE, IMAGE, LENGTH, MASK, SPECIAL, STILL, TEXT, WIDTHS, hiding, images, words
from transformers_vilt import VILT, two_images_case, vilt_case

BERT = {
    "plain": {},
    "no pooler": {"add_pooling_layer": False},
    "relu, eps": {"hidden_act": "relu", "layer_norm_eps": 0.1},
    "types and positions": {},
    "chunked": {"chunk_size_feed_forward": 4},
    "eager": {"attn_implementation": "eager"},
}
MODERN = {  # a window of two words to either side, unless said otherwise
    "plain": {},
    "positions": {},
    "eager": {"attn_implementation": "eager"},
    "biases": {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "hidden_activation": "relu"},
    "local first": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "wide": {"local_attention": 2 * LENGTH - 2, "hidden_activation": "silu", "mlp_bias": True},
}
VIT = {
    "plain": {},
    "no pooler": {"add_pooling_layer": False},
    "no qkv bias": {"qkv_bias": False},
    "relu, eps, pooler": {"hidden_act": "relu", "layer_norm_eps": 0.1, "pooler_act": "gelu", "pooler_output_size": 20},
    "mask token": {"use_mask_token": True},
    "wide": {"image_size": (32, 48)},
    "interpolated": {},
}
DINO = {
    "plain": {},
    "swiglu": {"use_swiglu_ffn": True},
    "layer_scale": {"layerscale_value": 0.3},
    "no qkv bias": {"qkv_bias": False},
    "another size": {},
}
DINO3 = {
    "plain": {},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu"},
    "biases": {"key_bias": True, "mlp_bias": False, "query_bias": False, "proj_bias": False},
    "no registers": {"num_register_tokens": 0},
    "another size": {},
}
NAMES = [f"bert: {n}" for n in BERT] + [f"roberta: {n}" for n in ("plain", "types and positions")]
NAMES += ["xlm roberta: plain"]
NAMES += ["distilbert: plain", "distilbert: positions", "distilbert: relu"]
NAMES += ["mpnet: plain", "mpnet: positions", "mpnet: no pooler"] + [f"modernbert: {n}" for n in MODERN]
NAMES += [f"vit: {n}" for n in VIT] + ["deit: plain", "deit: no pooler"]
NAMES += [f"dinov2: {n}" for n in DINO] + ["registers: plain", "registers: swiglu"] + [f"dinov3: {n}" for n in DINO3]
NAMES += [f"clip text: {n}" for n in ("masked", "eos 2", "unmasked", "no end")]
NAMES += ["clip image: plain", "clip image: interpolated", "siglip text: plain", "blip2 image: plain"]
NAMES += ["siglip image: plain", "siglip image: no head", "siglip2 image: plain", "siglip2 text: plain"]
NAMES += ["clip", "clip, masked", "siglip", "siglip2"]
NAMES += [
    "blip image: plain",
    "blip image: interpolated",
    "blip text: plain",
    "blip text: memory",
    "blip text: one image",
]
NAMES += ["blip retrieval", "blip answers", "blip captions"]
NAMES += [f"vilt: {name}" for name in VILT] + ["vilt two images"]
HEADED = {  # a model with a head, and the case whose tower it has
    "BertForSequenceClassification": "bert: plain",
    "RobertaForSequenceClassification": "roberta: plain",
    "DistilBertForSequenceClassification": "distilbert: plain",
    "XLMRobertaForSequenceClassification": "xlm roberta: plain",
    "MPNetForSequenceClassification": "mpnet: no pooler",
    "ModernBertForSequenceClassification": "modernbert: local first",
    "ViTForImageClassification": "vit: no pooler",
    "DeiTForImageClassification": "deit: no pooler",
    "DeiTForImageClassificationWithTeacher": "deit: no pooler",
    "CLIPTextModelWithProjection": "clip text: masked",
    "CLIPVisionModelWithProjection": "clip image: plain",
    "ViltForQuestionAnswering": "vilt: plain",
    "ViltForImageAndTextRetrieval": "vilt: plain",
}
NAMES += [f"headed: {name}" for name in HEADED]
# one of each family
WORDS = [
    "bert: plain",
    "roberta: plain",
    "xlm roberta: plain",
    "distilbert: plain",
    "mpnet: plain",
    "modernbert: plain",
    "clip text: masked",
]
TEXTS = [*WORDS, "siglip text: plain", "blip text: plain", "blip text: memory"]
IMAGES = ["vit: plain", "deit: plain", "dinov2: swiglu", "registers: plain", "dinov3: plain"]
IMAGES += [
    "clip image: plain",
    "siglip image: plain",
    "siglip2 image: plain",
    "blip image: plain",
    "blip2 image: plain",
]


def config(kind, **options):
    """A configuration, and the model's arguments besides it."""
    beside = {name: options.pop(name) for name in ("add_pooling_layer", "use_mask_token") if name in options}
    return kind(**options), beside


def text_options(family: str, option: str) -> dict:
    if family == "distilbert":
        sizes = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        still = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
        return {**sizes, **still, "activation": "relu" if option == "relu" else "gelu", "max_position_embeddings": 20}
    if family == "modernbert":
        layers = {"num_hidden_layers": 3}  # one sees all words, the others their neighbors
        return {**TEXT, **SPECIAL, **layers, "local_attention": 4, **MODERN[option]}
    types = {} if family == "mpnet" else {"type_vocab_size": 2}
    return {**TEXT, **STILL, **types, "max_position_embeddings": 20, **BERT.get(option, {})}


def text_case(family: str, option: str, **more) -> Case:
    kinds = {
        "bert": (hf.BertModel, hf.BertConfig),
        "roberta": (hf.RobertaModel, hf.RobertaConfig),
        "xlm roberta": (hf.XLMRobertaModel, hf.XLMRobertaConfig),
        "distilbert": (hf.DistilBertModel, hf.DistilBertConfig),
        "mpnet": (hf.MPNetModel, hf.MPNetConfig),
        "modernbert": (hf.ModernBertModel, hf.ModernBertConfig),
    }
    kind, kind_of_config = kinds[family]
    own, beside = config(kind_of_config, **text_options(family, option), **more)
    model = randomize(kind(own, **beside))

    inputs = (words(), MASK)
    places = torch.stack([torch.randperm(18)[:LENGTH] + 2 for _ in range(3)])
    if option == "types and positions":
        inputs = (*inputs, torch.randint(0, 2, (3, LENGTH)), places)
    elif option == "positions":
        inputs = (*inputs, None, places) if family == "distilbert" else (*inputs, places)
    return Case(
        model,
        inputs,
        {"text": [[0]] * 3},
        dense=hiding(model, MASK),
        alone=lambda i: tuple(None if x is None else x[i : i + 1, : ENDS[i]] for x in inputs),
        idle=IDLE,
    )


def image_case(family: str, option: str, **more) -> Case:
    kinds = {
        "vit": (hf.ViTModel, hf.ViTConfig, {**WIDTHS, **STILL}, VIT),
        "deit": (hf.DeiTModel, hf.DeiTConfig, {**WIDTHS, **STILL}, VIT),
        "dinov2": (hf.Dinov2Model, hf.Dinov2Config, {"hidden_size": 48, "mlp_ratio": 2}, DINO),
        "registers": (
            hf.Dinov2WithRegistersModel,
            hf.Dinov2WithRegistersConfig,
            {"hidden_size": 48, "mlp_ratio": 2, "num_register_tokens": 4},
            DINO,
        ),
        "dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig, {**WIDTHS, "num_register_tokens": 4}, DINO3),
    }
    kind, kind_of_config, sizes, table = kinds[family]
    own, beside = config(kind_of_config, **{**IMAGE, **sizes, **table[option], **more})
    model = randomize(kind(own, **beside))
    prefix = {"deit": 2, "registers": 5, "dinov3": 1 + getattr(own, "num_register_tokens", 0)}.get(family, 1)

    inputs = (images(32, 48) if option in ("wide", "another size") else images(),)
    if option == "interpolated":
        inputs = (images(40, 48), None, True)  # the second says which patches are masked
    idle = (*IDLE, "register_tokens") if option == "no registers" else IDLE
    return Case(model, inputs, {"image": [range(prefix)] * 3}, idle=idle)


def headed_case(name: str) -> Case:
    bare = make(HEADED[name])
    # two would not do: the head reads the summary alone, which sees nothing that the last one merges
    bare.model.config.num_hidden_layers = 3
    model = randomize(getattr(hf, name)(bare.model.config))
    dense = hiding(model, MASK) if name == "CLIPTextModelWithProjection" else None  # the others return no tokens
    return replace(bare, model=model, dense=dense)


def make(name: str) -> Case:
    family, _, option = name.partition(": ")
    if family.startswith("vilt"):
        return vilt_case(option) if option else two_images_case()
    if not option:
        return blip_case(name) if family.startswith("blip") else two_towers_case(name)
    if family == "headed":
        return headed_case(option)
    if family == "blip text":
        return blip_text_case(family, option)
    if family.endswith((" text", " image")):
        return (clip_text_case if family.endswith(" text") else clip_image_case)(family, option)
    return (text_case if f"{family}: plain" in WORDS else image_case)(family, option)
