"""`prune` with a cost: the guide is placed and the budget set in one call."""

from __future__ import annotations

import pytest
import torch
from small_models import small

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
    with pytest.raises(ValueError, match=r"such as reduction=0.5"):
        vp.prune(dense, "evit", data=[small("nlvr").draw(2)])
    with pytest.raises(vp.BudgetError, match="out of reach"):
        vp.prune(
            dense, "evit", keep="ratio", at={"image": (3,), "text": None}, reduction=0.9, data=[small("nlvr").draw(2)]
        )
