"""Small models of transformers that see and read: the towers of CLIP, SigLIP and BLIP, and the models that hold them."""

from __future__ import annotations

import torch
import transformers as hf
from checks import Case, randomize
from transformers_parts import ENDS, EOT, IDLE, IMAGE, LENGTH, MASK, PAD, STILL, TEXT, WIDTHS, hiding, images, words

BLIP_TEXT = {**TEXT, **STILL, "encoder_hidden_size": 48, "max_position_embeddings": 20, "projection_dim": 24}
BLIP_TEXT |= {"bos_token_id": 50, "sep_token_id": 51, "eos_token_id": 51, "pad_token_id": 0}


def sentences():
    """Ids [3, length] whose texts end at ENDS, padding behind; no id is larger than EOT."""
    ids = words()
    for row, end in zip(ids, ENDS, strict=True):
        row[end - 1] = EOT
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
    model = randomize(kind(kind_of_config(**TEXT, max_position_embeddings=20, eos_token_id=eos)))
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
        own = hf.Siglip2VisionConfig(**WIDTHS, num_hidden_layers=2, num_attention_heads=4, patch_size=4, num_patches=16)
        model = randomize(hf.Siglip2VisionModel(own))
        inputs = siglip2_patches()
        dense = hiding(model, inputs[1])
        return Case(model, inputs, {"image": [[]] * 3}, summary=False, dense=dense, idle=IDLE)

    clip = family != "siglip image"
    kind, kind_of_config = {
        "clip image": (hf.CLIPVisionModel, hf.CLIPVisionConfig),
        "siglip image": (hf.SiglipVisionModel, hf.SiglipVisionConfig),
        "blip image": (hf.BlipVisionModel, hf.BlipVisionConfig),
        "blip2 image": (hf.Blip2VisionModel, hf.Blip2VisionConfig),
    }[family]
    options = {"vision_use_head": False} if option == "no head" else {}
    model = randomize(kind(kind_of_config(**IMAGE, **WIDTHS, **options)))
    inputs = (images(40, 48), True) if option == "interpolated" else (images(),)
    return Case(model, inputs, {"image": [[0] if clip else []] * 3}, summary=clip, idle=IDLE)


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
    model = randomize(kind(kind_of_config(text_config=text, vision_config=image, **more)))

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


def blip_text_case(family: str, option: str) -> Case:
    model = randomize(hf.BlipTextModel(hf.BlipTextConfig(**BLIP_TEXT)))
    inputs = (words(), MASK)
    if option != "plain":
        each = 1 if option == "one image" else 3
        seen = (torch.arange(9) < torch.tensor([4, 9, 6])[:each, None]).long()
        inputs = (*inputs, None, None, None, torch.randn(each, 9, 48), seen)

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
    model = randomize(kind(own))
    ids, pixels, image = words(), images(), {"image": [[0]] * 3}
    if name == "blip captions":
        return Case(model, (pixels, ids, MASK), image, idle=IDLE)

    def called(rows, length):
        text, mask = ids[rows, :length], MASK[rows, :length]
        if name == "blip answers":  # whose decoder sees padding of the question, where it is dense
            return (ids[rows], pixels[rows], None, None, None, ids[rows, 3:7])
        return (text, pixels[rows], True, mask)

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
