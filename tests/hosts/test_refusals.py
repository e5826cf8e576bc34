"""Errors for models that no host runs: subclasses, wrappers, and strangers."""

from __future__ import annotations

import pytest
import torch
from cases_timm import SIZES
from checks import same
from test_hosts import make
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vltprune as vp
from vltprune.hosts.find import find_host


class Same(VisionTransformer):
    """Changes nothing."""


class Other(VisionTransformer):
    """Changes how it pools."""

    def pool(self, x, pool_type=None):
        return x[:, -1]


class Holder(nn.Module):
    """Holds a model, as wrappers do."""

    def __init__(self, model):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.ModuleDict({"auto_model": model})])


def message(model) -> str:
    with pytest.raises(TypeError, match="cannot prune a") as refusal:
        vp.prune(model, "random")
    return str(refusal.value)


def test_a_subclass_that_changes_nothing_is_told_how_to_be_registered(monkeypatch):
    text = message(Same(**SIZES))
    assert len(text) < 400
    write = text.partition("write ")[2].partition(". Supported")[0]
    monkeypatch.setattr(vp.hosts, "_makers", {**vp.hosts._makers})  # registers it for this test alone
    exec(write, {"vltprune": vp})  # what the message says to write
    pruned = vp.prune(Same(**SIZES).eval(), "random", keep="ratio(ratio=1.0)")
    images = torch.randn(2, 3, 32, 32)
    same(pruned(images), pruned.host(images))


def test_a_subclass_that_changes_something_is_told_what():
    text = message(Other(**SIZES))
    assert len(text) < 400
    assert "overrides pool of timm.models.vision_transformer.VisionTransformer" in text


@pytest.mark.parametrize("name", ["timm: vit: plain", "transformers: clip", "transformers: bert: plain", "blip: nlvr"])
def test_a_wrapper_is_told_what_to_prune(name):
    inner = make(name).model
    text = message(Holder(inner))
    assert len(text) < 400
    assert f"a {type(inner).__name__}." in text
    assert "model.layers[1].auto_model = vltprune.prune(model.layers[1].auto_model, ...)" in text


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, that peft calls what it renamed
def test_peft_models_are_wrappers():
    peft = pytest.importorskip("peft")
    case = make("transformers: headed: BertForSequenceClassification")
    model = peft.get_peft_model(case.model, peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    assert "model.base_model.model = vltprune.prune(model.base_model.model, ...)" in message(model)
    expected = model(*case.inputs)
    model.base_model.model = vp.prune(model.base_model.model, "random", keep="ratio(ratio=1.0)")
    same(model(*case.inputs), expected)
    with model.disable_adapter(), pytest.raises(AssertionError):
        same(model(*case.inputs), expected)


def test_strangers_are_shown_the_list():
    text = message(nn.Linear(2, 2))
    assert "Supported: VisionTransformer" in text
    assert len(text) < 400
    with pytest.raises(TypeError, match="Supported: "):
        find_host(nn.Linear(2, 2))
