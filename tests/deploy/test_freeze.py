"""Fixed counts: what `freeze` makes of counts per instance."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_models import PRESETS, asked, small

import vltprune as vp
from vltprune.deploy.outputs import OutputChange


def adaptive(config):
    return not all(vp.keepers[part.name].fixed for part in config.parts("keep"))


ADAPTIVE = [name for name in PRESETS if adaptive(vp.preset(name))]


def fitted(name, batches, preset="madtp", **parts):
    """A pruned model whose guide is placed among tokens of the batches."""
    parts = {"guide": "codebook(anchors=5)"} | parts if preset == "madtp" else parts
    model = vp.prune(small(name).model, preset, **parts)
    if model.pruning.guide is not None:
        vp.fit_guide(model, batches)
    return model


def kept(model, batches):
    """The number of unprotected tokens behind each pruned block, by tower and depth, of all instances."""
    numbers = {}
    for batch in batches:
        with torch.no_grad(), vp.collect() as traces:
            model(*batch)
        for trace in traces:
            for depth, step in enumerate(trace.layers):
                if step.steps:
                    starts = torch.tensor((0, *step.lengths)).cumsum(0)
                    free = torch.stack([(~step.protected)[a:b].sum() for a, b in itertools.pairwise(starts)])
                    numbers.setdefault((trace.tower, depth), []).append(free)
    return {key: torch.cat(found) for key, found in numbers.items()}


@pytest.mark.parametrize("name", ["vit", "text", "nlvr"])
@pytest.mark.parametrize("quantile", [None, 0.0, 0.75, 1.0])
def test_counts_are_those_that_were_kept(name, quantile):
    batches = [small(name).draw(5), small(name).draw(4)]
    model = fitted(name, batches, reducer="drop")
    fixed = vp.freeze(model, batches, quantile)
    numbers = kept(model, batches)
    assert {(layer.tower, layer.depth) for layer in fixed.layers} == set(numbers)
    for layer in fixed.layers:
        found = numbers[layer.tower, layer.depth].double()
        assert (layer.least, layer.most) == (found.min(), found.max())
        assert layer.mean == pytest.approx(found.mean())
        if quantile is None:
            assert abs(layer.count - layer.mean) <= 0.5
        else:
            assert (found <= layer.count).double().mean() >= quantile
            assert (found < layer.count).double().mean() <= quantile
        assert layer.changed == (found != layer.count).double().mean()
    for (tower, depth), now in kept(fixed.model, batches).items():
        count = next(layer.count for layer in fixed.layers if (layer.tower, layer.depth) == (tower, depth))
        assert now.max() <= count  # and fewer where a text has no more
        if tower == "image":
            assert (now == min(count, now.max())).all()


@pytest.mark.parametrize("preset", ADAPTIVE)
def test_one_instance_keeps_its_tokens(preset):
    """Of one instance the mean is its own count: scorers and guide have come along, and nothing moves."""
    inputs = small("vit").draw(1)
    model = fitted("vit", [small("vit").draw(8)], preset)
    with torch.no_grad():
        for part in model.modules():
            for parameter in part._parameters.values() if isinstance(part, vp.TokenScorer) else ():
                parameter.add_(torch.randn_like(parameter))
    with asked(model, *inputs):
        fixed = vp.freeze(model, [inputs])
    assert fixed.outputs.most < 1e-6
    assert fixed.outputs.agreement == 1
    assert fixed.after.macs == pytest.approx(fixed.before.macs, rel=0.1)  # deciding costs something too
    assert not adaptive(fixed.model.pruning.config)
    assert adaptive(model.pruning.config)
    assert fixed.model.host is model.host


def test_a_fixed_model_is_saved_and_loaded(tmp_path):
    model = vp.create_model("blip_nlvr_tiny_madtp", vision_depth=3, text_depth=3, guide="codebook(anchors=5)")
    inputs = torch.randn(4, 2, 3, 96, 96), torch.randint(4, 57, (4, 12))
    vp.fit_guide(model, [inputs])
    fixed = vp.freeze(model, [inputs])
    loaded = vp.load(vp.save(fixed.model, tmp_path))
    assert loaded.pruning.config == fixed.model.pruning.config
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), fixed.model(*inputs))


def test_what_is_fixed_already_stays():
    batches = [small("nlvr").draw(5)]
    keep = {"image": "threshold", "text": "ratio(ratio=0.6)"}
    fixed = vp.freeze(fitted("nlvr", batches, keep=keep, at=(1, 3)), batches)
    assert {(layer.tower, layer.depth) for layer in fixed.layers} == {("image", 1), ("image", 3)}
    now = fixed.model.pruning.config.keep
    assert now["text"] == vp.Part("ratio", {"ratio": 0.6})
    first, third = (layer.count for layer in fixed.layers)
    assert now["image"] == vp.Part("counts", {"counts": (first, first, first, third)})

    fixed = vp.freeze(fitted("vit", [], "evit"), [small("vit").draw(3)])
    assert fixed.layers == ()
    assert fixed.model.pruning.config == vp.preset("evit")
    assert str(fixed) == "all counts were fixed before: nothing changed"


def test_stages_have_counts_of_their_own():
    batches = [small("vit").draw(6)]
    model = fitted("vit", batches, "algm", at=(0, 2))
    fixed = vp.freeze(model, batches)
    assert [(layer.depth, layer.stage) for layer in fixed.layers] == [(0, 0), (2, 0), (0, 1), (2, 1)]
    assert [stage.keep.name for stage in fixed.model.pruning.config.stages] == ["counts", "counts"]
    assert "image 0 stage 1" in str(fixed)


def test_the_record_is_a_short_table():
    torch.manual_seed(0)
    batches = [small("vit").draw(6)]
    fixed = vp.freeze(fitted("vit", batches), batches)
    lines = str(fixed).splitlines()
    assert lines[0].split() == ["layer", "mean", "least", "most", "fixed", "changed", "for"]
    assert len(lines) == 2 + 4 + 2
    assert lines[-2].startswith("MACs: ") and "than dense; before, " in lines[-2]
    assert "the largest entry is the same for" in lines[-1]
    assert len(repr(fixed)) < 2500  # without the model


def test_outputs_are_compared_by_instance():
    former, now = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.5], [0.0, 1.0]])
    change = OutputChange.between([former, {"a": former}], [now, {"a": now}])
    assert (change.mean, change.most) == (pytest.approx((0.1 + 2**0.5) / 2), pytest.approx(2**0.5))
    assert change.agreement is None  # the second batch has no classes
    assert OutputChange.between([former], [now]).agreement == 0.5
    assert str(OutputChange.between([former], [now[:, :1]])) == "of other shapes, not compared"


def test_what_cannot_be_frozen_is_refused():
    inputs = small("vit").draw(2)
    model = vp.prune(small("vit").model, "attention")
    for quantile in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"quantile={quantile} must lie in 0 .. 1"):
            vp.freeze(model, [inputs], quantile)
    with pytest.raises(ValueError, match="at least one batch"):
        vp.freeze(model, [])
    with pytest.raises(TypeError, match="not pruned"):
        vp.freeze(small("vit").model, [inputs])
    with pytest.raises(ValueError, match=r"selector='sample_cdf' keeps fewer .* prune with selector='top'"):
        vp.freeze(vp.prune(small("vit").model, "ats"), [inputs])

    images, *_ = small("blip").draw(2)
    only_texts = vp.prune(small("blip").model, "attention", at={"text": None})
    with pytest.raises(ValueError, match="none of the batches ran the text tower: give inputs that it reads"):
        vp.freeze(only_texts, [lambda model: model.image_features(images)])


def test_a_tower_that_no_batch_runs_stays():
    images, *_ = small("blip").draw(3)
    fixed = vp.freeze(vp.prune(small("blip").model, "attention"), [lambda model: model.image_features(images)])
    assert {layer.tower for layer in fixed.layers} == {"image"}
    keep = fixed.model.pruning.config.keep
    assert keep["image"].name == "counts" and keep["text"] == vp.preset("attention").keep
    assert "no batch ran the text tower, which stays as it is" in str(fixed)


def test_the_adaptive_model_is_unchanged():
    batches = [small("vit").draw(4)]
    model = fitted("vit", batches).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, hooks = model.pruning.config, [len(module._forward_hooks) for module in model.modules()]
    frozen = vp.freeze(model, batches).model
    assert model.training and frozen.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.pruning.config == config
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with torch.no_grad():
        frozen.pruning.guide.anchors.zero_()
    assert model.pruning.guide.anchors.abs().sum() > 0
