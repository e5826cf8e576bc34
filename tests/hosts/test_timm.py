"""timm's VisionTransformer and Eva, option by option."""

from __future__ import annotations

import copy

import checks
import pytest
import timm
import torch
from cases_timm import NAMES, SIZES, make
from checks import same
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import nn

import vltprune as vp

every = pytest.mark.parametrize("name", NAMES)


def into_blocks(tower, images):
    """The dense input of the first block, and the blocks as functions of tokens and of which keys a query sees."""
    x = tower.patch_embed(images)
    if isinstance(tower, VisionTransformer):
        x = tower.norm_pre(tower.patch_drop(tower._pos_embed(x)))
        return x, [lambda x, seen, b=block: b(x, attn_mask=seen[:, None]) for block in tower.blocks]
    x, rope = tower._pos_embed(x)
    ropes = rope if tower.rope_mixed else [rope] * len(tower.blocks)
    calls = zip(tower.blocks, ropes, strict=True)
    return tower.norm_pre(x), [lambda x, seen, b=b, r=r: b(x, rope=r, attn_mask=seen[:, None]) for b, r in calls]


@every
@pytest.mark.parametrize("at", [(0,), None])
def test_dropping_is_hiding(name, at):
    """Among others: tokens are rotated by where they stood, not by where they stand."""
    case = make(name)
    pruned = checks.ragged(case, scorer="self_attention", at=at)
    checks.dropping_is_hiding(pruned, case.inputs, *into_blocks(case.model, *case.inputs))


@every
@torch.no_grad()
def test_pooling_is_the_towers_over_what_is_left(name):
    case = make(name)
    pruned = checks.ragged(case)
    tokens, _ = pruned.encode(*case.inputs)
    for row, x in zip(pruned(*case.inputs), tokens.x.split(tokens.layout.lengths), strict=True):
        checks.same_row(row, case.model.forward_head(case.model.norm(x.unsqueeze(0)))[0])


@pytest.mark.parametrize("name", ["vit: avg", "vit: avg with prefix", "eva: default"])
@torch.no_grad()
def test_averages_weigh_merged_tokens_by_their_size(name):
    case = make(name)
    pruned = case.pruned()
    tokens, _ = pruned.encode(*case.inputs)
    sizes, rows = tokens.size.split(tokens.layout.lengths), tokens.x.split(tokens.layout.lengths)
    prefix = 0 if getattr(case.model, "pool_include_prefix", False) else case.model.num_prefix_tokens
    for out, size, x in zip(pruned(*case.inputs), sizes, rows, strict=True):
        assert size.sum() == 16 + case.model.num_prefix_tokens
        repeated = case.model.norm(x[prefix:].repeat_interleave(size[prefix:], 0))
        same(out, case.model.head(case.model.fc_norm(repeated.mean(0))))


@pytest.mark.parametrize("name", ["vit: plain", "vit: res_post", "eva: swiglu", "eva: post_norm"])
@torch.no_grad()
def test_large_batches(name):
    case, images = make(name), torch.randn(50, 3, 32, 32)  # 850 tokens: more than a tile of rows
    same(case.pruned(keep="ratio(ratio=1.0)")(images), case.model(images))


def scale_branches(block, attention, mlp):
    """What drop path does to a block: its two branches times a number, by way of the last parameters of each."""
    if hasattr(block, "ls1"):
        last = ([block.ls1.gamma], [block.ls2.gamma])
    elif hasattr(block, "gamma_1"):
        last = ([block.gamma_1], [block.gamma_2])
    else:
        last = (block.norm1.parameters(), block.norm2.parameters())
    for parameters, factor in zip(last, (attention, mlp), strict=True):
        for parameter in parameters:
            parameter.mul_(factor)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("name", ["vit: layer_scale", "vit: res_post", "eva: layer_scale", "eva: post_norm"])
@torch.no_grad()
def test_drop_path_draws_once_an_instance(name, keep):
    """Either branch of an instance is gone, or doubled, for all of its tokens."""
    case = make(name, depth=2, drop_path_rate=0.5)  # the first block never drops
    images = torch.randn(1, 3, 32, 32).expand(24, -1, -1, -1)
    pruned = case.pruned("random", keep=f"ratio(ratio={keep})").train()
    assert case.model.blocks[1].drop_path1.drop_prob == 0.5
    got = pruned.encode(images)[0].unpack()[0]

    outcomes = []
    for attention, mlp in [(0, 0), (0, 2), (2, 0), (2, 2)]:
        known = copy.deepcopy(case.model)
        scale_branches(known.blocks[1], attention, mlp)
        config = case.config("random", keep=f"ratio(ratio={keep})")
        outcomes.append(vp.prune(known.eval(), config).encode(images[:1])[0].x)
    distance = (got[:, None] - torch.stack(outcomes)).abs().amax((2, 3)) / torch.stack(outcomes).abs().max()
    assert (distance.amin(1) < 1e-5).all()
    assert len(set(distance.argmin(1).tolist())) == 4


