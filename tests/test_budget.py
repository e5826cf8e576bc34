"""Calibration reaches what it says, or says what can be had."""

from __future__ import annotations

import pickle

import pytest
import torch

import vltprune as vp
from vltprune import budget


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(6, 2, 3, 96, 96, generator=generator)
    images[:, :, :, :40] *= 0.1  # some patches matter less
    return images, torch.randint(4, 57, (6, 12), generator=generator)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return vp.create_model("blip_nlvr_tiny")


@pytest.mark.parametrize("keep", ["ratio", "random_ratio(spread=0.1)", "threshold"])
@pytest.mark.parametrize("reduction", [0.5, 0.7])
def test_mean_macs_meet_the_target(dense, inputs, keep, reduction):
    model = vp.prune(dense, "madtp", keep=keep)
    budget.fit_guide(model, [inputs])
    found = vp.calibrate(model, [inputs, inputs], reduction)

    cost = vp.flops.count(model, *inputs)
    assert cost.reduction == pytest.approx(found.reduction, abs=1e-6)
    assert cost.total == pytest.approx((1 - reduction) * cost.dense_total, rel=0.01)
    assert model.pruning.config.keep.args[found.knob] == found.value
    keepers = [module for module in model.modules() if isinstance(module, vp.KeepRatioPredictor)]
    assert {getattr(keeper, found.knob) for keeper in keepers} == {found.value}


def test_inputs_may_be_named(dense, inputs):
    named = dict(zip(("images", "input_ids"), inputs, strict=True))
    by_position, by_name = (vp.prune(dense, "madtp", keep="ratio") for _ in range(2))
    for model, batch in ((by_position, inputs), (by_name, named)):
        torch.manual_seed(0)
        budget.fit_guide(model, [batch])
    assert torch.equal(by_name.pruning.guide.anchors, by_position.pruning.guide.anchors)
    assert vp.calibrate(by_name, [named]) == vp.calibrate(by_position, [inputs])
    assert vp.flops.count(by_name, **named).total == vp.flops.count(by_position, *inputs).total


def test_a_lone_tower_is_calibrated_too():
    model = vp.create_model("vit_tiny_patch16_224_madtp", keep="ratio", guide="codebook(anchors=8)")
    images = torch.randn(2, 3, 224, 224)
    found = vp.calibrate(model, [images], 0.4)
    assert vp.flops.count(model, images).reduction == pytest.approx(0.4, abs=0.006) == found.reduction


def test_a_target_out_of_reach_is_named_and_nothing_changes(dense, inputs):
    model = vp.prune(dense, "madtp", keep="threshold(temperature=2.5)", at={"image": (4,), "text": None})
    tried = []
    with pytest.raises(vp.BudgetError, match=r"reduction=0.9 is out of reach .*: power from .* \(at=") as caught:
        vp.calibrate(model, [inputs], 0.9, progress=lambda value, saved: tried.append(saved))
    assert len(tried) == 13  # both ends and the steps between them; there is nothing to halve
    assert caught.value.nearest.reduction == max(tried)
    again = pickle.loads(pickle.dumps(caught.value))  # as from a process of its own
    assert (str(again), again.nearest) == (str(caught.value), caught.value.nearest)
    assert "nearest" in str(caught.value)
    assert model.pruning.config.keep == vp.Part("threshold", {"temperature": 2.5})
    assert {(m.temperature, m.power) for m in model.modules() if isinstance(m, vp.KeepRatioPredictor)} == {(2.5, 1.0)}


def test_a_target_between_two_counts_is_told_from_one_out_of_reach(dense, inputs):
    model = vp.prune(dense, "madtp", keep="ratio(ratio=0.6)")
    with pytest.raises(
        vp.BudgetError, match=r"leaves 50\.0% .* its counts jump there, and the nearest is .* tolerance="
    ) as caught:
        vp.calibrate(model, [inputs], 0.5, tolerance=1e-9)
    nearest = caught.value.nearest
    assert vp.calibrate(model, [inputs], nearest.reduction, tolerance=1e-9).macs == nearest.macs


