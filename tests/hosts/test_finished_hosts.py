"""Models of every library, dense and pruned, finished for inference."""

from __future__ import annotations

import pytest
import torch
from checks import same
from test_hosts import make

import vltprune as vp

FAMILIES = [
    "timm: vit: layer_scale",
    "timm: eva: default",
    "timm: eva: rope dinov3",
    "open_clip: image: tok",
    "open_clip: clip",
]
FAMILIES += [
    "open_clip: text: siglip",
    "open_clip_hf: clip",
    "transformers: bert: plain",
    "transformers: distilbert: plain",
]
FAMILIES += ["transformers: dinov2: plain", "transformers: clip", "transformers: siglip2", "transformers: blip answers"]
FAMILIES += ["blip: nlvr", "blip: caption", "blip: vqa"]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_finished_models_of_every_library(name):
    case = make(name)
    for model in (case.model, case.pruned(), case.pruned("evit" if case.summary else "random", reducer="fuse")):
        finished = vp.finish(model)
        assert finished.finished.prepacked
        same(finished(*case.inputs), model(*case.inputs))
    costs = [vp.count_macs(one, *case.inputs) for one in (finished, model)]
    assert costs[0].total == costs[1].total and costs[0].dense_total == costs[1].dense_total
