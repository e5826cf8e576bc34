"""Small towers and models of transformers, one for each option that a host has to honour."""

from __future__ import annotations

from dataclasses import replace

import torch
import transformers as hf
from checks import Case, randomise

LENGTH = 12
ENDS = (5, 12, 8)  # tokens of each sentence; one fills all places
MASK = (torch.arange(LENGTH) < torch.tensor(ENDS)[:, None]).long()
EOT, PAD = 59, 1
TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {
    "plain": {},
    "no pooler": {"add_pooling_layer": False},
    "relu, eps": {"hidden_act": "relu", "layer_norm_eps": 0.1},
    "types and positions": {},
    "chunked": {"chunk_size_feed_forward": 4},
    "eager": {"attn_implementation": "eager"},
}
IMAGE = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDTHS = {"hidden_size": 48, "intermediate_size": 64}
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
NAMES += ["distilbert: plain", "distilbert: types and positions", "distilbert: relu"]
NAMES += [f"vit: {n}" for n in VIT] + ["deit: plain", "deit: no pooler"]
NAMES += [f"dinov2: {n}" for n in DINO] + ["registers: plain", "registers: swiglu"] + [f"dinov3: {n}" for n in DINO3]
NAMES += [f"clip text: {n}" for n in ("masked", "eos 2", "unmasked", "no end")]
NAMES += ["clip image: plain", "clip image: interpolated", "siglip text: plain"]
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
HEADED = {  # a model with a head, and the case whose tower it has
    "BertForSequenceClassification": "bert: plain",
    "RobertaForSequenceClassification": "roberta: plain",
    "DistilBertForSequenceClassification": "distilbert: plain",
    "ViTForImageClassification": "vit: no pooler",
    "DeiTForImageClassification": "deit: no pooler",
    "DeiTForImageClassificationWithTeacher": "deit: no pooler",
    "CLIPTextModelWithProjection": "clip text: masked",
    "CLIPVisionModelWithProjection": "clip image: plain",
}
NAMES += [f"headed: {name}" for name in HEADED]
# one of each family
TEXTS = ["bert: plain", "roberta: plain", "distilbert: plain", "clip text: masked", "siglip text: plain"]
TEXTS += ["blip text: plain", "blip text: memory"]
IMAGES = ["vit: plain", "deit: plain", "dinov2: swiglu", "registers: plain", "dinov3: plain"]
IMAGES += ["clip image: plain", "siglip image: plain", "siglip2 image: plain", "blip image: plain"]
IDLE = ("k_proj.bias", "key.bias", "k_lin.bias", "mask_token")  # the former move all logits of a query alike


def images(height: int = 32, width: int = 32):
    return torch.randn(3, 3, height, width) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1)


def words():
    return torch.randint(3, 50, (3, LENGTH))


def config(kind, **options):
    """A configuration, and apart from it what the model takes beside one."""
    beside = {name: options.pop(name) for name in ("add_pooling_layer", "use_mask_token") if name in options}
    return kind(**options), beside


def hiding(model, mask, tower=None):
    """The model, with zeros for the tokens that the mask hides; `tower`: in which part of its output."""

    def dense(*inputs):
        out = model(*inputs)
        own = out if tower is None else out[f"{tower}_model_output"]
        own.last_hidden_state = own.last_hidden_state * mask[..., None]
        return out

    return dense


