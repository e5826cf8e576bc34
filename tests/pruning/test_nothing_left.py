"""Counts of zero: where a tower answers with unprotected tokens, one of each instance stays, entirely in soft training too."""

from __future__ import annotations

import open_clip
import pytest
import torch
import transformers
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as ClipVision
from small_models import images, scrambled, small, soften
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import vltprune as vp

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def vit(**options):
    return VisionTransformer(**{**SIZES, **options})


def clip_vision(**options):
    return ClipVision(image_size=32, patch_size=8, width=32, layers=3, heads=2, mlp_ratio=4, output_dim=8, **options)


def exchanged(pool):
    """Pruned with one pooling, called with another."""
    model = vp.prune(scrambled(vit()), "random", keep="ratio(ratio=0.0)", reducer="drop")
    model.host.reset_classifier(5, pool)
    return model


def siglip(kind="Siglip"):
    config = getattr(transformers, f"{kind}VisionConfig")(**VISION, image_size=32, patch_size=8)
    return getattr(transformers, f"{kind}VisionModel")(config)


def timm_in_open_clip():
    tower = TimmModel("test_vit", 8, 32, pool="avg", proj="linear")
    tower.set_input_size(32)
    return tower


# what pools unprotected tokens, all of them answering with a tensor [batch, features]
POOLS = {
    "avg": lambda: vit(global_pool="avg"),
    "max": lambda: vit(global_pool="max"),
    "avgmax": lambda: vit(global_pool="avgmax", reg_tokens=2),
    "map": lambda: vit(global_pool="map"),
    "avg, no class token": lambda: vit(global_pool="avg", class_token=False, reg_tokens=2),
    "siglip": lambda: vit(global_pool="map", class_token=False),
    "eva": lambda: Eva(**SIZES, use_rot_pos_emb=True, global_pool="avg"),
    "eva max": lambda: Eva(**SIZES, global_pool="max"),
    "open_clip": lambda: clip_vision(pool_type="avg"),
    "open_clip, norm behind": lambda: clip_vision(pool_type="avg", final_ln_after_pool=True),
    "timm in open_clip": timm_in_open_clip,
    "siglip of transformers": siglip,
}
# the rest answers with tokens that are protected, or with all that are left
OTHERS = {
    "token": lambda: vit(),
    "all": lambda: vit(global_pool=""),
    "avg with prefix": lambda: vit(global_pool="avg", pool_include_prefix=True),
    "map with prefix": lambda: vit(global_pool="map", pool_include_prefix=True),
    "open_clip token": lambda: clip_vision(pool_type="tok"),
}


def answer(out):
    return out.pooler_output if hasattr(out, "pooler_output") else out


@pytest.mark.parametrize("keep", ["ratio(ratio=0.0)", "count(count=0)"])
@pytest.mark.parametrize("name", [*POOLS, *OTHERS])
@torch.no_grad()
def test_one_token_stays_where_the_answer_needs_it(name, keep):
    dense = {**POOLS, **OTHERS}[name]().eval()
    model = vp.prune(dense, "random", keep=keep, reducer="drop")
    with vp.collect() as traces:
        out = answer(model(images(3)))
    assert out.isfinite().all()
    (trace,) = traces
    free = [int((~row).sum()) for row in trace.layers[-1].protected.split(trace.lengths[-1])]
    assert free == [int(name in POOLS)] * 3


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
@torch.no_grad()
def test_pooling_may_be_exchanged_after_pruning(pool):
    model = exchanged(pool)
    assert model(images(2)).isfinite().all()
    model.host.reset_classifier(5, "token")
    with vp.collect() as traces:
        model(images(2))
    assert traces[0].lengths[-1] == (1, 1)


SOFT = {name: POOLS[name] for name in POOLS if "max" not in name}


@pytest.mark.parametrize("name", SOFT)
def test_soft_training_that_takes_all_but_one_token_is_finite(name):
    """Thresholds that nothing reaches: the token that stays is there entirely, and answers as it does in evaluation."""
    dense = scrambled(SOFT[name]())
    model = soften(vp.prune(dense, "random", keep="learned(threshold=9.0)", reducer="drop"), 0.01)
    for module in model.modules():
        if "BatchNorm" in type(module).__name__ or "Drop" in type(module).__name__:
            module.eval()
    with vp.collect() as traces:
        out = answer(model(images(3)))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    left = traces[0].output_tokens
    assert left.keep_prob.tolist() == [1.0] * left.layout.total
    assert_close(traces[0].layers[-1].expected, left.layout.sizes.double())


