"""What timm, open_clip and transformers read of a model, read of a pruned one."""

from __future__ import annotations

import cases_timm
import open_clip
import pytest
import timm
import timm.optim
import torch
from checks import same
from open_clip.model import get_model_preprocess_cfg, get_model_tokenize_cfg
from test_hosts import make
from timm.data import resolve_model_data_config
from timm.models._features import FeatureGetterNet
from torch import nn

import vltprune as vp

TIMM = ("vit_tiny_patch16_224", "vit_base_patch16_clip_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3")


def named_groups(model, groups):
    """The names of a model's parameters by their weight decay, and by their learning rate's factor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)].removeprefix("host."): (group["weight_decay"], group.get("lr_scale"))
        for group in groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("name", TIMM)
def test_timm_scripts(name):
    dense = timm.create_model(name, num_classes=7, img_size=56 if "14" in name else 64)
    pruned = vp.prune(dense, "random")
    assert resolve_model_data_config(pruned) == resolve_model_data_config(dense)
    assert (pruned.default_cfg, pruned.num_classes) == (dense.default_cfg, 7)
    assert (pruned.num_features, pruned.head_hidden_size) == (dense.num_features, dense.head_hidden_size)
    assert pruned.get_classifier() is dense.head

    decay = {"weight_decay": 0.1}
    for option in ({}, {"layer_decay": 0.75}):
        of_dense = timm.optim.create_optimizer_v2(dense, "adamw", **decay, **option).param_groups
        of_pruned = timm.optim.create_optimizer_v2(pruned, "adamw", **decay, **option).param_groups
        assert named_groups(pruned, of_pruned) == named_groups(dense, of_dense)

    pruned.set_grad_checkpointing()
    assert pruned.grad_checkpointing
    pruned.reset_classifier(3)
    assert pruned(torch.randn(2, *pruned.pretrained_cfg["input_size"][:1], *dense.patch_embed.img_size)).shape == (2, 3)


@pytest.mark.parametrize(
    "name", ["timm: vit: plain", "timm: vit: registers", "timm: eva: rope dinov3", "timm: vit: siglip"]
)
@torch.no_grad()
def test_timm_features(name):
    case = cases_timm.make(name.removeprefix("timm: "), depth=3)
    keep_all, pruned = case.pruned("random", keep="ratio(ratio=1.0)"), case.pruned("random")
    (images,) = case.inputs
    same(keep_all.forward_features(images), case.model.forward_features(images))
    for options in ({}, {"indices": 2, "norm": True}, {"indices": [0, 2], "return_prefix_tokens": True}):
        options |= {"output_fmt": "NLC"}
        want = case.model.forward_intermediates(images, **options)
        same(keep_all.forward_intermediates(images, **options), want)
    extractor = FeatureGetterNet(keep_all, out_indices=[1], norm=False, output_fmt="NLC")
    same(
        extractor(images),
        case.model.forward_intermediates(images, indices=[1], output_fmt="NLC", intermediates_only=True),
    )

    with vp.collect(tokens=True) as traces:
        left = pruned.forward_features(images)
    same(left, case.model.norm(traces[0].output_tokens.x).view(left.shape))
    lengths = [len(t[0]) for t in pruned.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)]
    prefix = case.model.num_prefix_tokens
    assert lengths == [step.lengths[0] - prefix for step in traces[0].layers]
    assert [step.tokens.layout.lengths for step in traces[0].layers] == [step.lengths for step in traces[0].layers]
    with pytest.raises(ValueError, match="write output_fmt='NLC'"):
        pruned.forward_intermediates(images)


@torch.no_grad()
def test_timm_heads():
    case = make("timm: vit: plain")
    pruned, (images,) = case.pruned("random"), case.inputs
    same(pruned.forward_head(pruned.forward_features(images)), pruned(images))
    with pytest.raises(AttributeError, match=r"write pruned\.host\.head ="):
        pruned.head = nn.Linear(32, 5)
    pruned.host.head = nn.Linear(32, 5)
    assert pruned(images).shape == (3, 5)
    pooled = make("timm: vit: avg").pruned("random")
    with pytest.raises(TypeError, match=r"pools within its call: write model\(images\)"):
        pooled.forward_head(pooled.forward_features(images))


def test_steps_keep_no_tokens_unless_asked():
    case = make("timm: vit: plain")
    with vp.collect() as traces:
        case.pruned()(*case.inputs)
    assert all(step.tokens is None for step in traces[0].layers)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, that open_clip calls what it renamed
@pytest.mark.parametrize("name", ["open_clip: clip", "open_clip: custom clip", "open_clip_hf: clip"])
def test_open_clip_training(name):
    case = make(name)
    dense = case.model
    dense.visual.preprocess_cfg = {"size": 32, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    pruned = case.pruned("random")
    assert get_model_preprocess_cfg(pruned) == get_model_preprocess_cfg(dense)
    assert get_model_tokenize_cfg(pruned) == get_model_tokenize_cfg(dense)
    assert pruned.visual.image_size == dense.visual.image_size
    assert {n.replace("host.", "") for n in pruned.no_weight_decay()} == dense.no_weight_decay()
    assert pruned.no_weight_decay() <= {n for n, _ in pruned.named_parameters()}

    def frozen(lock):
        dense.requires_grad_(True)
        lock()
        return {n for n, p in dense.named_parameters() if not p.requires_grad}

    for tower in ("image", "text"):
        want, got = (frozen(getattr(model, f"lock_{tower}_tower")) for model in (dense, pruned))
        assert got == want != set()
    dense.requires_grad_(True)

    pruned.set_grad_checkpointing()
    assert all(tower.adapter.gradient_checkpointing(tower.host) for tower in pruned.pruning.towers.values())
    with pytest.raises(TypeError, match=r"collect\(tokens=True\)"):
        pruned.forward_intermediates(image=case.inputs[0])


def test_open_clip_loss():
    case = make("open_clip: clip")
    pruned = case.pruned("evit").train()
    features = pruned(*case.inputs)
    open_clip.ClipLoss()(*features).backward()
    assert pruned.logit_scale.grad is not None
