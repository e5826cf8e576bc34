"""Visual tokens of vision-language models: counts by layer, and MACs that torch's own counter confirms."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from small_models import BLIP
from small_vlms import make

import vltprune as vp
from vltprune.hosts.linear_maps import measure_macs
from vltprune.models.blip import BlipNlvr

IN_LAYERS = vp.PruneConfig("random", "count(count=5)", at={"language": (1,)}, modality="image")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def prefill(counted):
    return sum(macs for part, macs in counted.items() if part != "decode")


@pytest.mark.parametrize("name", ["llava last", "qwen3", "gemma3", "llava-next"])
@torch.no_grad()
def test_macs_are_those_that_a_counter_sees(name):
    case = make(name)
    inputs = case.prompts((3, 4)) | {"logits_to_keep": 1}
    pruned = case.pruned("random", at=None, place="output", keep="count(count=3)")
    inputs.pop("logits_to_keep")
    found = vp.visual_tokens(pruned, inputs)
    run = functools.partial(pruned, **inputs, logits_to_keep=1)
    dense = functools.partial(case.model, **inputs, logits_to_keep=1)
    assert prefill(found.macs) == pytest.approx(measure_macs(run), rel=1e-9)
    assert prefill(found.dense_macs) == pytest.approx(measure_macs(dense), rel=1e-9)


@torch.no_grad()
def test_one_more_token_and_its_cache():
    case = make("llava")
    inputs, found = case.prompts((3, 4)), None
    pruned = case.pruned(keep="count(count=3)")
    found = vp.visual_tokens(pruned, inputs)
    out = pruned(**inputs, use_cache=True)
    layers = out.cache.layers
    assert found.cache_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    position = torch.tensor([[inputs["input_ids"].shape[1]]])
    step = functools.partial(pruned, torch.tensor([[7]]), cache=out.cache, position_ids=position)
    assert found.macs["decode"] == pytest.approx(measure_macs(step), rel=1e-9)


@torch.no_grad()
def test_layers_of_the_language_model():
    case = make("llava")
    inputs = case.prompts((3, 4), (2, 3, 5))
    found = vp.visual_tokens(vp.prune(case.model, IN_LAYERS), inputs)
    # pruned inside the second layer, of two
    assert found.layers == (24.0, 24.0) and found.dense == found.average == 24.0
    both = IN_LAYERS.replace(at={"language": (0,)}, place="block")
    assert vp.visual_tokens(vp.prune(case.model, both), inputs).layers == (24.0, 5.0)
    assert "visual tokens" in str(found)


def test_counts_are_means_over_prompts():
    case = make("llava")
    found = vp.visual_tokens(case.pruned(keep="count(count=3)"), case.prompts((3, 4), (2, 3, 5), (4,)))
    assert found.layers == (3.0, 3.0) and found.dense == 16.0


def test_inputs_as_a_processor_returns_them():
    case = make("llava")
    pruned, inputs = case.pruned(keep="count(count=4)"), case.prompts((3, 4))
    want = vp.count_macs(pruned, **inputs)
    batch = transformers.BatchEncoding(inputs)
    for cost in (vp.count_macs(pruned, inputs), vp.count_macs(pruned, batch, logits_to_keep=0)):
        assert (cost.total, cost.dense_total) == (want.total, want.dense_total)
    assert vp.visual_tokens(pruned, inputs | {"labels": inputs["input_ids"]}) == vp.visual_tokens(pruned, batch)


def test_calibrating_reaches_a_cost_of_the_whole_model():
    case = make("llava")
    pruned, inputs = case.pruned(), case.prompts((3, 4), (2, 3, 5))
    found = vp.calibrate(pruned, [inputs], 0.25, 0.06, progress=False)
    again = vp.visual_tokens(pruned, inputs)
    assert found.reduction == pytest.approx(0.25, abs=0.06)
    assert again.average < again.dense


def test_what_has_no_visual_tokens_is_refused():
    case = make("llava")
    with pytest.raises(ValueError, match="no images"):
        vp.visual_tokens(case.pruned(), case.prompts((4,)))
    with pytest.raises(TypeError, match="count_macs"):
        vp.visual_tokens(vp.prune(BlipNlvr(**BLIP), "random"), {})


AVERAGES = {
    "between the towers": ({}, 5),
    "counts of each image": ({"preset": "random", "keep": "random_ratio(mean=0.5, half_width=0.3)", "at": None}, 8),
    "in a layer": ({"preset": "random", "at": {"language": (0,)}, "keep": "ratio"}, 14),
    "parts of several layers": ({"preset": "sparsevlm"}, 11),
    "sums of similar scores": ({"preset": "fastervlm", "keep": "top_p"}, 10),
}


@pytest.mark.parametrize("case", AVERAGES)
def test_calibrating_reaches_an_average_of_visual_tokens(case):
    parts, target = AVERAGES[case]
    llava = make("llava")
    if parts.get("preset") == "random" and parts["at"] is None:
        parts = {**parts, "place": "output"}
    pruned, batches = llava.pruned(**parts), [llava.prompts((3, 4), (1, 3)), llava.prompts((2, 6))]
    found = vp.calibrate(pruned, batches, visual_tokens=target, tolerance=0.1, progress=False)
    assert found.visual_tokens == pytest.approx(target, rel=0.1) and found.dense_visual_tokens == 16
    again = [vp.visual_tokens(pruned, batch).average for batch in batches]
    assert found.visual_tokens == pytest.approx((2 * again[0] + again[1]) / 3)
    assert f"{found.visual_tokens:.1f} of 16.0 visual tokens on average" in str(found)
    at_once = vp.prune(
        llava.model,
        visual_tokens=target,
        data=batches,
        tolerance=0.1,
        progress=False,
        **{"preset": "divprune", **parts},
    )
    assert at_once.pruning.config == pruned.pruning.config


@torch.no_grad()
def test_generated_tokens_count_where_they_are_asked_for():
    case = make("llava")
    inputs, pruned = case.prompts((3, 4)), case.pruned(keep="count(count=3)")
    position = torch.tensor([[inputs["input_ids"].shape[1]]])
    spent = []
    for model in (pruned, case.model):
        cache, steps = model(**inputs, use_cache=True).cache, 0.0
        for new in range(3):
            run = functools.partial(model, torch.tensor([[7]]), position_ids=position + new, cache=copy.deepcopy(cache))
            steps += measure_macs(run)
            cache = model(torch.tensor([[7]]), position_ids=position + new, cache=cache).cache
        spent.append(steps)
    without, with_three = (vp.measure(pruned, [inputs], decode=decode) for decode in (0, 3))
    assert with_three.macs - without.macs == pytest.approx(spent[0], rel=1e-9)
    assert with_three.dense_macs - without.dense_macs == pytest.approx(spent[1], rel=1e-9)
    ratio = case.pruned(keep="ratio")
    found = vp.calibrate(ratio, [inputs], 0.1, 0.1, decode=20, progress=False)
    assert found == vp.measure(ratio, [inputs], decode=20) and found.reduction == pytest.approx(0.1, abs=0.09)


def test_targets_that_language_models_cannot_have():
    case = make("llava")
    pruned, inputs = case.pruned(keep="ratio"), case.prompts((3, 4))
    for named, message in (
        ({"reduction": 0.5, "visual_tokens": 4}, "are two targets"),
        ({"visual_tokens": 0}, "must be above 0"),
        ({"visual_tokens": 16}, r"leaves nothing to prune: the prompts have 16\.0"),
        ({"decode": -1}, "decode=-1 must be a whole number"),
        ({"reduction": {"image": 0.5}, "decode": 3}, "is by tower: give one reduction"),
    ):
        with pytest.raises(ValueError, match=message):
            vp.calibrate(pruned, [inputs], **named)
    text, layers = case.prompts((4,)), case.pruned("random", at={"language": 0})
    for model, message in (
        (pruned, "at least one batch of inputs with images"),
        (layers, "none of the batches has images"),
    ):
        with pytest.raises(ValueError, match=message):
            vp.calibrate(model, [text], visual_tokens=4)
    assert vp.measure(pruned, [text, inputs]) == vp.measure(pruned, [inputs])
    towers = vp.prune(BlipNlvr(**BLIP), "random")
    for named in ({"visual_tokens": 4}, {"decode": 3}):
        with pytest.raises(TypeError, match=r"a BlipNlvr has none .*: give reduction= alone"):
            vp.calibrate(towers, [()], **named)
    with pytest.raises(TypeError, match="visual_tokens=4 is of a vision-language model"):
        vp.prune(BlipNlvr(**BLIP), "random", visual_tokens=4, data=[()])
    with pytest.raises(
        ValueError, match=r"visual_tokens=4 is set on inputs .*calibrate\(model, batches, visual_tokens=4\)"
    ):
        vp.prune(case.model, "divprune", visual_tokens=4)


def test_visual_tokens_out_of_reach_and_between_counts():
    case = make("llava")
    inputs, layers = case.prompts((3, 4)), case.pruned("random", at={"language": (0,)}, keep="ratio")
    message = (
        r"visual_tokens=4 is out of reach of keep='ratio': ratio from 0 to 1 leaves 16\.0 visual tokens to 8\.0 visual tokens, "
        r"and the nearest is 8\.0 visual tokens at ratio=0\. Ask for more than 8\.0 visual tokens or prune at more depths"
    )
    with pytest.raises(vp.BudgetError, match=message) as caught:
        vp.calibrate(layers, [inputs], visual_tokens=4)
    assert caught.value.nearest.visual_tokens == 8
    with pytest.raises(
        vp.BudgetError, match=r"leaves 3\.5 visual tokens on average to within 1\.0 % .* counts jump there"
    ):
        vp.calibrate(case.pruned(keep="ratio"), [inputs], visual_tokens=3.5)
