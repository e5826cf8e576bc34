"""One block written out by hand, what traces hold, and when an untrained guide warns."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from small_models import NAMES, SCORERS, asked, guide_for, images, scrambled, small
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import vltprune as vp
from vltprune import BlockSpec, PruneConfig, Pruner
from vltprune.pruning import block_attention

FUSE = PruneConfig(scorer="cls_attention", keep="ratio(ratio=0.5)", reducer="fuse")


def traced(model, *inputs):
    with torch.no_grad(), vp.collect() as traces:
        out = model(*inputs)
    return out, traces


@torch.no_grad()
def test_one_block_by_hand():
    """Attention, then the fused tokens of the residual stream, then the MLP: the whole method on one image."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        dense = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    block, pixels = scrambled(dense).blocks[0], images(1)
    tokens, _ = vp.prune(dense, FUSE).encode(pixels)

    x = dense._pos_embed(dense.patch_embed(pixels))[0]
    q, k, v = block.attn.qkv(block.norm1(x)).view(17, 3, 2, 16).permute(1, 2, 0, 3)
    probabilities = (q @ k.transpose(1, 2) * 16**-0.5).softmax(-1)
    context = probabilities @ v
    share = context.norm(dim=-1) / context.norm(dim=-1).sum(0)
    scores = (probabilities[:, 0] * share).sum(0)
    x = x + block.attn.proj(context.transpose(0, 1).flatten(1))

    order = (scores[1:].argsort(descending=True) + 1).tolist()
    best, rest = order[:8], sorted(order[8:])
    x[rest[-1]] = (scores[rest] / scores[rest].sum()) @ x[rest]
    stay = [0, *sorted([*best, rest[-1]])]
    x = x[stay] + block.mlp(block.norm2(x[stay]))
    assert tokens.position.tolist() == stay
    assert tokens.size.tolist() == [8 if place == rest[-1] else 1 for place in stay]
    assert_close(tokens.x, x, rtol=1e-5, atol=1e-5)


# ---- traces


def test_traces_come_tower_by_tower_to_every_collector():
    model, inputs = vp.prune(small("nlvr").model, FUSE), small("nlvr").draw(2)
    with torch.no_grad(), vp.collect() as outer:
        model(*inputs)
        with vp.collect() as inner:
            model(*inputs)
        model.visual(inputs[0].flatten(0, 1))
    assert [trace.tower for trace in inner] == ["image", "text"]
    assert [trace.tower for trace in outer] == ["image", "text", "image", "text", "image"]
    assert outer[0].encoder is model.pruning.towers["image"]
    assert outer[0].input_tokens.layout.lengths == (17,) * 4


def test_no_collector_survives_its_block():
    model = vp.prune(small("vit").model, FUSE)
    with pytest.raises(ValueError, match="images must be"), vp.collect() as traces:
        model(torch.zeros(1, 1, 32, 32))
    _, after = traced(model, images(1))
    assert traces == []
    assert len(after) == 1


def test_provenance_follows_every_token_through_merges_and_drops():
    """Where a marker put on one original token shows up among those that leave a block, there its owner is.

    Where a token is shared by several, its owner is one of them.
    """
    for reducer in vp.reducers.names():
        _, (trace,) = traced(vp.prune(small("vit").model, FUSE, reducer=reducer), images(3))
        marks, shared = torch.eye(trace.input_tokens.layout.total, dtype=torch.float64), False
        for depth, step in enumerate(trace.layers):
            for reduction in step.reductions:
                marks = reduction.values(marks)
            owners = trace.provenance(depth)
            gone = marks.abs().sum(0) == 0
            assert torch.equal(owners < 0, gone)
            if any(reduction.terms is not None for reduction in step.reductions):
                shared = True
            assert marks[owners[~gone], (~gone).nonzero().flatten()].all()
            assert shared or torch.equal(marks.abs().argmax(0)[~gone], owners[~gone])


def test_alignment_needs_a_guide():
    _, (trace,) = traced(vp.prune(small("vit").model, FUSE), images(1))
    with pytest.raises(LookupError, match="image tower has no guide at any depth: prune it with guide='codebook'"):
        trace.aligned  # noqa: B018
    model = vp.prune(small("vit").model, FUSE.replace(guide="codebook(anchors=6)", at=(1, 3)))
    _, (trace,) = traced(model, images(3))
    assert [step.guidance is None for step in trace.layers] == [True, False, True, False]
    assert_close(trace.aligned, trace.layers[1].guidance.pooled + trace.layers[3].guidance.pooled)


def test_a_tower_that_is_pruned_nowhere_is_aligned_all_the_same(monkeypatch):
    blip = small("blip")
    model = vp.prune(blip.model, FUSE, guide="codebook(anchors=6)", at={"image": (1,)})
    inputs = blip.draw(3)
    with vp.collect() as traces:
        model(*inputs)
    image, text = traces
    assert text.lengths == (text.input_tokens.layout.lengths,) * len(text.layers)
    assert_close(text.aligned, torch.stack([step.guidance.pooled for step in text.layers]).sum(0))
    assert image.aligned.shape == text.aligned.shape
    seen = []
    bind = model.pruning.guide.bind

    def bound(tower):
        guide = bind(tower)
        return replace(guide, relate=lambda tokens: seen.append(tower) or guide(tokens))

    monkeypatch.setattr(model.pruning.guide, "bind", bound)
    model(*inputs)  # nobody collects
    assert seen == ["image"]


