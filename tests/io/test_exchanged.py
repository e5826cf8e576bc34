"""What was exchanged in a model after it was built is saved and comes back, or saving is refused by its name."""

from __future__ import annotations

import copy

import pytest
import torch
from open_clip.model import set_model_preprocess_cfg
from torch import nn
from torch.nn.utils import parametrizations

import vltprune as vp
from vltprune.cost.budget_control import BudgetControl

SIZES = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"layers": 1, "width": 16, "heads": 2},
}
BLIP = {"vision_depth": 1, "text_depth": 1, "vision_width": 32, "text_width": 32}
TOWERS = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224")


def tower(name="vit_tiny_patch16_224", pruning=None):
    return vp.create_model(name, preset=pruning, **SIZES)


def host(model):
    return model.pruning.host if hasattr(model, "pruning") else model


COMES_BACK = {
    "classes": lambda m: m.reset_classifier(10),
    "pooling": lambda m: m.reset_classifier(1000, "avg"),
    "pooling by hand": lambda m: setattr(m, "global_pool", "avg"),
    "no head": lambda m: m.reset_classifier(0),
    "size": lambda m: m.set_input_size((48, 48)),
    "mean": lambda m: m.pretrained_cfg.update(mean=(0.1, 0.2, 0.3)),
    "several": lambda m: (m.reset_classifier(7, "avg"), m.set_input_size((16, 48))),
}
REFUSED = {
    "head by hand": (lambda m: setattr(m, "head", nn.Linear(32, 7)), r"head\.out_features is 7 and was 1000"),
    "no head": (lambda m: setattr(m, "head", nn.Identity()), "head is Identity and was Linear"),
    "activation": (lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()), r"blocks\.0\.mlp\.act is ReLU and was GELU"),
    "scale": (lambda m: setattr(m.blocks[0].attn, "scale", 0.5), r"blocks\.0\.attn\.scale is 0\.5"),
    "eps": (lambda m: setattr(m.blocks[0].norm1, "eps", 0.5), r"blocks\.0\.norm1\.eps is 0\.5"),
    "dropout": (lambda m: setattr(m.head_drop, "p", 0.5), r"head_drop\.p is 0\.5"),
    "module": (lambda m: m.add_module("extra", nn.Linear(2, 2)), "extra is Linear and was nothing"),
    "parameter": (
        lambda m: m.register_parameter("p", nn.Parameter(torch.ones(1))),
        r"p is \[1\] float and was nothing",
    ),
    "tied": (lambda m: setattr(m.blocks[0].norm1, "weight", m.norm.weight), r"norm\.weight"),
    "parametrized": (lambda m: parametrizations.weight_norm(m.head), "head is Parametrized"),
    "block": (lambda m: m.blocks.pop(1), r"blocks\.1 is nothing and was"),
    "integers": (lambda m: m.head.register_buffer("steps", torch.zeros(1, dtype=torch.int8)), "int8"),
}
ALLOWED = {
    "frozen": lambda m: m.requires_grad_(False),
    "training": lambda m: m.train(),
    "hook": lambda m: m.register_forward_hook(lambda *_: None),
    "half": lambda m: m.half(),
    "checkpointing": lambda m: m.set_grad_checkpointing(),
    "a note": lambda m: setattr(m, "note", "mine"),
    "other weights": lambda m: setattr(m.blocks[0].norm1, "weight", nn.Parameter(torch.ones(32))),
    "run": lambda m: m(torch.randn(1, 3, 32, 32)),
    "copied": lambda m: copy.deepcopy(m),
}


@pytest.mark.parametrize("change", COMES_BACK.values(), ids=COMES_BACK)
@pytest.mark.parametrize("name", TOWERS)
def test_arguments_of_timm_s_models_come_back(tmp_path, name, change):
    model = tower(name)
    change(model)
    again = vp.load(vp.save(model, tmp_path))
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    assert torch.equal(again(images), model(images))
    assert again.pretrained_cfg["mean"] == pytest.approx(model.pretrained_cfg["mean"])
    third = vp.load(vp.save(again, tmp_path))
    assert torch.equal(third(images), model(images))


def test_they_come_back_under_a_pruned_model(tmp_path):
    dense = tower()
    dense.reset_classifier(10, "avg")
    model = vp.prune(dense, "evit").eval()
    again = vp.load(vp.save(model, tmp_path))
    images = torch.randn(2, 3, 32, 32)
    assert again(images).shape == (2, 10)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("pruning", [None, "evit"])
def test_anything_else_is_refused_by_name(tmp_path, change, says, pruning):
    model = tower(pruning=pruning)
    change(host(model))
    with pytest.raises(ValueError, match=f"cannot save this vit_tiny_patch16_224: .*{says}.*Nothing was written"):
        vp.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
