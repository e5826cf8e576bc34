"""The state dict of a pruned model: the dense model's names, no tensor twice, and the ways of trainers with it."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import open_clip
import pytest
import torch
import transformers as hf
from small_models import BLIP, images, sentences, small
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import vltprune as vp
from vltprune.models.blip import Blip

GUIDED = {"guide": "codebook(anchors=6)"}
OWN = ("guide.", "pruners.")


def open_clip_pair() -> nn.Module:
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    text = {"layers": 2, "width": 32, "heads": 2, "vocab_size": 50, "context_length": 8}
    return open_clip.model.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)).eval()


def hf_pair() -> nn.Module:
    layers = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 3}
    vision = {**layers, "image_size": 32, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


MAKERS = {
    "a tower of timm": lambda: copy.deepcopy(small("vit").model),
    "a text tower": lambda: copy.deepcopy(small("text").model),
    "blip": lambda: copy.deepcopy(small("nlvr").model),
    "open_clip": open_clip_pair,
    "transformers": hf_pair,
}
dense_models = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@dense_models
def test_the_dense_model_s_names_and_those_of_the_parts(make):
    dense = make()
    state = vp.prune(dense, "madtp", keep="learned", **GUIDED).state_dict()
    assert dense.state_dict().keys() <= state.keys()
    assert all(torch.equal(state[key], value) for key, value in dense.state_dict().items())
    own = state.keys() - dense.state_dict().keys()
    assert {"guide.anchors", "guide.birth"} < own
    assert all(any(name in key for name in OWN) for key in own)


@dense_models
def test_no_tensor_is_registered_twice(make):
    model = vp.prune(make(), "madtp", **GUIDED)
    stored = [value.untyped_storage().data_ptr() for value in model.state_dict().values() if value.numel()]
    assert len(stored) == len(set(stored))
    named = dict(model.named_modules(remove_duplicate=False))
    assert [name for name, module in named.items() if module is model.pruning.guide] == ["guide"]
    assert all(tower.guide is model.pruning.guide for tower in model.pruning.towers.values())


@dense_models
def test_a_strict_round_trip_and_dense_weights_into_a_pruned_model(make):
    model, other = (vp.prune(make(), "madtp", **GUIDED) for _ in range(2))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert _equal(model, other)

    found = other.load_state_dict(make().state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert all(key.startswith("guide.") for key in found.missing_keys)
    assert not _equal(model, other)
    other.load_state_dict(model.state_dict(), assign=True)
    assert _equal(model, other)
    assert all(_equal_states(a, b) for a, b in zip(_towers(model), _towers(other), strict=True))


def test_names_with_host_are_read_too():
    model, other = (vp.prune(Blip(**BLIP), "madtp", **GUIDED) for _ in range(2))
    state = model.state_dict()
    towers = ("visual.", "text.")
    old = {key.replace(".", ".host.", 1) if key.startswith(towers) else key: value for key, value in state.items()}
    other.load_state_dict(old)
    assert _equal(model, other)


def test_what_does_not_fit_is_told_in_the_dense_model_s_names():
    model = vp.prune(copy.deepcopy(small("nlvr").model), "madtp", **GUIDED)
    state = dict(model.state_dict())
    del state["visual.norm.weight"]
    found = model.load_state_dict(state | {"visual.norm.strange": torch.zeros(1)}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["visual.norm.weight"], ["visual.norm.strange"])


@dense_models
def test_copies_pickles_and_moves_keep_one_guide(make):
    model = vp.prune(make(), "madtp", **GUIDED)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert _equal(copied, model)
        assert copied.pruning.guide is not model.pruning.guide
        assert all(tower.guide is copied.pruning.guide for tower in copied.pruning.towers.values())
        copied.load_state_dict(model.state_dict())
    model.double()
    assert model.pruning.guide.anchors.dtype == torch.float64
    assert all(p.dtype == torch.float64 for tower in _towers(model) for p in tower.host.parameters())


def test_several_devices_by_data_parallel_are_refused(monkeypatch):
    model = vp.prune(copy.deepcopy(small("nlvr").model), "madtp", **GUIDED)
    replicate = importlib.import_module("torch.nn.parallel.replicate")  # there is one device here
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors] * 2)
    with pytest.raises(RuntimeError, match=r"use torch\.nn\.parallel\.DistributedDataParallel"):
        nn.parallel.replicate(model, [0, 1])


def test_distributed_checkpoints_bring_weights_and_optimizer_back():
    model, other = (vp.prune(Blip(**BLIP), "madtp", keep="learned", **GUIDED) for _ in range(2))
    optimizer, another = (torch.optim.AdamW(m.parameters()) for m in (model, other))
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    set_model_state_dict(other, get_model_state_dict(model))
    set_optimizer_state_dict(other, another, get_optimizer_state_dict(model, optimizer))
    assert _equal(model, other)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["exp_avg"], another.state[b]["exp_avg"])


def test_outputs_survive_the_round_trip():
    model, other = (vp.prune(Blip(**BLIP), "evit").eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    batch = (images(3), *sentences(3))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(*batch), other(*batch), strict=True))


def _towers(model):
    return [model.pruning.towers[name] for name in sorted(model.pruning.towers)]


def _equal(a, b):
    return _equal_states(a.state_dict(), b.state_dict())


def _equal_states(a, b):
    a, b = (x if isinstance(x, dict) else x.host.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())
