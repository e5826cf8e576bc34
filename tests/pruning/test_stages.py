"""Configs of several stages: where each prunes, what the next one sees, and that they come back from plain data."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from registered import registered
from small_models import small
from torch.testing import assert_close

import vltprune as vp
from vltprune import PruneConfig, Stage

VIT = small("vit")
IMAGES = VIT.draw(3)


def lengths(config):
    model = vp.prune(VIT.model, config)
    with torch.no_grad(), vp.collect() as traces:
        out = model(*IMAGES)
    return traces[0], out


def entered(trace):
    return trace.input_tokens.layout.lengths[0]


def config(**changes):
    return PruneConfig("mean_cls_attention", "count(count=9)", at=1).replace(**changes)


def test_stages_prune_where_they_say():
    two = config(then=[Stage("mean_cls_attention", "count(count=5)", "fuse", at=-1)])
    trace, _ = lengths(two)
    assert [step[0] for step in trace.lengths] == [entered(trace), *[10] * (len(trace.layers) - 2), 7]
    assert [len(layer.steps) for layer in trace.layers] == [0, 1, *[0] * (len(trace.layers) - 3), 1]


def test_stages_at_the_same_place_prune_what_the_former_left():
    """Two stages keep what the second alone keeps, if both score alike: 9 best, then the 4 best of these."""
    both, out_both = lengths(config(then=[Stage("mean_cls_attention", "count(count=4)", at=1)]))
    once, out_once = lengths(config(keep="count(count=4)"))
    assert both.lengths == once.lengths
    assert torch.equal(both.layers[1].position, once.layers[1].position)
    assert_close(out_both, out_once)
    assert [step.lengths[0] for step in both.layers[1].steps] == [10, 5]


def test_merging_after_dropping_sums_only_what_was_left():
    trace, _ = lengths(config(then=[Stage("mean_cls_attention", "count(count=4)", "fuse", at=1)]))
    owners = trace.provenance(1).view(3, -1)
    assert ((owners >= 0).sum(1) == 10).all()
    assert trace.output_tokens.size.sum() == 3 * 10


@pytest.mark.parametrize("place", ["block", "output"])
def test_behind_a_block_the_block_itself_costs_what_it_did(place):
    """The feed-forward of the pruned block runs on all tokens, and the next block on those that stay."""
    at = len(VIT.model.blocks) - 1 if place == "block" else None
    behind = vp.prune(VIT.model, config(place=place, at=at))
    cost = vp.count_macs(behind, *IMAGES)
    assert cost.towers["image"][1:-2].sum() == cost.dense["image"][1:-2].sum()
    scoring = cost.towers["image"][-2].sum() - cost.dense["image"][-2].sum()
    assert 0 < scoring < 0.05 * cost.dense["image"][-2].sum()
    trace, _ = lengths(config(place=place, at=at))
    assert trace.lengths[-1] == (10, 10, 10)
    assert not trace.layers[-1].steps[0].inside


@pytest.mark.parametrize("reducer", ["drop", "fuse", "merge(by='content')"])
def test_before_a_block_is_behind_the_former_for_parts_that_read_contents_alone(reducer):
    parts = {"scorer": "distinct", "reducer": reducer}
    before, out_before = lengths(config(**parts, place="before", at=2))
    behind, out_behind = lengths(config(**parts, place="block", at=1))
    assert torch.equal(before.output_tokens.position, behind.output_tokens.position)
    assert [layout.lengths for layout in before.entered] == [layout.lengths for layout in behind.entered]
    assert_close(out_before, out_behind)


@pytest.mark.parametrize("scorer", ["mean_cls_attention", "self_attention", "cls_attention", "key_norm"])
def test_before_a_block_its_own_attention_decides(scorer):
    before, _ = lengths(config(scorer=scorer, place="before"))
    inside, _ = lengths(config(scorer=scorer))
    assert torch.equal(before.layers[1].position, inside.layers[1].position)
    assert before.entered[1].lengths == (10, 10, 10) and inside.entered[1].lengths == (entered(inside),) * 3


def test_three_places_of_one_block():
    three = config(keep="count(count=12)", place="before")
    more = [
        Stage("mean_cls_attention", f"count(count={n})", at=1, place=place)
        for n, place in ((9, "attention"), (4, "block"))
    ]
    trace, _ = lengths(three.replace(then=more))
    assert [(step.place, step.lengths[0]) for step in trace.layers[1].steps] == [
        ("before", 13),
        ("attention", 10),
        ("block", 5),
    ]
    model = vp.prune(VIT.model, three.replace(then=more))
    assert [pruner.keeper.count for pruner in model.pruners_at(1)] == [12, 9, 4]


def test_before_a_block_attention_and_what_follows_cost_less():
    n, dim = entered(lengths(config())[0]), VIT.model.embed_dim
    cost, dense = (
        vp.count_macs(vp.prune(VIT.model, one), *IMAGES)
        for one in (config(place="before"), config(keep="ratio(ratio=1.0)"))
    )
    saved = dense.towers["image"][2, 0] - cost.towers["image"][2, 0]
    mlp = VIT.model.blocks[1].mlp.fc1.out_features
    # all but queries, keys and values of all tokens, and one row of the map
    assert saved == (dim * dim + 2 * dim * mlp) * (n - 10) + 2 * dim * (n * n - 100) - dim * n


def test_the_output_of_a_class_token_is_that_of_the_dense_model():
    """Pruned behind the last block, a tower that reads its class token gives what it gave."""
    _, out = lengths(config(place="output", at=None))
    with torch.no_grad():
        assert_close(out, VIT.model(*IMAGES))


def test_a_column_travels_to_a_later_layer():
    """Scores that one stage remembers are there for the next, at the rows of the tokens that stayed."""

    class Remembers(vp.scorers["random"]):
        remembers = "seen"

    class Recalls(vp.TokenScorer):
        def forward(self, tokens, stats, guidance):
            return tokens.columns["seen"]

    with registered(vp.scorers, remembering=Remembers, recalling=Recalls):
        two = PruneConfig("remembering", "count(count=9)", at=0, then=[Stage("recalling", "count(count=4)", at=2)])
        trace, _ = lengths(two)
        one = PruneConfig("remembering", "count(count=4)", at=0)
        expected, _ = lengths(one)
    assert torch.equal(trace.layers[2].position, expected.layers[2].position)


def test_stages_come_back_from_plain_data(tmp_path):
    several = config(
        then=[
            Stage("random", "ratio(ratio=0.5)", "fuse", at=2, place="block"),
            Stage("random", "ratio", place="output"),
        ]
    )
    again = PruneConfig.from_dict(json.loads(json.dumps(several.to_dict())))
    assert again == several
    assert again.stages[1].place == "block"
    assert PruneConfig("random", "ratio").to_dict().get("then") is None


def test_parts_are_replaced_in_every_stage():
    several = config(then=[Stage("random", "ratio(ratio=0.5)", at=2)]).replace(keep="ratio(ratio=0.25)")
    assert {str(stage.keep) for stage in several.stages} == {"ratio(ratio=0.25)"}
    assert [stage.at for stage in several.stages] == [(1,), (2,)]


def test_a_config_lists_the_parts_and_depths_of_all_stages():
    several = config(
        then=[Stage("random", "ratio(ratio=0.5)", "fuse", at=(1, 3), place="block"), Stage("random", "all")]
    )
    assert [str(part) for part in several.parts("scorer")] == ["mean_cls_attention", "random"]
    assert several.describe("keep") == "count(count=9), then ratio(ratio=0.5), then all"
    assert several.describe("selector") == "top"
    assert several.parts("guide") == ()
    assert several.depths("image", 5) == (0, 1, 2, 3, 4)
    assert several.with_stages(several.stages[:2]).depths("image", 5) == (1, 3)


def test_stages_can_be_confined_to_a_tower():
    several = config(
        then=[Stage("random", "ratio", at={"image": 2, "text": 1}), Stage("random", "ratio", place="output")]
    )
    assert [stage.at for stage in several.in_tower("image").stages] == [
        {"image": (1,)},
        {"image": (2,)},
        {"image": None},
    ]
    assert [stage.at for stage in several.in_tower("text").stages] == [{"text": (1,)}, {"text": (1,)}, {"text": None}]


@pytest.mark.parametrize("changes", [{"at": {"vision": 1}}, {"keep": {"image": "ratio", "vision": "ratio"}}], ids=str)
def test_a_later_stage_names_no_unknown_tower(changes):
    wrong = dataclasses.replace(Stage("random", "ratio", at={"image": 2}), **changes)
    with pytest.raises(ValueError, match="names the tower 'vision'; this model has image"):
        vp.prune(VIT.model, config(then=[wrong]))


def test_a_guide_that_two_stages_read_is_counted_once():
    one = vp.preset("madtp").replace(at=1, keep="ratio(ratio=0.5)", guide="codebook(anchors=5)")
    first = dataclasses.replace(one.stages[0], keep="count(count=1000)")
    two = one.with_stages([first, *one.stages])
    costs = [vp.count_macs(vp.prune(VIT.model, config), *IMAGES) for config in (one, two)]
    assert costs[0].total == costs[1].total


def test_calibration_sets_the_knob_of_every_stage():
    model = vp.prune(VIT.model, "random", at=0, then=[Stage("mean_cls_attention", "ratio", "fuse", at=2)])
    found = vp.calibrate(model, [IMAGES], 0.3, tolerance=0.03)
    first, second = (stage.keep.args["ratio"] for stage in model.pruning.config.stages)
    assert first == second == found.value
    assert str(model.pruning.config.stages[1].scorer) == "mean_cls_attention"
    assert vp.measure(model, [IMAGES]).reduction == pytest.approx(found.reduction)


def test_a_model_of_several_stages_comes_back_from_its_folder(tmp_path):
    model = vp.create_model("blip_nlvr_tiny_evit", then=[Stage("random", "ratio(ratio=0.8)", at=1)])
    for tower in model.pruning.towers.values():
        for pruner in tower.pruners_at(1):
            pruner.keeper.ratio = 0.7
    vp.save(model, tmp_path / "model")
    again = vp.load(tmp_path / "model")
    assert str(again.pruning.config.stages[1].keep) == "ratio(ratio=0.7)"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"place": "mlp"}, "place='mlp'"),
        ({"place": "output"}, "place='output' is behind the last block"),
        ({"then": ["evit"]}, "then=: a stage is a vltprune.Stage"),
        ({"then": [{"scorer": "random"}]}, "keep"),
        ({"then": [{"scorer": "alignment", "keep": "ratio"}]}, "reads the alignment guide"),
    ],
    ids=str,
)
def test_wrong_stages_are_refused_when_the_config_is_made(wrong, says):
    with pytest.raises((TypeError, ValueError), match=says):
        config(**wrong)
