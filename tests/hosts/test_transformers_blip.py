"""transformers' BLIP: what its decoders and its text tower make of the tokens that pruning leaves of an image."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from cases_transformers import make
from checks import same
from transformers_parts import ENDS, LENGTH, MASK, words

import vltprune as vp

SHORT = {"max_new_tokens": 6, "min_new_tokens": 3}


def asked_for(case):
    """What generate takes, from the inputs of a case."""
    if type(case.model) is hf.BlipForConditionalGeneration:
        return {"pixel_values": case.inputs[0]}
    return {"input_ids": case.inputs[0], "pixel_values": case.inputs[1]}


def ragged(case):
    """A pruned model, and images of which it keeps different numbers of tokens."""
    pruned, inputs = case.pruned(), asked_for(case)
    with vp.collect() as traces:
        pruned.vision_model(inputs["pixel_values"])
    assert len(set(traces[0].lengths[-1])) > 1
    return pruned, inputs


@pytest.mark.parametrize("name", ["blip captions", "blip answers"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}])
@torch.no_grad()
def test_keeping_all_it_generates_what_the_host_does(name, how):
    case = make(name)
    inputs = asked_for(case)
    pruned = case.pruned(keep="ratio(ratio=1.0)")
    assert torch.equal(pruned.generate(**inputs, **how, **SHORT), case.model.generate(**inputs, **how, **SHORT))


@pytest.mark.parametrize("name", ["blip captions", "blip answers"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}])
@torch.no_grad()
def test_batch_mates_do_not_change_what_is_generated(name, how):
    case = make(name)
    pruned, inputs = ragged(case)
    together = pruned.generate(**inputs, **how, **SHORT)
    for i, own in enumerate(together):
        alone = pruned.generate(**{key: x[i : i + 1] for key, x in inputs.items()}, **how, **SHORT)[0]
        assert torch.equal(own[: len(alone)], alone)


@torch.no_grad()
def test_a_prompt_is_continued():
    case = make("blip captions")
    pruned = case.pruned(keep="ratio(ratio=1.0)")
    inputs = {**asked_for(case), "input_ids": words()[:, :5], "attention_mask": torch.ones(3, 5, dtype=torch.int64)}
    want = case.model.generate(**{key: x.clone() for key, x in inputs.items()}, **SHORT)
    assert torch.equal(pruned.generate(**inputs, **SHORT), want)


@torch.no_grad()
def test_the_decoder_sees_what_is_left_and_nothing_else():
    case = make("blip captions")
    pruned, inputs = ragged(case)
    ids = words()
    out = pruned(inputs["pixel_values"], ids)
    with vp.collect() as traces:
        pruned.vision_model(**inputs)
    for i, length in enumerate(traces[0].lengths[-1]):
        memory = out.image_embeds[i : i + 1, :length]
        same(out.logits[i : i + 1], case.model.text_decoder(ids[i : i + 1], encoder_hidden_states=memory).logits)


@pytest.mark.parametrize("name", ["blip captions", "blip answers"])
def test_the_dense_decoder_is_not_hooked(name):
    case = make(name)
    pruned = case.pruned()
    assert not any(module._forward_pre_hooks for module in case.model.modules())
    assert dict(pruned.text_decoder.named_parameters()) == dict(case.model.text_decoder.named_parameters())
    pruned.train()
    assert not case.model.text_decoder.training


@torch.no_grad()
def test_features_without_the_matching_head():
    case = make("blip retrieval")
    inputs = {
        "input_ids": case.inputs[0],
        "pixel_values": case.inputs[1],
        "attention_mask": MASK,
        "use_itm_head": False,
    }
    same(case.pruned(keep="ratio(ratio=1.0)")(**inputs).itm_score, case.model(**inputs).itm_score)
    assert not torch.allclose(case.pruned()(**inputs).itm_score, case.model(**inputs).itm_score, atol=1e-3)


@pytest.mark.parametrize("preset", ["madtp", "evit", "random"])
@torch.no_grad()
def test_rows_of_zeros_are_padding(preset):
    case = make("blip text: memory")
    pruned, (ids, mask, *_, memory, seen) = case.pruned(preset), case.inputs
    want = pruned(input_ids=ids, attention_mask=mask, encoder_hidden_states=memory, encoder_attention_mask=seen)
    padded = memory * seen[..., None]
    for said in ({}, {"encoder_attention_mask": torch.ones_like(seen)}):
        same(pruned(input_ids=ids, attention_mask=mask, encoder_hidden_states=padded, **said), want)


@torch.no_grad()
def test_one_image_for_all_sentences():
    case = make("blip text: one image")
    ids, mask, *_, memory, seen = case.inputs
    pruned = case.pruned()
    one = pruned(ids, mask, encoder_hidden_states=memory, encoder_attention_mask=seen)
    each = pruned(ids, mask, encoder_hidden_states=memory.expand(3, -1, -1), encoder_attention_mask=seen.expand(3, -1))
    same(one, each)


def test_wrong_memory_is_refused():
    pruned = make("blip text: memory").pruned()
    with pytest.raises(ValueError, match="3 sentences cannot attend to 2 images"):
        pruned(words(), encoder_hidden_states=torch.randn(2, 9, 48))
    with pytest.raises(TypeError, match="does not take is_decoder"):
        pruned(words(), is_decoder=True)
    pruned.host.config.is_decoder = False
    with pytest.raises(ValueError, match="build the text tower with is_decoder=True"):
        pruned(words(), encoder_hidden_states=torch.randn(3, 9, 48))


def test_a_hidden_first_word_is_refused():
    case = make("blip retrieval")
    mask = MASK.flip(1)
    assert ENDS[0] < LENGTH
    with pytest.raises(ValueError, match="hides token 0 of sentence 0"):
        case.pruned()(*case.inputs[:3], mask)
