"""The type of pruned models: what type checkers and isinstance know of what `prune` returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vltprune as vp

ROOT = Path(vp.__file__).parent.parent
TINY = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 4}

USES = """
from typing_extensions import assert_type
import torch
import vltprune as vp
from torch import nn

def uses(dense: nn.Module, batches: list[torch.Tensor]) -> None:
    for model in (
        vp.prune(dense, "madtp"),
        vp.prune(dense, "madtp", reduction=0.5, data=batches),
        vp.prune(dense, "madtp", keep=vp.keep.ratio(0.5), scorer="random", guide=None, at=(3, 6)),
        vp.prune(dense, "madtp", keep={"image": "ratio(0.5)"}, at={"image": None}),
        vp.create_model("blip_nlvr_tiny", preset="madtp"),
        vp.load("folder"),
        vp.from_pretrained("org/name"),
    ):
        assert_type(model, vp.PrunedModel)
        assert_type(model.pruning.config, vp.PruneConfig)
        assert_type(model.pruning.config.part("keep"), vp.Part)
        assert_type(model.pruning.towers["image"], vp.PrunedEncoder)
        assert_type(model.pruning.guide, vp.AlignmentGuide | None)
        assert_type(model.host, nn.Module)
        model.to("cpu").eval()(torch.zeros(1))
        vp.count_macs(model, torch.zeros(1))
        torch.optim.SGD(model.parameters(), 1e-3)
    assert_type(vp.create_model("blip_nlvr_tiny"), nn.Module)
    opened = vp.create_model("blip_nlvr_tiny_madtp")
    if vp.is_pruned(opened):
        assert_type(opened.pruning.config, vp.PruneConfig)
"""


def test_type_checkers_know_what_a_pruned_model_has(tmp_path):
    file = tmp_path / "uses.py"
    file.write_text(USES)
    command = [sys.executable, "-m", "pyrefly", "check", str(file), "--config", str(ROOT / "pyproject.toml")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def towers():
    return vp.create_model("vit_tiny_patch16_224", **TINY)


@pytest.mark.parametrize("make", [towers, lambda: vp.create_model("blip_nlvr_tiny")], ids=["tower", "composite"])
def test_pruned_models_and_no_others_are_of_the_type(make):
    dense = make()
    model = vp.prune(dense, "random")
    assert isinstance(model, vp.PrunedModel)
    assert vp.is_pruned(model)
    assert not isinstance(dense, vp.PrunedModel)
    assert not vp.is_pruned(dense)
    assert model.host is dense
    assert model.pruning.host is dense


def test_the_towers_of_a_composite_and_wrappers_are_none():
    model = vp.prune(vp.create_model("blip_nlvr_tiny"), "random")
    assert not any(vp.is_pruned(tower) for tower in model.pruning.towers.values())
    wrapper = nn.DataParallel(model)
    assert not vp.is_pruned(wrapper)
    assert vp.is_pruned(vp.unwrapped(wrapper))
    assert vp.is_pruned(torch.compile(model, backend="eager"))
    assert not vp.is_pruned("madtp")


def test_a_dictionary_is_no_preset():
    with pytest.raises(TypeError, match=r"preset=\{'scorer': 'random'\}: give the name of a preset or a PruneConfig"):
        vp.prune(towers(), {"scorer": "random"})


def test_a_host_whose_pruned_class_prunes_nothing_is_refused(monkeypatch):
    host = vp.hosts["timm.models.vision_transformer.VisionTransformer"]
    monkeypatch.setattr(host, "pruned_class", nn.Identity)
    with pytest.raises(TypeError, match=r"pruned_class is Identity: give a subclass of PrunedEncoder, or None"):
        vp.prune(towers(), "random")


def test_the_type_is_not_built():
    with pytest.raises(TypeError, match=r"vltprune.prune\(model, preset\) makes"):
        vp.PrunedModel()
