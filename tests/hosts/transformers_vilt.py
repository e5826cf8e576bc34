"""Small models of ViLT of transformers, and what the dense ones return with tokens in the order of the image."""

from __future__ import annotations

import torch
import transformers as hf
from checks import Case, randomize
from transformers_parts import ENDS, IDLE, IMAGE, MASK, STILL, TEXT, words

POSITIONS = 20
SIZES = ((32, 32), (24, 32), (16, 40))  # of the images, all of them padded to 32 x 40
VILT = {
    "plain": {},
    "unmasked": {},
    "types": {"modality_type_vocab_size": 3},
    "no pooler": {},
    "no qkv bias, eps, relu": {"qkv_bias": False, "layer_norm_eps": 0.1, "hidden_act": "relu"},
}


def config(**options):
    return hf.ViltConfig(**{**TEXT, **STILL, **IMAGE, "max_position_embeddings": POSITIONS, **options})


def padded_images(*leading: int):
    """Images [3, *leading, 3, 32, 40] of three sizes, zero behind them, and where they are."""
    real = torch.zeros(3, 32, 40, dtype=torch.int64)
    for row, (height, width) in zip(real, SIZES, strict=True):
        row[:height, :width] = 1
    real = real.view(3, *(1 for _ in leading), 32, 40).expand(3, *leading, 32, 40)
    return torch.randn(3, *leading, 3, 32, 40) * real.unsqueeze(-3), real


def in_order(model):
    """The model, with the last states of the tokens that are there: words, the image's class token, patches by row."""

    def dense(ids, mask=None, types=None, pixels=None, real=None, *more):
        state = torch.get_rng_state()
        out = model(ids, mask, types, pixels, real, *more)
        after = torch.get_rng_state()
        torch.set_rng_state(state)  # to have the patches that the model had drawn
        drawn = torch.ones_like(pixels[:, 0]) if real is None else real
        with torch.no_grad():
            _, there, (index, (_, width)) = model.embeddings.visual_embed(pixels, drawn, model.config.max_image_length)
        torch.set_rng_state(after)
        rows, longest = [], 0
        for i, states in enumerate(out.last_hidden_state):
            shown = range(ids.shape[1]) if mask is None else mask[i].nonzero().flatten().tolist()
            patches = {int(r) * width + int(c): n for n, (r, c) in enumerate(index[i]) if there[i, n + 1]}
            order = [*shown, ids.shape[1], *(ids.shape[1] + 1 + patches[place] for place in sorted(patches))]
            rows.append(states[order])
            longest = max(longest, len(order))
        padded = [torch.cat([row, row.new_zeros(longest - len(row), row.shape[1])]) for row in rows]
        out.last_hidden_state = torch.stack(padded)
        return out

    return dense


def vilt_case(option: str) -> Case:
    model = randomize(hf.ViltModel(config(**VILT[option]), add_pooling_layer=option != "no pooler"))
    ids, (pixels, real) = words(), padded_images()
    inputs = (ids, MASK, None, pixels, real)
    if option == "unmasked":
        inputs = (ids, None, None, torch.randn(3, 3, 24, 40))
    elif option == "types":
        inputs = (ids, MASK, torch.randint(0, 2, ids.shape), pixels, real, None, None, 2)

    def alone(i):
        if option == "unmasked":
            return ids[i : i + 1], None, None, inputs[3][i : i + 1]
        height, width = SIZES[i]
        text = (None if one is None else one[i : i + 1, : ENDS[i]] for one in inputs[:3])
        return *text, pixels[i : i + 1, :, :height, :width], real[i : i + 1, :height, :width], *inputs[5:]

    return Case(model, inputs, {"fusion": [[0, POSITIONS]] * 3}, dense=in_order(model), alone=alone, idle=IDLE)


def two_images_case() -> Case:
    """A classifier of a text and two images, which the tower reads with the text one after the other."""
    own = config(num_images=2, modality_type_vocab_size=3, num_hidden_layers=3)
    model = randomize(hf.ViltForImagesAndTextClassification(own))
    ids, (pixels, real) = words(), padded_images(2)

    def alone(i):
        height, width = SIZES[i]
        one = slice(i, i + 1)
        text = (ids[one, : ENDS[i]], MASK[one, : ENDS[i]], None)
        return *text, pixels[one, ..., :height, :width], real[one, ..., :height, :width]

    inputs = (ids, MASK, None, pixels, real)
    return Case(model, inputs, {"fusion": [[0, POSITIONS]] * 3}, alone=alone, idle=IDLE)
