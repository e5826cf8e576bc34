"""Calibration reaches what it says, or says what can be had."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from small_models import small

import vltprune as vp
from vltprune.cost.budget_control import BudgetControl, keepers_of
from vltprune.cost.macs import CostMeter
from vltprune.cost.savings import Calibration


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 2, 3, 96, 96, generator=generator)
    images[:, :, :, :40] *= 0.1  # some patches matter less
    return images, torch.randint(4, 57, (2, 12), generator=generator)


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return vp.create_model("blip_nlvr_tiny", vision_depth=4, text_depth=3)


@pytest.fixture(scope="module")
def clip():
    """Two towers that do not look at each other, and inputs for them."""
    torch.manual_seed(0)
    vision = {"image_size": 64, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
    text = {"context_length": 40, "vocab_size": 60, "width": 32, "heads": 2, "layers": 3}
    ids = torch.zeros(4, 40, dtype=torch.int64)
    for row, length in zip(ids, (20, 30, 24, 16), strict=True):
        row[:length] = torch.randint(1, 50, (length,))
        row[length - 1] = 59
    return vp.create_model("clip", embed_dim=16, vision_cfg=vision, text_cfg=text), (torch.randn(4, 3, 64, 64), ids)


@pytest.mark.parametrize(
    ("keep", "reduction"), [("ratio", 0.5), ("ratio", 0.7), ("random_ratio(half_width=0.1)", 0.5), ("threshold", 0.7)]
)
def test_mean_macs_meet_the_target(dense, inputs, keep, reduction):
    model = vp.prune(dense, "madtp", keep=keep)
    vp.fit_guide(model, [inputs])
    one_by_one = list(zip(*(part.split(1) for part in inputs), strict=True))
    found = vp.calibrate(model, one_by_one, reduction)

    cost = vp.count_macs(model, *inputs)
    assert cost.reduction == pytest.approx(found.reduction, abs=1e-6)
    assert cost.total == pytest.approx((1 - reduction) * cost.dense_total, rel=0.01)
    assert model.pruning.config.keep.args[found.knob] == found.value
    keepers = [module for module in model.modules() if isinstance(module, vp.KeepRatioPredictor)]
    assert {getattr(keeper, found.knob) for keeper in keepers} == {found.value}


def test_inputs_may_be_named():
    dense, inputs = small("nlvr").model, small("nlvr").draw(3)
    named = dict(zip(("images", "input_ids", "attention_mask"), inputs, strict=True))
    by_position, by_name = (vp.prune(dense, "madtp", keep="ratio", guide="codebook(anchors=5)") for _ in range(2))
    for model, batch in ((by_position, inputs), (by_name, named)):
        torch.manual_seed(0)
        vp.fit_guide(model, [batch])
    assert torch.equal(by_name.pruning.guide.anchors, by_position.pruning.guide.anchors)
    assert vp.calibrate(by_name, [named], tolerance=0.1) == vp.calibrate(by_position, [inputs], tolerance=0.1)
    assert vp.count_macs(by_name, **named).total == vp.count_macs(by_position, *inputs).total


def test_a_lone_tower_is_calibrated_too():
    model = vp.create_model("vit_tiny_patch16_224_madtp", keep="ratio", guide="codebook(anchors=8)")
    images = torch.randn(2, 3, 224, 224)
    found = vp.calibrate(model, [images], 0.4)
    assert vp.count_macs(model, images).reduction == pytest.approx(0.4, abs=0.006) == found.reduction


def test_a_target_out_of_reach_is_named_and_nothing_changes(dense, inputs):
    model = vp.prune(dense, "madtp", keep="threshold(temperature=2.5)", at={"image": (2,), "text": None})
    runs = []

    def run(model):
        runs.append(model(*inputs))

    with pytest.raises(vp.BudgetError, match=r"reduction=0.9 is out of reach .*: power from .* \(at=") as caught:
        vp.calibrate(model, [run], 0.9)
    assert len(runs) == 13  # both ends and the steps between them; there is nothing to halve
    assert caught.value.nearest.reduction == max(
        vp.measure(model, [inputs], value).reduction for value in (1 / 64, 64.0)
    )
    model = vp.prune(dense, "madtp", keep="threshold(temperature=2.5)", at={"image": (2,), "text": None})
    with pytest.raises(vp.BudgetError) as caught:
        vp.calibrate(model, [inputs], 0.9)
    again = pickle.loads(pickle.dumps(caught.value))  # as from a process of its own
    assert (str(again), again.nearest) == (str(caught.value), caught.value.nearest)
    assert "nearest" in str(caught.value)
    assert model.pruning.config.keep == vp.Part("threshold", {"temperature": 2.5})
    assert {(m.temperature, m.power) for m in model.modules() if isinstance(m, vp.KeepRatioPredictor)} == {(2.5, 1.0)}


def test_a_target_between_two_counts_is_told_from_one_out_of_reach():
    inputs = small("nlvr").draw(3)
    model = vp.prune(small("nlvr").model, "random", keep="ratio(ratio=0.6)")
    with pytest.raises(
        vp.BudgetError, match=r"leaves 50\.0 % .* its counts jump there, and the nearest is .* tolerance="
    ) as caught:
        vp.calibrate(model, [inputs], 0.5, tolerance=1e-9)
    nearest = caught.value.nearest
    assert vp.calibrate(model, [inputs], nearest.reduction, tolerance=1e-9).macs == nearest.macs


@pytest.mark.parametrize(("turn", "turned"), [("power", (2.5, 3.0)), ("temperature", (3.0, 1.0))])
def test_a_budget_sets_the_knob_that_the_keeper_declares(dense, turn, turned):
    model = vp.prune(dense, "madtp", keep=f"threshold(temperature=2.5, knob={turn!r})")
    BudgetControl(model).commit(3.0)
    assert {(m.temperature, m.power) for m in model.modules() if isinstance(m, vp.KeepRatioPredictor)} == {turned}
    assert model.pruning.config.keep.args[turn] == 3.0


def test_an_interrupted_calibration_changes_nothing(dense, inputs):
    model = vp.prune(dense, "madtp", keep="ratio(ratio=0.6)").train()

    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vp.calibrate(model, [inputs, stop], 0.5)
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
    with pytest.raises(
        ValueError, match=r"keep='count\(count=5\)' has no knob .*: use one of .*'distortion', .*'ratio'.*'threshold'"
    ):
        vp.calibrate(vp.prune(dense, "madtp", keep="count(count=5)"), [inputs], 0.5)
    with pytest.raises(TypeError, match="not pruned"):
        vp.calibrate(dense, [inputs], 0.5)


def test_a_guide_is_fitted_to_tokens_from_everywhere(dense, monkeypatch):
    """Drawn at random, and not the first ones: as many of each tower, spread over a batch."""
    model, held = vp.prune(dense, "madtp", at={"image": (0,), "text": (0,)}), []
    monkeypatch.setattr(model.pruning.guide, "fit", lambda mapped, seed=0: held.append(mapped))
    ids = torch.randint(4, 57, (8, 12))
    batches = [(torch.randn(8, 2, 3, 96, 96), ids, torch.ones_like(ids)) for _ in range(3)]
    met = []
    for batch in batches:
        with torch.no_grad(), vp.collect() as traces:
            model(*batch)
        met.append([trace.layers[0].guidance.mapped for trace in traces])
    vp.fit_guide(model, batches, points=300)
    (points,) = held
    assert len(points) == 300
    for tower, part in enumerate(points.split(150)):
        shares = []
        for one in met:
            tokens = one[tower].x[one[tower].free]
            nearest = torch.cdist(part, tokens, compute_mode="donot_use_mm_for_euclid_dist").min(1)
            shares.append(nearest.indices[nearest.values < 1e-4])
        assert sum(map(len, shares)) >= 150
        if tower == 0:
            assert len(shares[2]) > max(len(shares[0]), len(shares[1]))  # later batches more readily, as is said
            assert shares[2].float().std() > 0.2 * len(tokens)  # the first tokens of a tower would stand close together


class TestTowers:
    """A target for each tower, and what each of them saves."""

    @pytest.fixture
    def words(self):
        """Images, and few words in many places."""
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(4, 57, (2, 30), generator=generator)
        mask = (torch.arange(30) < torch.tensor([5, 12])[:, None]).long()
        return torch.randn(2, 2, 3, 96, 96, generator=generator), ids, mask

    def test_padding_is_not_what_a_budget_saves(self, dense, words):
        images, ids, mask = words
        found = []
        for places in (12, 30):
            model = vp.prune(dense, "random")
            found.append(vp.calibrate(model, [(images, ids[:, :places], mask[:, :places])], 0.4))
        short, long = found
        assert (long.macs, long.dense_macs, long.value) == pytest.approx((short.macs, short.dense_macs, short.value))
        assert 0 < short.padding < long.padding == pytest.approx(long.towers["text"].padding)
        assert long.towers["image"].padding == 0
        assert sum(long.saving_by_tower.values()) == pytest.approx(1)

    @pytest.mark.parametrize("keep", ["ratio", "threshold", {"image": "ratio", "text": "threshold"}])
    def test_each_tower_meets_its_own_target(self, clip, keep, tmp_path):
        dense, inputs = clip
        model = vp.prune(dense, "madtp", keep=keep, guide="codebook(anchors=8)")
        vp.fit_guide(model, [inputs])
        targets = {"text": 0.3, "image": 0.6}
        found = vp.calibrate(model, [inputs], targets, tolerance=0.05)
        cost = vp.count_macs(model, *inputs)
        for tower, target in targets.items():
            assert cost.reductions[tower] == pytest.approx(target, abs=0.05)
            assert cost.reductions[tower] == pytest.approx(found.towers[tower].reduction)
            assert f" at {found.towers[tower].knob}={found.towers[tower].value:.4g}" in str(found)
        assert (found.knob, found.value) == (None, None)
        assert found.reduction == pytest.approx(cost.reduction)

        config = model.pruning.config
        assert vp.PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert {tower: config.part("keep", tower).args[one.knob] for tower, one in found.towers.items()} == {
            tower: one.value for tower, one in found.towers.items()
        }
        again = vp.load(vp.save(model, tmp_path))
        assert vp.count_macs(again, *inputs).total == cost.total

    def test_a_tower_that_is_not_named_stays_as_it_is(self, dense, words):
        model = vp.prune(dense, "random", keep="ratio(ratio=0.9)")
        found = vp.calibrate(model, [words], {"image": 0.5})
        assert model.pruning.config.part("keep", "text") == vp.Part("ratio", {"ratio": 0.9})
        assert found.towers["text"].value == 0.9 != found.towers["image"].value
        both = vp.calibrate(model, [words], 0.5)  # and one value for all, again
        assert model.pruning.config.keep == vp.Part("ratio", {"ratio": both.value})

    def test_where_one_tower_fails_both_are_as_they_were(self, dense, words):
        model = vp.prune(dense, "random", keep={"image": "ratio(ratio=0.9)", "text": "ratio(ratio=0.8)"})
        before = model.pruning.config
        with pytest.raises(vp.BudgetError, match=r"reduction=0\.99 of the text tower is out of reach"):
            vp.calibrate(model, [words], {"image": 0.5, "text": 0.99})
        assert model.pruning.config == before
        ratios = {name: {k.ratio for k in keepers_of(tower)} for name, tower in model.pruning.towers.items()}
        assert ratios == {"image": {0.9}, "text": {0.8}}

    def test_it_says_whose_the_saving_is(self, dense, words, clip):
        both = vp.calibrate(vp.prune(dense, "random"), [words], 0.4)
        assert both.note == ""
        assert re.fullmatch(
            r"(39|40)\.\d % fewer MACs at ratio=[\d.]+ \([\d.]+ of [\d.]+ MMACs per instance\): image \S+ % fewer, text .*",
            str(both),
        )
        alone = vp.calibrate(vp.prune(clip[0], "random", at={"image": None}), [clip[1]], 0.3)
        assert alone.saving_by_tower == pytest.approx({"image": 1.0, "text": 0.0})
        assert alone.note == (
            "Nearly all of the saving (100 %) is the image tower's. The text tower by itself spends 100.0 % of its dense MACs, "
            "and is no faster than dense."
        )
        lone = vp.calibrate(vp.prune(dense.visual, "random"), [words[0].flatten(0, 1)], 0.4)
        assert lone.note == "" and "image" not in str(lone)
        whole = vp.measure(vp.prune(dense, "random", keep="ratio(ratio=1.0)"), [words])
        assert "no faster than the dense one" in whole.note

    def test_bad_targets(self, dense, words):
        model = vp.prune(dense, "random", at={"image": None})
        with pytest.raises(ValueError, match="names the tower 'vision'; this model has image, text"):
            vp.calibrate(model, [words], {"vision": 0.5})
        with pytest.raises(ValueError, match="the text tower is pruned nowhere"):
            vp.calibrate(model, [words], {"text": 0.5})
        for wrong in ({"image": 0.5, "text": 0}, {"image": 1}, {}):
            with pytest.raises(ValueError, match="must lie between 0 and 1"):
                vp.calibrate(model, [words], wrong)
        two = vp.prune(dense, "random", keep={"image": "ratio", "text": "top_p"})
        with pytest.raises(
            ValueError,
            match=r"several knobs, p, ratio, .* a target for each tower, reduction=\{'image': 0.5, 'text': 0.5\}",
        ):
            vp.calibrate(two, [words], 0.5)
        pair = vp.prune(vp.create_model("blip_retrieval_tiny"), "random")
        with pytest.raises(ValueError, match="none of the batches ran the text tower"):
            vp.calibrate(pair, [lambda model: model.image_features(words[0][:, 0])], {"text": 0.5})
        with pytest.raises(ValueError, match="has no knob that a budget can set"):
            vp.calibrate(vp.prune(dense, "random", keep={"image": "count(count=3)", "text": "ratio"}), [words], 0.5)

    def test_stages_with_different_knobs_are_refused(self, dense):
        several = vp.prune(dense, "random", at={"image": 0}, then=[vp.Stage("random", "top_p", at={"image": 1})])
        with pytest.raises(ValueError, match=r"several knobs, p, ratio, .*: give all stages the same keeper"):
            vp.calibrate(several, [], 0.5)


@pytest.mark.parametrize("keep", ["count(count=5)", {"image": "count(count=3)", "text": "ratio(ratio=0.5)"}], ids=str)
def test_what_a_keeper_without_a_knob_costs_is_measured(dense, inputs, keep):
    model = vp.prune(dense, "random", keep=keep)
    with torch.no_grad(), vp.collect() as traces:
        model(*inputs)
    found = vp.measure(model, [inputs])
    assert (found.knob, found.value) == (None, None)
    assert found.macs == pytest.approx(CostMeter(model)(traces).total / len(inputs[-1]))
    with pytest.raises(ValueError, match="no knob"):
        vp.measure(model, [inputs], value=0.5)


class TestFitGuide:
    def test_anchors_are_placed_among_tokens_of_both_towers(self, dense, inputs):
        model = vp.prune(dense, "madtp", guide="codebook(anchors=10)")
        before = model.pruning.guide.anchors.detach().clone()
        vp.fit_guide(model, [inputs], seed=1)
        anchors = model.pruning.guide.anchors.detach()
        assert not torch.equal(anchors, before)

        with torch.no_grad(), vp.collect() as traces:
            model(*inputs)
        for trace in traces:
            guidance = trace.layers[0].guidance
            closest = torch.cdist(anchors, guidance.mapped.x[guidance.mapped.free]).min(1).values
            assert closest.min() < torch.cdist(before, guidance.mapped.x).min()
        assert not model.pruning.guide.is_untrained

    def test_it_is_the_same_for_the_same_seed(self, dense, inputs):
        fitted = []
        for _ in range(2):
            model = vp.prune(dense, "madtp", guide="codebook(anchors=10)", keep="ratio")
            vp.fit_guide(model, [inputs], seed=5)
            fitted.append(model.pruning.guide.anchors.detach())
        assert torch.equal(*fitted)

    def test_it_silences_the_warning_of_noise(self, dense, inputs):
        model = vp.prune(dense, "madtp")
        with pytest.warns(vp.UntrainedGuideWarning, match="anchors are untrained noise"):
            model(*inputs)
        vp.fit_guide(model, [inputs])
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
            vp.fit_guide(vp.prune(dense, "evit"), [inputs])
        with pytest.raises(ValueError, match="at least one batch"):
            vp.fit_guide(vp.prune(dense, "madtp"), [])
        with pytest.raises(ValueError, match="4000 anchors need at least as many"):
            vp.fit_guide(vp.prune(dense, "madtp", guide="codebook(anchors=4000)"), [inputs], points=1000)


def test_what_is_saved_is_a_share_of_the_dense_macs_of_the_same_run(monkeypatch):
    """A decoder says more words, and the dense one with it, the fewer tokens it sees."""
    model = vp.create_model("blip_nlvr_tiny", preset="random")

    def measured(model, meter, batches, *others):
        dial = BudgetControl(model)
        dense = 300 - 200 * dial.value
        return Calibration(dial.knob.name, dial.value, dense * (0.3 + 0.7 * dial.value), dense)

    monkeypatch.setattr("vltprune.cost.calibration._measured", measured)
    assert vp.calibrate(model, [()], 0.35).reduction == pytest.approx(0.35, abs=0.0065)


def test_measuring_nothing_is_refused():
    model = vp.prune(small("vit").model, "evit")
    with pytest.raises(ValueError, match="at least one batch"):
        vp.measure(model, [])