@pytest.mark.parametrize(("turn", "turned"), [("power", (2.5, 3.0)), ("temperature", (3.0, 1.0))])
def test_a_budget_turns_what_the_keeper_says(dense, turn, turned):
    model = vp.prune(dense, "madtp", keep=f"threshold(temperature=2.5, turn={turn!r})")
    vp.budget.Dial(model).settle(3.0)
    assert {(m.temperature, m.power) for m in model.modules() if isinstance(m, vp.KeepRatioPredictor)} == {turned}
    assert model.pruning.config.keep.args[turn] == 3.0


def test_an_interrupted_calibration_changes_nothing(dense, inputs):
    model = vp.prune(dense, "madtp", keep="ratio(ratio=0.6)").train()

    def stop(value, reduction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vp.calibrate(model, [inputs], 0.5, progress=stop)
    assert {m.ratio for m in model.modules() if isinstance(m, vp.KeepRatioPredictor)} == {0.6}
    assert model.training
    model.eval()  # and with it the dense model, which other tests have too


def test_bad_requests(dense, inputs):
    model = vp.prune(dense, "madtp")
    for reduction in (0, 1, -0.2, 80):
        with pytest.raises(ValueError, match=f"reduction={reduction} must lie between 0 and 1"):
            vp.calibrate(model, [inputs], reduction)
    with pytest.raises(ValueError, match="at least one batch"):
        vp.calibrate(model, [], 0.5)
    with pytest.raises(ValueError, match=r"keep='count\(count=5\)' has nothing a budget can turn"):
        vp.calibrate(vp.prune(dense, "madtp", keep="count(count=5)"), [inputs], 0.5)
    with pytest.raises(TypeError, match="not pruned"):
        vp.calibrate(dense, [inputs], 0.5)


class TestFitGuide:
    def test_anchors_are_placed_among_tokens_of_both_towers(self, dense, inputs):
        model = vp.prune(dense, "madtp", guide="codebook(anchors=10)")
        before = model.pruning.guide.anchors.detach().clone()
        budget.fit_guide(model, [inputs], seed=1)
        anchors = model.pruning.guide.anchors.detach()
        assert not torch.equal(anchors, before)

        with torch.no_grad(), vp.collect() as traces:
            model(*inputs)
        for trace in traces:
            guidance = trace.steps[0].guidance
            closest = torch.cdist(anchors, guidance.mapped.x[guidance.mapped.free]).min(1).values
            assert closest.min() < torch.cdist(before, guidance.mapped.x).min()
        assert not model.pruning.guide.is_untrained

    def test_it_is_the_same_for_the_same_seed(self, dense, inputs):
        fitted = []
        for _ in range(2):
            model = vp.prune(dense, "madtp", guide="codebook(anchors=10)", keep="ratio")
            budget.fit_guide(model, [inputs], seed=5)
            fitted.append(model.pruning.guide.anchors.detach())
        assert torch.equal(*fitted)

    def test_it_silences_the_warning_of_noise(self, dense, inputs):
        model = vp.prune(dense, "madtp")
        with pytest.warns(vp.UntrainedGuideWarning, match="anchors are untrained noise"):
            model(*inputs)
        budget.fit_guide(model, [inputs])
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(*inputs)

    def test_training_does_not_warn(self, dense, inputs):
        import warnings

        model = vp.prune(dense, "madtp").train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(*inputs)
        model.eval()

    def test_bad_requests(self, dense, inputs):
        with pytest.raises(ValueError, match="no guide to fit"):
            budget.fit_guide(vp.prune(dense, "evit"), [inputs])
        with pytest.raises(ValueError, match="at least one batch"):
            budget.fit_guide(vp.prune(dense, "madtp"), [])
        with pytest.raises(ValueError, match="4000 anchors need at least as many"):
            budget.fit_guide(vp.prune(dense, "madtp", guide="codebook(anchors=4000)"), [inputs], points=1000)


def test_what_is_saved_is_a_share_of_the_dense_macs_of_the_same_run(monkeypatch):
    """A decoder says more words, and the dense one with it, the fewer tokens it sees."""
    model = vp.create_model("blip_nlvr_tiny", pruning="random")

    def measured(model, meter, dial, batches):
        dense = 300 - 200 * dial.value
        return budget.Calibration(dial.knob.name, dial.value, dense * (0.3 + 0.7 * dial.value), dense)

    monkeypatch.setattr("vltprune.budget._measured", measured)
    assert vp.calibrate(model, [()], 0.35).reduction == pytest.approx(0.35, abs=0.0065)