def text_case(family: str, option: str) -> Case:
    kinds = {
        "bert": (hf.BertModel, hf.BertConfig),
        "roberta": (hf.RobertaModel, hf.RobertaConfig),
        "distilbert": (hf.DistilBertModel, hf.DistilBertConfig),
    }
    kind, kind_of_config = kinds[family]
    options = {**TEXT, **STILL, "max_position_embeddings": 20, "type_vocab_size": 2, **BERT.get(option, {})}
    if family == "distilbert":
        activation = "relu" if option == "relu" else "gelu"
        options = {"vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "activation": activation}
        options |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
        options |= {"max_position_embeddings": 20}
    own, beside = config(kind_of_config, **options)
    model = randomise(kind(own, **beside))

    inputs = (words(), MASK)
    if option == "types and positions":
        places = (torch.arange(LENGTH) + 4).expand(3, -1)
        types = torch.randint(0, 2, (3, LENGTH))
        inputs = (*inputs, None, places) if family == "distilbert" else (*inputs, types, places)
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
    model = randomise(kind(own, **beside))
    prefix = {"deit": 2, "registers": 5, "dinov3": 1 + getattr(own, "num_register_tokens", 0)}.get(family, 1)

    inputs = (images(32, 48) if option in ("wide", "another size") else images(),)
    if option == "interpolated":
        inputs = (images(40, 48), None, True)  # the second says which patches are masked
    idle = (*IDLE, "register_tokens") if option == "no registers" else IDLE
    return Case(model, inputs, {"image": [range(prefix)] * 3}, idle=idle)


def sentences(eos: int = EOT):
    """Ids [3, length] whose texts end at ENDS, padding behind; no id is larger than EOT."""
    ids = words()
    for row, end in zip(ids, ENDS, strict=True):
        row[end - 1] = eos
        row[end:] = PAD
    return ids


def clip_text_case(family: str, option: str) -> Case:
    kinds = {
        "clip text": (hf.CLIPTextModel, hf.CLIPTextConfig),
        "siglip text": (hf.SiglipTextModel, hf.SiglipTextConfig),
        "siglip2 text": (hf.Siglip2TextModel, hf.Siglip2TextConfig),
    }
    kind, kind_of_config = kinds[family]
    eos = 2 if option == "eos 2" else EOT
    model = randomise(kind(kind_of_config(**TEXT, max_position_embeddings=20, eos_token_id=eos)))
    ids = sentences()
    if option == "no end":
        ids[1] = words()[1]
    masked = option in ("masked", "eos 2")
    ends = ENDS if family == "clip text" else (LENGTH,) * 3
    ends = (ENDS[0], 1, ENDS[2]) if option == "no end" else ends
    return Case(
        model,
        (ids, MASK) if masked else (ids,),
        {"text": [[end - 1] for end in ends]},
        dense=hiding(model, MASK) if masked else None,
        idle=IDLE,
    )


def clip_image_case(family: str, option: str) -> Case:
    if family == "siglip2 image":
        own = hf.Siglip2VisionConfig(**WIDTHS, num_hidden_layers=3, num_attention_heads=4, patch_size=4, num_patches=16)
        model = randomise(hf.Siglip2VisionModel(own))
        inputs = siglip2_patches()
        dense = hiding(model, inputs[1])
        return Case(model, inputs, {"image": [[]] * 3}, summary=False, dense=dense, idle=IDLE)

    clip = family != "siglip image"
    kind, kind_of_config = {
        "clip image": (hf.CLIPVisionModel, hf.CLIPVisionConfig),
        "siglip image": (hf.SiglipVisionModel, hf.SiglipVisionConfig),
        "blip image": (hf.BlipVisionModel, hf.BlipVisionConfig),
    }[family]
    options = {"vision_use_head": False} if option == "no head" else {}
    model = randomise(kind(kind_of_config(**IMAGE, **WIDTHS, **options)))
    inputs = (images(40, 48), True) if option == "interpolated" else (images(),)
    return Case(
        model, inputs, {"image": [[0] if clip else []] * 3}, summary=clip, idle=(*IDLE, "head.attention.in_proj_bias")
    )


def siglip2_patches():
    """Patches of three images of different shapes, padded to 24, which of them are real, and the shapes."""
    shapes = torch.tensor([[4, 4], [3, 8], [5, 2]])
    mask = (torch.arange(24) < shapes.prod(1)[:, None]).long()
    return torch.randn(3, 24, 48) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1), mask, shapes


def two_towers_case(name: str) -> Case:
    family, _, option = name.partition(", ")
    kind, kind_of_config = {
        "clip": (hf.CLIPModel, hf.CLIPConfig),
        "siglip": (hf.SiglipModel, hf.SiglipConfig),
        "siglip2": (hf.Siglip2Model, hf.Siglip2Config),
    }[family]
    text = {**TEXT, "max_position_embeddings": LENGTH, "eos_token_id": EOT, "projection_size": 48}
    image = {**IMAGE, **WIDTHS}
    if family == "siglip2":
        image = {**image, "patch_size": 4, "num_patches": 16}
    more = {"projection_dim": 24} if family == "clip" else {}
    model = randomise(kind(kind_of_config(text_config=text, vision_config=image, **more)))

    clip = family == "clip"
    inputs = (sentences(), *(siglip2_patches() if family == "siglip2" else (images(),)))
    dense = None
    if option == "masked":
        inputs = (*inputs, MASK)
        dense = hiding(model, MASK, "text")
    if family == "siglip2":
        dense = hiding(model, inputs[2], "vision")

    ends = ENDS if clip else (LENGTH,) * 3
    return Case(
        model,
        inputs,
        {"image": [[0] if clip else []] * 3, "text": [[end - 1] for end in ends]},
        summary=clip,
        dense=dense,
        idle=IDLE,
        rows=lambda out: [out.image_embeds, out.text_embeds, out.vision_model_output, out.text_model_output],
    )


