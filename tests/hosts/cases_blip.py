"""Small models of our BLIP: the text tower by itself, over packed images, and the models of two towers."""

from __future__ import annotations

import torch
from checks import Case, randomize

from vltprune.models.blip import Blip, BlipNlvr, BlipVision
from vltprune.models.caption import BlipCaption
from vltprune.models.med import MedEncoder
from vltprune.models.retrieval import BlipRetrieval
from vltprune.models.vqa import BlipVqa

LENGTH = 12
ENDS = (5, 12, 8)  # tokens of each sentence
TEXT = {"vocab_size": 40, "max_positions": LENGTH, "width": 32, "depth": 2, "heads": 4}
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 48,
    "vision_depth": 2,
    "vision_heads": 4,
    "text_width": 32,
    "text_depth": 2,
    "text_heads": 4,
    "vocab_size": 40,
    "max_positions": LENGTH,
    "merge_from": 1,
}
NAMES = ["vision", "text", "text, memory", "text, pairs", "blip", "nlvr", "caption", "vqa", "retrieval"]
MASK = (torch.arange(LENGTH) < torch.tensor(ENDS)[:, None]).long()


def images(*shape: int):
    return torch.randn(*shape, 3, 32, 32) * torch.tensor([0.5, 1.0, 2.0]).view(3, *[1] * (len(shape) + 2))


def words(sentences: int = 3):
    return torch.randint(1, 40, (sentences, LENGTH))


def text_case(images_per_sentence: int) -> Case:
    k = images_per_sentence
    model = MedEncoder(**TEXT, memory_width=24 if k else None, images=max(k, 1), merge_from=1)
    ids, memory = words(), (torch.randn(3 * k, 9, 24),) if k else ()

    def alone(i):
        return (ids[i : i + 1, : ENDS[i]], MASK[i : i + 1, : ENDS[i]], *(m[i * k : (i + 1) * k] for m in memory))

    def dense(*inputs):
        return model(*inputs) * MASK[..., None]

    return Case(
        randomize(model), (ids, MASK, *memory), {"text": [[0]] * 3}, dense=dense, alone=alone, idle=("key.bias",)
    )


def task_case(name: str) -> Case:
    """The models of a task. What stands behind their towers, captions and answers, is not pruned, and has no padding here."""
    sizes = {key: value for key, value in SIZES.items() if key != "merge_from"}
    pixels, ids, answers = images(3), words(), words()[:, :5]
    if name == "caption":
        sizes["text_width"] = sizes[
            "vision_width"
        ]  # else the guide maps words too, and that map learns from L_align alone
        model = BlipCaption(**sizes, prompt=(), bos_id=39, eos_id=2)
        inputs, towers, idle = (pixels, ids), ("image",), ()
    elif name == "vqa":
        model = BlipVqa(**sizes, bos_id=39, enc_id=38, eos_id=2)
        inputs, towers, idle = (pixels, ids, MASK, answers), ("image", "text"), ()
    else:
        model = BlipRetrieval(**sizes, embed_dim=24, enc_id=38)
        inputs, towers, idle = (pixels, ids, MASK), ("image", "text"), ("projection", "temperature")

    def alone(i):
        rows = [column[i : i + 1] for column in inputs]
        return tuple(
            row[:, : ENDS[i]] if place in (1, 2) and "text" in towers else row for place, row in enumerate(rows)
        )

    protected = {tower: [[0]] * 3 for tower in towers}
    return Case(randomize(model), inputs, protected, alone=alone, idle=("key.bias", *idle))


def make(name: str) -> Case:
    if name in ("caption", "vqa", "retrieval"):
        return task_case(name)
    if name.startswith("text"):
        return text_case({"text": 0, "text, memory": 1, "text, pairs": 2}[name])
    if name == "vision":
        model = BlipVision(image_size=32, patch_size=8, width=32, depth=2, heads=4)
        return Case(randomize(model), (images(3),), {"image": [[0]] * 3})

    model = randomize(BlipNlvr(**SIZES) if name == "nlvr" else Blip(**SIZES))
    ids, image, text = words(), {"image": [[0]] * (6 if name == "nlvr" else 3)}, {"text": [[0]] * 3}
    pixels = images(3, 2) if name == "nlvr" else images(3)
    return Case(
        model,
        (pixels, ids, MASK),
        image | text,
        alone=lambda i: (pixels[i : i + 1], ids[i : i + 1, : ENDS[i]]),
        idle=("key.bias",),
    )