@pytest.mark.parametrize("name", ["vit: plain", "vit: res_post", "vit: qk_norm", "eva: rope", "eva: grouped"])
@pytest.mark.parametrize("drop", [{"attn_drop_rate": 1.0}, {"proj_drop_rate": 1.0}])
def test_dropout_is_the_hosts(name, drop):
    """All of it, so that chance has no say; and in training only."""
    case = make(name, **drop)
    checks.keep_all_is_the_host(case)
    trained = case.pruned(keep="ratio(ratio=1.0)").train()(*case.inputs)
    assert not torch.allclose(trained, case.model.eval()(*case.inputs), atol=1e-2)


@pytest.mark.parametrize("name", ["vit: plain", "vit: res_post", "eva: default", "eva: rope mixed", "eva: post_norm"])
def test_gradient_checkpointing(name):
    case = make(name)
    parts = [block.mlp for block in case.model.blocks]
    checks.recomputing_changes_nothing(case, parts, case.model.set_grad_checkpointing)


def test_rotary_augmentation_is_the_hosts():
    checks.keep_all_is_the_host(make("eva: rope dinov3", rope_jitter_coords=2.0))


def test_patch_drop_of_eva_is_refused_in_training_only():
    case = make("eva: rope", patch_drop_rate=0.5)
    pruned = case.pruned(keep="ratio(ratio=1.0)")
    same(pruned(*case.inputs), case.model(*case.inputs))
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        pruned.train()(*case.inputs)


class Custom(nn.Module):
    pass


def with_custom_attention():
    model = make("vit: plain").model
    model.blocks[1].attn = Custom()
    return model


def with_a_subclass():
    class Mine(Block):
        pass

    return VisionTransformer(**SIZES, block_fn=Mine)


REFUSED = {
    "Linear": lambda: nn.Linear(3, 3),
    "ParallelScalingBlock": lambda: VisionTransformer(**SIZES, block_fn=ParallelScalingBlock),
    "SwinTransformer": lambda: timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2)
    ),
    "DiffAttention": lambda: VisionTransformer(**SIZES, attn_layer="diff"),
    "Custom": with_custom_attention,
    "Mine": with_a_subclass,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind):
    model = REFUSED[kind]()
    with pytest.raises(TypeError, match=r"[Ss]upported") as refusal:
        vp.prune(model, "random")
    text = str(refusal.value)
    assert kind in text
    known = ("VisionTransformer and Eva of timm", "CLIP of open_clip", "BLIP of this library")
    listed = known if kind in ("Linear", "SwinTransformer") else ("Block", "Attention", "ResPostBlock")
    assert all(name in text for name in listed)


def test_a_subclass_of_a_tower_is_not_guessed_at():
    class Mine(VisionTransformer):
        pass

    with pytest.raises(TypeError, match="Mine"):
        vp.prune(Mine(**SIZES), "random")


def test_pooling_without_a_host_is_refused():
    with pytest.raises(ValueError, match="prr"):
        vp.prune(VisionTransformer(**SIZES, global_pool="prr"), "random")


def test_pruning_twice_is_refused():
    pruned = make("vit: plain").pruned()
    with pytest.raises(TypeError, match="pruned already"):
        vp.prune(pruned, "random")
    assert vp.prune(pruned.host, "random").host is pruned.host


@pytest.mark.parametrize("at", [(2,), (0, -3), {"image": (7,)}])
def test_unknown_depths_are_refused(at):
    with pytest.raises(ValueError, match=r"depths 0 \.\. 1"):
        make("vit: plain").pruned(at=at)


def test_unknown_towers_are_refused():
    with pytest.raises(ValueError, match=r"tower 'text'.*image"):
        make("vit: plain").pruned(at={"text": None})


@pytest.mark.parametrize("name", ["vit: no class token", "vit: siglip", "eva: no class token"])
@pytest.mark.parametrize("preset", ["madtp", "evit"])
def test_a_summary_that_is_not_there_is_refused(name, preset):
    with pytest.raises(ValueError, match=r"SUMMARY.*image tower"):
        vp.prune(make(name).model, preset)


def test_depths_that_are_left_alone_stay_whole():
    case = make("vit: plain", depth=3)
    with torch.no_grad(), vp.collect() as traces:
        case.pruned("random", at=(1,))(*case.inputs)
    assert traces[0].lengths == ((17,) * 3, (15,) * 3, (15,) * 3)


def test_attention_classes_are_the_ones_meant():
    """The cases above reach every attention module that the hosts know."""
    made = {type(block.attn) for name in NAMES for block in make(name).model.blocks}
    assert made == {Attention, EvaAttention, AttentionRope}
