"""Vision-language models pruned between the image tower and the language model: dropping tokens equals masking them."""

from __future__ import annotations

import pytest
import torch
from small_vlms import STEPS, VLMS, make

import vltprune as vp

BATCH = ((3, 4), (2, 3, 5), (4,), (1, 6))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def largest_difference(some, others):
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def check_dropping_is_masking(case, pruned, inputs):
    """Generates both ways; returns how many visual tokens each image keeps."""
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **STEPS)
    masked = inputs | {"attention_mask": case.visible(inputs, traces[0]), "position_ids": case.positions(inputs)}
    want = case.model.generate(**masked, **STEPS)
    assert torch.equal(got.sequences, want.sequences)
    assert largest_difference(got.logits, want.logits) < 1e-5
    return [length - case.first for length in traces[0].lengths[-1]]


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_dropping_is_masking(name):
    case = make(name)
    pruned = case.pruned(keep="random_ratio(mean=0.5, half_width=0.4)")
    alone = check_dropping_is_masking(case, pruned, case.prompts((3, 4)))
    together = check_dropping_is_masking(case, pruned, case.prompts(*BATCH))
    assert alone[0] < case.rows and len(set(together)) > 1


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_keeping_all_is_the_dense_model(name):
    case = make(name)
    inputs = case.prompts(*BATCH)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    pruned = case.pruned(keep="ratio(ratio=1.0)")
    got, want = (model.generate(**inputs, **STEPS) for model in (pruned, case.model))
    assert torch.equal(got.sequences, want.sequences)
    assert largest_difference(got.logits, want.logits) < 1e-5
    assert (pruned(**inputs).logits - case.model(**inputs).logits).abs().max() < 1e-5
    after = case.model.state_dict()
    assert before.keys() == after.keys() == pruned.state_dict().keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
