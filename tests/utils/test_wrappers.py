"""Wrappers of a model are not taken for it: compiled, in parallel, averaged, and several of these."""

from __future__ import annotations

import pickle

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import Block
from timm.utils import ModelEmaV2
from torch import nn
from torch.distributed import init_process_group
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim.swa_utils import AveragedModel

import vltprune as vp
from vltprune.cost.budget_control import BudgetControl
from vltprune.cost.sample_cost import SampleCostMeter

CPU = torch.device("cpu")
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
    return vp.create_model("vit_tiny_patch16_224", preset=pruning, **TINY)


@wrappers
@pytest.mark.usefixtures("processes")
def test_the_model_behind_it_is_saved_calibrated_and_counted(tmp_path, wrap):
    wrapper = wrap(tower())
    model = vp.unwrapped(wrapper)
    assert isinstance(model, vp.PrunedEncoder)
    found = vp.measure(model, [IMAGES], 0.6)
    assert vp.measure(model, [IMAGES]) == found
    keep = BudgetControl(wrapper)
    keep.commit(0.4)
    assert model.pruning.config.keep.args == {"ratio": 0.4}
    assert SampleCostMeter(wrapper).is_dense is False
    assert vp.CostMeter(wrapper).host is model.host
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
        vp.measure(wrapper, [IMAGES])
    assert SampleCostMeter(wrapper).is_dense
    again = vp.load(vp.save(wrapper, tmp_path))
    assert torch.equal(again(IMAGES), vp.unwrapped(wrapper)(IMAGES))
    assert type(vp.transforms(wrapper)) is vp.Preprocessing


def sharded(blocks, version):
    """A function that shards a tower by FSDP, each of its blocks too."""

    def shard(model):
        if version == 2:
            mesh = init_device_mesh("cpu", (1,))
            for block in vp.unwrapped(model).host.blocks if blocks else ():
                fully_shard(block, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        policy = ModuleWrapPolicy({Block}) if blocks else None
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=CPU)

    return shard


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.usefixtures("processes")
@pytest.mark.filterwarnings("ignore")  # of torch, that FSDP 1 is outdated and that there is no GPU
def test_sharded_weights_are_calibrated_and_never_saved_as_if_whole(tmp_path, version):
    model = tower()
    want, keys = model(IMAGES).detach(), list(model.state_dict())
    wrapper = sharded(False, version)(model)
    assert torch.allclose(wrapper(IMAGES), want, atol=1e-5)
    found = vp.calibrate(wrapper, [IMAGES], 0.4, tolerance=0.2)
    for only in (None, "pruning"):
        with pytest.raises(ValueError, match=r"sharded by FSDP.*fully_shard\(model\).*full_state_dict=True"):
            vp.save(wrapper, tmp_path / "m", only=only)
    assert not (tmp_path / "m").exists()
    if version == 2:
        state = get_model_state_dict(wrapper, options=StateDictOptions(full_state_dict=True))
        whole = tower().pruning.host
        whole = vp.prune(whole, model.pruning.config)
        whole.load_state_dict(state)
        assert sorted(state) == sorted(keys)
        again = vp.load(vp.save(whole, tmp_path / "m"))
        assert again.pruning.config.keep.args == {"ratio": found.value}
        assert torch.allclose(again(IMAGES), wrapper(IMAGES), atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.usefixtures("processes")
@pytest.mark.filterwarnings("ignore")
def test_sharded_blocks_are_refused(version):
    """Their weights are gathered where a block is called, and a pruned tower calls its parts: results were wrong."""
    wrapper = sharded(True, version)(tower())
    with pytest.raises(RuntimeError, match=r"block 0 of the image tower is sharded by FSDP.*fully_shard\(model\)"):
        wrapper(IMAGES)


class DeepSpeedEngine(nn.Module):
    """As DeepSpeed's: it holds the model as `module`."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)


def test_an_engine_of_deepspeed_is_a_wrapper(tmp_path):
    model = tower()
    engine = DeepSpeedEngine(model)
    assert vp.unwrapped(engine) is model
    found = vp.calibrate(engine, [IMAGES], 0.4, tolerance=0.2)
    assert vp.load(vp.save(engine, tmp_path)).pruning.config.keep.args == {"ratio": found.value}


def test_what_is_calibrated_in_a_wrapper_is_saved(tmp_path):
    model = tower()
    found = vp.calibrate(nn.DataParallel(model), [IMAGES], 0.4, tolerance=0.2)
    assert model.pruning.config.keep.args == {"ratio": found.value}
    again = vp.load(vp.save(model, tmp_path))
    assert vp.measure(again, [IMAGES]).macs == found.macs


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
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    again = pickle.loads(pickle.dumps(prepare))
    assert torch.equal(again(image), prepare(image))