BLIP_TEXT = {**TEXT, **STILL, "encoder_hidden_size": 48, "max_position_embeddings": 20, "projection_dim": 24}
BLIP_TEXT |= {"bos_token_id": 50, "sep_token_id": 51, "eos_token_id": 51, "pad_token_id": 0}


def blip_text_case(family: str, option: str) -> Case:
    model = randomise(hf.BlipTextModel(hf.BlipTextConfig(**BLIP_TEXT)))
    inputs = (words(), MASK)
    if option != "plain":
        images = 1 if option == "one image" else 3
        seen = (torch.arange(9) < torch.tensor([4, 9, 6])[:images, None]).long()
        inputs = (*inputs, None, None, None, torch.randn(images, 9, 48), seen)

    def alone(i):
        own = [x[:, : ENDS[i]] if x is not None and x.shape[1] == LENGTH else x for x in inputs]
        return tuple(x if x is None or len(x) == 1 else x[i : i + 1] for x in own)

    def dense(ids, mask, *more):
        """The model hides padding of sentences, not of images: sentence by sentence then, over what is real of its image."""
        if not more:
            return hiding(model, MASK)(ids, mask)
        each = [
            (memory[seen.bool()][None],)
            for memory, seen in zip(*(x.expand(3, *x.shape[1:]) for x in more[3:]), strict=True)
        ]
        outs = [hiding(model, MASK[i])(ids[i : i + 1], mask[i : i + 1], *more[:3], *each[i]) for i in range(3)]
        return [torch.cat(column) for column in zip(*(out.to_tuple() for out in outs), strict=True)]

    idle = (*IDLE, "crossattention") if option == "plain" else IDLE
    return Case(model, inputs, {"text": [[0]] * 3}, dense=dense, alone=alone, idle=idle)


def blip_case(name: str) -> Case:
    kind = {
        "blip retrieval": hf.BlipForImageTextRetrieval,
        "blip answers": hf.BlipForQuestionAnswering,
        "blip captions": hf.BlipForConditionalGeneration,
    }[name]
    text = {**BLIP_TEXT, "hidden_size": 48} if name == "blip answers" else BLIP_TEXT  # its decoder looks at sentences
    own = hf.BlipConfig(text_config=text, vision_config={**IMAGE, **WIDTHS}, image_text_hidden_size=24)
    model = randomise(kind(own))
    ids, pictures, image = words(), images(), {"image": [[0]] * 3}
    if name == "blip captions":
        return Case(model, (pictures, ids, MASK), image, idle=IDLE)

    def called(rows, length):
        text, mask = ids[rows, :length], MASK[rows, :length]
        if name == "blip answers":  # whose decoder sees padding of the question, where it is dense
            return (ids[rows], pictures[rows], None, None, None, ids[rows, 3:7])
        return (text, pictures[rows], True, mask)

    def dense(*inputs):
        out = model(*inputs)
        if out.get("question_embeds") is not None:
            out.question_embeds = out.question_embeds * MASK[..., None]
        return out

    return Case(
        model,
        called(slice(None), LENGTH),
        {**image, "text": [[0]] * 3},
        dense=dense,
        alone=lambda i: called(slice(i, i + 1), ENDS[i]),
        idle=(*IDLE, "vision_proj", "text_proj"),
    )


def headed_case(name: str) -> Case:
    bare = make(HEADED[name])
    model = randomise(getattr(hf, name)(bare.model.config))
    dense = hiding(model, MASK) if name == "CLIPTextModelWithProjection" else None  # the others return no tokens
    return replace(bare, model=model, dense=dense)


def make(name: str) -> Case:
    family, _, option = name.partition(": ")
    if not option:
        return blip_case(name) if family.startswith("blip") else two_towers_case(name)
    if family == "headed":
        return headed_case(option)
    if family == "blip text":
        return blip_text_case(family, option)
    if family.endswith((" text", " image")):
        return (clip_text_case if family.endswith(" text") else clip_image_case)(family, option)
    return (text_case if family in ("bert", "roberta", "distilbert") else image_case)(family, option)
