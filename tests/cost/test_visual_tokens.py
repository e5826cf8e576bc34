"""Visual tokens of vision-language models: counts by layer, and MACs that torch's own counter confirms."""

from __future__ import annotations

import functools

import pytest
import torch
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
