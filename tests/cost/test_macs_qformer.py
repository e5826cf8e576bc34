"""MACs of BLIP-2 and InstructBLIP, Q-Former and language model included, against torch's counter."""

from __future__ import annotations

import functools

import pytest
import torch
from small_models import images
from small_qformers import MODELS, make, matching

import vltprune as vp
from vltprune.hosts.linear_maps import measure_macs

COUNT = {"keep": "count(count=5)", "at": None, "place": "output"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def assert_counts(dense, pruned, call, rel=1e-9):
    with torch.no_grad(), vp.collect() as traces:
        call(pruned)
    cost = vp.CostMeter(pruned)(traces)
    assert cost.total == pytest.approx(measure_macs(functools.partial(call, pruned)), rel=rel)
    assert cost.dense_total == pytest.approx(measure_macs(functools.partial(call, dense)), rel=rel)
    assert cost.decoder < cost.dense_decoder


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("blip2 eager", "instruct t5")])
def test_forward(name):
    case = make(name)
    assert_counts(case.model, case.pruned(**COUNT), lambda model: model(**case.prompts(), **case.labels))


HOW = [("blip2 opt", {}), ("blip2 t5", {"use_cache": False}), ("instruct llama", {}), ("instruct t5", {"num_beams": 2})]


@pytest.mark.parametrize(("name", "how"), HOW, ids=str)
def test_generate(name, how, monkeypatch):
    case = make(name)
    inputs = case.prompts()
    # the counter fails on views made without gradients
    monkeypatch.setattr(case.model.query_tokens, "requires_grad", False)

    def call(model):
        return model.generate(**inputs, **how, do_sample=False, max_new_tokens=3)

    assert_counts(case.model, case.pruned(**COUNT), call)


@pytest.mark.parametrize("has_head", [True, False])
def test_retrieval(has_head):
    # the product of embeddings is not counted
    dense, ids = matching(), torch.randint(2, 60, (3, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images(3)}
    inputs["use_image_text_matching_head"] = has_head
    assert_counts(dense, vp.prune(dense, "random", **COUNT), lambda model: model(**inputs), rel=1e-3)


@pytest.mark.parametrize("name", ["blip2 opt", "instruct t5"])
def test_calibrating_reaches_a_cost_of_the_whole_model(name):
    case = make(name)
    inputs = case.prompts() | case.labels
    pruned = case.pruned("evit", keep="ratio(ratio=0.5)")
    found = vp.calibrate(pruned, [inputs], 0.1, tolerance=0.02)
    assert vp.count_macs(pruned, **inputs).reduction == pytest.approx(found.reduction, abs=1e-3)
    assert found.reduction == pytest.approx(0.1, abs=0.02)
    with pytest.raises(TypeError, match="no language model that reads visual tokens"):
        vp.visual_tokens(pruned, inputs)