@pytest.mark.parametrize("soft_temperature", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("keep", ["learned(threshold=0.0)", "threshold(temperature=20.0)"])
def test_pools_weigh_what_is_there_in_part(keep, soft_temperature):
    """What is there in so small a part that it might as well be gone counts as if gone, in each pooling that takes parts."""
    for make in SOFT.values():
        model = vp.prune(scrambled(make()), "madtp", scorer="alignment", guide="codebook(anchors=5)", keep=keep)
        pixels = images(2)
        out = answer(soften(model, soft_temperature)(pixels))
        assert out.isfinite().all()
        tokens, block_inputs = model.encode(pixels)
        assert tokens.keep_prob is not None
        gone = tokens.free & (tokens.layout.slot % 2 == 1)
        faint, kept = tokens.with_keep_prob(torch.where(gone, 1e-30, 1.0)), tokens.select(~gone)
        faint, kept = (answer(model.adapter.head(model.host, part, block_inputs)) for part in (faint, kept))
        assert_close(faint, kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (lambda: vit(global_pool="max"), "global_pool='max' cannot weigh tokens"),
        (lambda: vit(global_pool="avgmax"), "global_pool='avgmax' cannot weigh tokens"),
        (lambda: clip_vision(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2), "attention pool"),
    ],
)
def test_a_pool_that_cannot_weigh_tokens_is_refused(dense, message):
    model = vp.prune(scrambled(dense()), "random", keep="learned")
    model(images(2))
    with pytest.raises(ValueError, match=message):
        soften(model, 0.5)(images(2))


def test_a_token_whose_parts_are_all_lost_gives_no_nan():
    """Keep probabilities underflow, of all tokens alike, where many depths in a row take nearly all of each."""
    tokens = vp.PackedTokens.pack(torch.randn(2, 3, 4)).with_keep_prob(torch.zeros(6))
    assert tokens.bias.softmax(0).isfinite().all()


def test_transformers_blip_refuses_to_hand_on_parts():
    config = transformers.BlipConfig(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config={**VISION, "vocab_size": 40, "encoder_hidden_size": 32, "max_position_embeddings": 16},
    )
    ids = torch.randint(3, 40, (2, 6))
    retrieval = transformers.BlipForImageTextRetrieval(config)
    for at in (None, {"text": None}):
        answers = vp.prune(transformers.BlipForQuestionAnswering(config), "random", keep="learned", **_at(at))
        with pytest.raises(ValueError, match=r"transformers' BLIP cannot weigh tokens.*use this library's Blip"):
            soften(answers, 0.5)(pixel_values=images(2), input_ids=ids, labels=ids)
    soft = soften(vp.prune(retrieval, "random", keep="learned"), 0.5)
    with pytest.raises(ValueError, match="transformers' BLIP cannot weigh tokens"):
        soft(pixel_values=images(2), input_ids=ids)
    words = vp.prune(retrieval, "random", keep="learned", at={"text": (1,)})
    assert soften(words, 0.5)(pixel_values=images(2), input_ids=ids).itm_score.isfinite().all()  # reads the first alone


def _at(at):
    return {} if at is None else {"at": at}


def test_the_smallest_clip_of_open_clip_counts_to_zero():
    config = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16, "pool_type": "avg"}
    text = {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 3}
    model = vp.prune(open_clip.CLIP(8, config, text).eval(), "random", keep="count(count=0)", reducer="drop")
    out = model(images(2), torch.randint(1, 40, (2, 12)))
    assert all(part.isfinite().all() for part in out[:2])


def test_a_tower_with_a_summary_may_be_left_with_nothing_else():
    model = vp.prune(small("vit").model, "random", keep="count(count=0)", reducer="drop")
    with torch.no_grad(), vp.collect() as traces:
        assert model(images(2)).isfinite().all()
    assert traces[0].lengths[-1] == (1, 1)
