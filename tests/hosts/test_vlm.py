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


def same(got, want):
    """Whether logits, one tensor or one a step, are equal within rounding in single precision."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def check_dropping_is_masking(case, pruned, inputs):
    """Generates both ways; returns how many visual tokens each image keeps."""
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **STEPS)
    masked = inputs | {"attention_mask": case.visible(inputs, traces[0]), "position_ids": case.positions(inputs)}
    want = case.model.generate(**masked, **STEPS)
    assert torch.equal(got.sequences, want.sequences)
    same(got.logits, want.logits)
    return [length - case.first for length in traces[0].lengths[-1]]


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_dropping_is_masking(name):
    case = make(name)
    pruned = case.pruned(keep="random_ratio(mean=0.5, half_width=0.4)")
    check_dropping_is_masking(case, pruned, case.prompts((3, 4)))
    kept = check_dropping_is_masking(case, pruned, case.prompts(*BATCH))
    assert len(set(kept)) > 1


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_keeping_all_is_the_dense_model(name):
    case = make(name)
    inputs = case.prompts(*BATCH)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    pruned = case.pruned(keep="ratio(ratio=1.0)")
    got, want = (model.generate(**inputs, **STEPS) for model in (pruned, case.model))
    assert torch.equal(got.sequences, want.sequences)
    same(got.logits, want.logits)
    same(pruned(**inputs).logits, case.model(**inputs).logits)
    after = case.model.state_dict()
    assert before.keys() == after.keys() == pruned.state_dict().keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


PRESETS = (
    "fastervlm visionzip prumerge vispruner divprune cdpruner hiprune vscan dart scissor flowcut random pooling evit"
)


@pytest.mark.parametrize("preset", PRESETS.split())
@torch.no_grad()
def test_a_count_is_what_enters_the_language_model(preset):
    case = make("llava")
    inputs, seen = case.prompts((3, 4), (2, 3, 5)), []
    pruned = case.pruned(preset, keep="count(count=6)")
    # what is fused, and what PruMerge makes of the rest, is one token more
    count = 7 if preset in ("prumerge", "evit") else 6
    hook = case.model.model.language_model.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with hook, vp.collect() as traces:
        pruned(**inputs)
    assert [length - case.first for length in traces[0].lengths[-1]] == [count] * 3
    assert seen == [2 + 3 + 5 + 2 * count]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"preset": "fastervlm"}, "reads attention of the image tower|reads the attention of a summary token"),
        ({"preset": "dart"}, "choose parts that read contents"),
        ({"preset": "divprune", "place": "block"}, "place='output'"),
        ({"preset": "divprune", "at": {"text": None}}, "names the tower 'text'"),
    ],
)
def test_what_pruning_behind_a_projector_refuses(parts, message):
    with pytest.raises(ValueError, match=message):
        make("qwen2.5").pruned(**parts)


def test_newlines_stay():
    case = make("llava-next")
    inputs = case.prompts((3, 4))
    with vp.collect() as traces:
        case.pruned(keep="count(count=5)").generate(**inputs, **STEPS)
    # four rows of patches end with one each
    assert traces[0].lengths[-1] == (5 + 4,)