# ---- building


def test_attention_computes_what_the_parts_need_and_no_more(monkeypatch):
    needs = []
    plain = block_attention.attend_with_stats
    monkeypatch.setattr(block_attention, "attend_with_stats", lambda *a, **k: needs.append(a[5]) or plain(*a, **k))
    for scorer in SCORERS:
        model = vp.prune(small("vit").model, FUSE.replace(scorer=scorer, guide=guide_for(scorer), at=(1,)))
        inputs = images(1)
        with asked(model, inputs):
            traced(model, inputs)
        assert needs.pop() == model.pruners_at(1)[0].scorer.needs
        assert needs == []


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_summary_that_is_not_there_is_refused_by_both_names(scorer):
    spec = BlockSpec("sound", 0, 4, 32, 2, has_summary=False, has_query=True)
    config = FUSE.replace(scorer=scorer, guide="codebook")
    if not vp.scorers[scorer](spec).needs.of_summary:
        assert Pruner.build(config, spec).needs == vp.scorers[scorer](spec).needs
        return
    with pytest.raises(ValueError, match=rf"scorer='{scorer}' reads .* the sound tower has none: write scorer="):
        Pruner.build(config, spec)


@pytest.mark.parametrize("modality", [None, "text"])
def test_tokens_of_a_modality_that_is_not_there_are_refused_by_both_names(modality):
    spec = BlockSpec("sound", 0, 4, 32, 2, has_summary=True)
    scorer = "random" if modality else "text_attention"
    config = FUSE.replace(scorer=scorer, modality=modality)
    name = f"modality={modality!r} prunes" if modality else "scorer='text_attention' reads"
    with pytest.raises(ValueError, match=rf"{name} .* the sound tower has tokens of one modality: write {name[:8]}"):
        Pruner.build(config, spec)
    assert Pruner.build(config, replace(spec, modalities=("text", "image"))).modality == modality


def test_the_last_token_stays_where_nothing_is_protected():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "class_token": False}
    dense = scrambled(VisionTransformer(**sizes, global_pool="avg", num_classes=5))
    out, (trace,) = traced(vp.prune(dense, "random", keep="count(count=0)"), images(2))
    assert trace.lengths == ((1, 1),) * 3
    assert out.isfinite().all()


def test_parts_hold_their_own_spec():
    model = vp.prune(small("nlvr").model, FUSE, at={"image": (1, 2), "text": (0.75,)})
    specs = {t: [p.scorer.spec for p in e.pruners.values()] for t, e in model.pruning.towers.items()}
    assert [(s.tower, s.depth, s.depths, s.before) for s in specs["image"]] == [("image", 1, 4, 0), ("image", 2, 4, 1)]
    assert [(s.tower, s.depth, s.depths, s.before) for s in specs["text"]] == [("text", 3, 4, 0)]


# ---- noise


@pytest.mark.filterwarnings("error::vltprune.UntrainedGuideWarning")
def test_an_untrained_guide_warns_until_it_is_trained():
    x = images(2)

    def make(**parts):
        return vp.prune(small("vit").model, "madtp", **{"guide": "codebook(anchors=6)", **parts})

    with pytest.warns(
        vp.UntrainedGuideWarning, match=r"image tower .* untrained noise: load trained weights, train it, or"
    ):
        make()(x)
    make(at=())(x)  # nothing is pruned by it

    fitted = make()
    vp.fit_guide(fitted, [x])
    fitted(x)

    loaded = make()
    loaded.pruning.guide.load_state_dict(fitted.pruning.guide.state_dict())
    loaded(x)

    trained = make()
    optimizer = torch.optim.SGD([trained.pruning.guide.anchors], 1.0)
    trained.train()
    with vp.collect() as traces:
        trained(x)
    traces[0].aligned.square().sum().backward()
    small("vit").model.zero_grad()
    optimizer.step()
    trained.eval()
    trained(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_nobody_holds_is_gone_at_once(name):
    """Also its weights, which Python would not hurry to look for: it counts objects, and not what they hold."""
    model, inputs = (
        vp.prune(copy.deepcopy(small(name).model), "madtp", guide="codebook(anchors=5)"),
        small(name).draw(2),
    )
    vp.fit_guide(model, [inputs])
    vp.calibrate(model, [inputs], 0.3, tolerance=0.3)
    vp.count_macs(model, *inputs)
    out = model.train()(*inputs)
    getattr(out, "x", out).sum().backward()
    held = [weakref.ref(part) for part in (model, model.host, *model.pruning.towers.values())]
    gc.disable()
    try:
        del model, out
        assert [part() for part in held] == [None] * len(held)
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_tower_has_a_record_of_its_own(copied):
    model = vp.prune(copy.deepcopy(small("vit").model), "madtp")
    duplicate = copied(model)
    record = duplicate.pruning
    assert record.towers == {"image": duplicate} and record.host is duplicate.host and record.guide is duplicate.guide
    assert model.pruning.towers == {"image": model} and model.host is not duplicate.host
    assert record.config == model.pruning.config
    tower = vp.prune(copy.deepcopy(small("blip").model), "madtp").pruning.towers["image"]
    assert not hasattr(tower, "pruning")
