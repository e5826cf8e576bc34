"""Wrappers of a model are not taken for it: compiled, in parallel, averaged, and several of these."""

from __future__ import annotations

import pickle

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.utils import ModelEmaV2
from torch import nn
from torch.distributed import init_process_group
from torch.optim.swa_utils import AveragedModel

import vltprune as vp
from vltprune import budget, flops
from vltprune.gauge import Gauge

TINY = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 4}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def processes(tmp_path):
    init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "averaged": AveragedModel,
    "timm's average": ModelEmaV2,
    "compiled in DDP": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def tower(pruning="evit"):
    return vp.create_model("vit_tiny_patch16_224", pruning=pruning, **TINY)


@wrappers
@pytest.mark.usefixtures("processes")
def test_the_model_behind_it_is_saved_calibrated_and_counted(tmp_path, wrap):
    wrapper = wrap(tower())
    model = vp.unwrapped(wrapper)
    assert isinstance(model, vp.PrunedEncoder)
    found = budget.measure(model, [IMAGES], 0.6)
    assert budget.measure(model, [IMAGES]) == found
    keep = budget.Dial(wrapper)
    keep.settle(0.4)
    assert model.pruning.config.keep.args == {"ratio": 0.4}
    assert Gauge(wrapper).is_dense is False
    assert flops.Meter(wrapper).host is model.host
    again = vp.load(vp.save(wrapper, tmp_path))
    assert again.pruning.config == model.pruning.config
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert type(vp.transforms(wrapper)) is vp.Preprocessing


@wrappers
@pytest.mark.usefixtures("processes")
def test_a_dense_one_is_saved_and_is_not_pruned_in_its_wrapper(tmp_path, wrap):
    wrapper = wrap(tower(None))
    with pytest.raises(TypeError, match="prune that one, and wrap what `prune` returns"):
        vp.prune(wrapper, "evit")
    with pytest.raises(TypeError, match="this VisionTransformer is not pruned"):
        budget.measure(wrapper, [IMAGES])
    assert Gauge(wrapper).is_dense
    again = vp.load(vp.save(wrapper, tmp_path))
    assert torch.equal(again(IMAGES), vp.unwrapped(wrapper)(IMAGES))
    assert type(vp.transforms(wrapper)) is vp.Preprocessing


def test_what_is_calibrated_in_a_wrapper_is_saved(tmp_path):
    model = tower()
    found = vp.calibrate(nn.DataParallel(model), [IMAGES], 0.4, tolerance=0.2)
    assert model.pruning.config.keep.args == {"ratio": found.value}
    again = vp.load(vp.save(model, tmp_path))
    assert budget.measure(again, [IMAGES]).macs == found.macs


def test_compiled_submodules_are_saved_under_their_own_names(tmp_path):
    model = tower(None)
    model.blocks[1] = compiled(model.blocks[1])
    again = vp.load(vp.save(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))


CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"layers": 1, "width": 16, "heads": 2},
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("vit_tiny_patch16_224", **TINY),
        lambda: vp.create_model("clip", **CLIP),
        lambda: open_clip.create_model("ViT-S-32-alt", force_image_size=32),
        lambda: vp.create_model("blip_nlvr_tiny"),
        lambda: vp.create_model("blip_tiny").visual,
    ],
    ids=["timm", "clip", "open_clip", "blip", "a tower of blip"],
)
def test_transforms_travel_to_other_processes(make):
    """Spawned workers get them by pickle."""
    prepare = vp.transforms(make())
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    again = pickle.loads(pickle.dumps(prepare))
    assert torch.equal(again(picture), prepare(picture))