@pytest.mark.parametrize("name", TOWERS)
def test_how_a_model_is_run_may_change(tmp_path, name, change):
    model = tower(name)
    change(model)
    again = vp.load(vp.save(model, tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["clip", "ViT-S-32-alt"])
def test_the_preprocessing_of_open_clip_comes_back(tmp_path, name):
    model = vp.create_model(name, **(CLIP if name == "clip" else {"force_image_size": 32}))
    set_model_preprocess_cfg(model, {**model.visual.preprocess_cfg, "mean": (0.5, 0.4, 0.3)})
    again = vp.load(vp.save(model, tmp_path))
    assert vp.transforms(again).mean.tolist() == pytest.approx([0.5, 0.4, 0.3])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: setattr(m.visual, "ln_post", nn.Identity()), r"visual\.ln_post is Identity"),
        (lambda m: setattr(m.visual, "output_tokens", True), r"visual\.output_tokens is True"),
        (lambda m: setattr(m, "text_pool_type", "last"), r"text_pool_type is 'last'"),
    ],
)
@pytest.mark.parametrize("pruning", [None, "evit"])
def test_parts_of_composites_are_refused_too(tmp_path, change, says, pruning):
    model = vp.create_model("clip", preset=pruning, **CLIP)
    change(host(model))
    with pytest.raises(ValueError, match=says):
        vp.save(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: setattr(m, "head", nn.Linear(32, 2)), "does not share head.*Exchange parts in model.host"),
        (lambda m: m.add_module("extra", nn.Linear(2, 2)), "does not share extra"),
        (lambda m: setattr(m, "head", copy.deepcopy(m.head)), r"does not share head\.0\.weight"),
    ],
)
def test_what_a_pruned_model_no_longer_shares_with_its_host_is_refused(tmp_path, change, says):
    model = vp.create_model("blip_nlvr_tiny_evit", **BLIP)
    change(model)
    with pytest.raises(ValueError, match=says):
        vp.save(model, tmp_path)


@pytest.mark.parametrize("name", ["blip_nlvr_tiny", "blip_caption_tiny", "blip_vqa_tiny", "blip_retrieval_tiny"])
@pytest.mark.parametrize("preset", [None, "madtp"])
def test_every_model_is_saved_as_it_was_built(tmp_path, name, preset):
    model = vp.create_model(name, preset=preset, **BLIP)
    for one in (model, copy.deepcopy(model).train().double()):
        again = vp.load(vp.save(one, tmp_path))
        state = again.state_dict()
        assert all(torch.equal(value, state[key].to(value)) for key, value in one.state_dict().items())


def pruned(preset="evit", **parts):
    return vp.create_model("blip_nlvr_tiny", preset=preset, **{**BLIP, "vision_depth": 2, "text_depth": 2}, **parts)


def keepers(model, tower=None):
    towers = model.pruning.towers
    return [pruner.keeper for name in towers if tower in (None, name) for pruner in towers[name].pruners.values()]


def each(kind, name, value):
    def change(model):
        for encoder in model.pruning.towers.values():
            for pruner in encoder.pruners.values():
                setattr(getattr(pruner, kind), name, value)

    return change


TURNED = {
    "a knob": (lambda: pruned(), each("keeper", "ratio", 0.25)),
    "a knob that fades": (lambda: pruned(keep="ratio(ratio=0.9, decay=0.8)"), each("keeper", "ratio", 0.5)),
    "another argument": (lambda: pruned("madtp"), each("keeper", "temperature", 3.0)),
    "of one tower": (lambda: pruned(), lambda m: [setattr(one, "ratio", 0.4) for one in keepers(m, "text")]),
    "a dial": (lambda: pruned("madtp"), lambda m: BudgetControl(m).set(2.5)),
    "a reducer": (lambda: pruned(), each("reducer", "normalize", True)),
    "by tower": (
        lambda: pruned(keep={"image": "ratio(ratio=0.5)", "text": "ratio(ratio=0.7)"}),
        lambda m: BudgetControl(m, "image").set(0.3),
    ),
}
HANDMADE = {
    "one depth": (lambda m: setattr(keepers(m)[0], "ratio", 0.2), "at some depths"),
    "a part": (
        lambda m: setattr(m.pruning.towers["image"].pruners["0"], "keeper", nn.Identity()),
        "is Identity and was Ratio",
    ),
    "a depth": (
        lambda m: m.pruning.towers["text"].pruners.pop("1"),
        r"text tower is pruned at \['0'\], and its config says",
    ),
    "out of range": (each("keeper", "ratio", 7.0), r"ratio\(ratio=7.0\)"),
}


@pytest.mark.parametrize(("make", "turn"), TURNED.values(), ids=TURNED)
def test_arguments_set_in_pruners_are_restored(tmp_path, make, turn):
    model = make()
    turn(model)
    again = vp.load(vp.save(model, tmp_path))
    for tower, encoder in model.pruning.towers.items():
        for depth, pruner in encoder.pruners.items():
            assert str(again.pruning.towers[tower].pruners[depth]) == str(pruner)
    assert vp.load(vp.save(again, tmp_path)).pruning.config == again.pruning.config


@pytest.mark.parametrize(("change", "says"), HANDMADE.values(), ids=HANDMADE)
def test_pruners_that_no_config_builds_are_refused(tmp_path, change, says):
    model = pruned()
    change(model)
    with pytest.raises(ValueError, match=says):
        vp.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
