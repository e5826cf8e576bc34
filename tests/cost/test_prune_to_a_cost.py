"""`prune` with a cost: the guide is placed and the budget set in one call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import PRESETS, asked, small

import vltprune as vp


@pytest.mark.parametrize("preset", ["madtp", "evit"])
def test_one_call_does_what_three_do(preset):
    dense, batches = small("nlvr").model, [small("nlvr").draw(5), small("nlvr").draw(4)]
    parts = {"guide": "codebook(anchors=5)"} if preset == "madtp" else {"keep": "distortion"}
    torch.manual_seed(0)
    at_once = vp.prune(dense, preset, reduction=0.3, data=iter(batches), **parts)
    torch.manual_seed(0)
    by_steps = vp.prune(dense, preset, **parts)
    if preset == "madtp":
        vp.fit_guide(by_steps, batches)
        assert torch.equal(at_once.pruning.guide.anchors, by_steps.pruning.guide.anchors)
    vp.calibrate(by_steps, batches, 0.3)
    assert at_once.pruning.config == by_steps.pruning.config
    assert vp.measure(at_once, batches).reduction == pytest.approx(0.3, abs=0.01)


def test_each_tower_may_have_a_cost():
    dense, batches = small("nlvr").model, [small("nlvr").draw(6)]
    model = vp.prune(
        dense, "random", scorer="self_attention", keep="distortion", reduction={"image": 0.4}, data=batches
    )
    assert vp.measure(model, batches, tower="image").towers["image"].reduction == pytest.approx(0.4, abs=0.01)


def test_a_cost_and_inputs_belong_together():
    dense = small("nlvr").model
    with pytest.raises(ValueError, match=r"reduction=0.5 is set on inputs.*data=\[images.*vltprune.calibrate"):
        vp.prune(dense, "evit", reduction=0.5)
    with pytest.raises(ValueError, match=r"as in vltprune.prune\(model, .attention., reduction=0.5, data="):
        vp.prune(dense, "evit", data=[small("nlvr").draw(2)])
    with pytest.raises(vp.BudgetError, match="out of reach"):
        vp.prune(
            dense, "evit", keep="ratio", at={"image": (3,), "text": None}, reduction=0.9, data=[small("nlvr").draw(2)]
        )


CALL = r"write vltprune\.prune\(model, 'attention', reduction=0\.5, data=\[images, \.\.\.\]\)"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (
            {"reduction": 0.5},
            TypeError,
            rf"prune needs a preset, one of (\w+, )*evit, (\w+, )+or a PruneConfig: {CALL}",
        ),
        ({"data": []}, TypeError, f"prune needs a preset.*: {CALL}"),
        ({}, TypeError, f"prune needs a preset.*: {CALL}"),
        ({"scorer": "random"}, TypeError, f"prune needs a preset.*: {CALL}"),
        ({"preset": "evit", "reduction": 0.5}, ValueError, f"reduction=0.5 .*: {CALL}"),
        ({"preset": "evit", "reducton": 0.5}, TypeError, f"no argument 'reducton'; did you mean reduction.*: {CALL}"),
        ({"preset": "evit", "redution": 0.5}, TypeError, f"'redution'; did you mean reduction.*: {CALL}"),
        ({"preset": "evit", "dta": []}, TypeError, f"no argument 'dta'; did you mean data.*: {CALL}"),
        ({"preset": "evit", "keeper": "ratio"}, TypeError, "no argument 'keeper'; did you mean keep"),
        ({"config": "evit"}, TypeError, f"no argument 'config'.*: {CALL}"),
        ({"preset": "evit", "batches": []}, TypeError, f"no argument 'batches'.*: {CALL}"),
    ],
)
def test_what_is_missing_or_misspelled_is_answered_with_the_call_to_write(arguments, error, says):
    with pytest.raises(error, match=says):
        vp.prune(small("vit").model, **arguments)


def test_a_reduction_is_refused_before_the_guide_is_placed():
    def run(model):
        raise AssertionError("no batch is run")

    with pytest.raises(ValueError, match=r"reduction=1\.5 must lie between 0 and 1"):
        vp.prune(small("nlvr").model, "madtp", reduction=1.5, data=[run])


# each on an image tower, and those of a guide on both towers of a model, which share it
CODEBOOKS = [name for name in PRESETS if "codebook" in vp.preset(name).describe("guide")]
ON_MODELS = [("nlvr" if name in CODEBOOKS else "vit", name) for name in PRESETS]
ON_MODELS += [("text", "evit"), ("blip", "attention")]


@pytest.mark.parametrize(("model", "name"), ON_MODELS)
def test_every_preset_can_be_brought_to_a_cost(model, name):
    dense, inputs, config = small(model).model, small(model).draw(6), vp.preset(name)
    if config.place == "output":  # which saves nothing inside the tower, but behind a block of it
        config = config.with_stages([dataclasses.replace(config.stages[0], place="block", at=0.25), *config.then])
    parts = {"guide": "codebook(anchors=5)"} if name in CODEBOOKS else {}
    if vp.keepers[config.keep.name].knob is None:
        with pytest.raises(ValueError, match="has no knob that a budget can set"):
            vp.prune(dense, config, reduction=0.3, data=[inputs])
        parts["keep"] = "ratio"
    if name == "trips":  # whose two blocks save less of a tower of four
        config = config.replace(at={"image": (0, 1)})

    def call(model):
        with asked(model, inputs[0]):
            model(*inputs)

    pruned = vp.prune(dense, config, reduction=0.3, data=[call], tolerance=0.1, **parts)
    assert vp.measure(pruned, [call]).reduction == pytest.approx(0.3, abs=0.08)
