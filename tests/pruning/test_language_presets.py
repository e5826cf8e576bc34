"""Presets of language models against what their papers say, on small Llamas."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

import vltprune as vp

BEFORE, BEHIND = 3, 4


@functools.cache
def llama(layers):
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=20, attn_implementation="eager")
    model = LlamaModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def prompt(visual, batch=1):
    generator = torch.Generator().manual_seed(4)
    length = BEFORE + visual + BEHIND
    marks = torch.zeros(batch, length, dtype=torch.bool)
    marks[:, BEFORE : BEFORE + visual] = True
    return {"inputs_embeds": torch.randn(batch, length, 16, generator=generator), "visual_pos_masks": marks}


@torch.no_grad()
def run(preset, layers, visual):
    call = prompt(visual)
    with vp.collect() as traces:
        vp.prune(llama(layers), preset)(**call)
    maps = llama(layers)(inputs_embeds=call["inputs_embeds"], output_attentions=True).attentions
    kept = [layer.position[~layer.protected].tolist() for layer in traces[0].layers]
    return kept, [attention[0].mean(0) for attention in maps]


def best(row, places, number):
    return sorted(sorted(places, key=lambda place: -row[place])[:number])


IMAGE = range(BEFORE, BEFORE + 16)


def test_fastv_keeps_the_half_that_the_last_token_attends_to_in_the_second_layer():
    kept, maps = run("fastv", 4, 16)
    assert kept[0] == list(IMAGE)
    assert kept[1] == kept[2] == kept[3] == best(maps[1][-1], IMAGE, 8)


def test_pyramiddrop_halves_three_times_before_a_layer_by_what_its_last_token_would_attend_to():
    kept, maps = run("pyramiddrop", 8, 16)
    assert [len(one) for one in kept] == [16, 16, 8, 8, 4, 4, 2, 2]
    assert kept[2] == best(maps[2][-1], IMAGE, 8)
    assert all(set(later) <= set(earlier) for earlier, later in itertools.pairwise(kept))
    with vp.collect() as traces:
        vp.prune(llama(8), "pyramiddrop")(**prompt(16))
    assert [layout.total - BEFORE - BEHIND for layout in traces[0].entered] == [16, 16, 8, 8, 4, 4, 2, 2]


@pytest.mark.parametrize(("layers", "middle"), [(8, 4), (5, 2), (2, 1)])
def test_vtw_withdraws_all_visual_tokens_before_the_middle(layers, middle):
    kept, _ = run("vtw", layers, 16)
    assert [len(one) for one in kept] == [16] * middle + [0] * (layers - middle)


SPARSE = {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)}


@pytest.mark.parametrize("tokens", SPARSE)
def test_sparsevlm_keeps_its_published_numbers_and_means_of_clusters(tokens):
    kept, maps = run(f"sparsevlm({tokens})", 32, 576)
    assert tuple(len(kept[depth]) for depth in (2, 6, 15)) == SPARSE[tokens]
    assert [len(kept[depth]) for depth in (1, 5, 14, 31)] == [576, *SPARSE[tokens]]
    x, image = prompt(576)["inputs_embeds"][0], range(BEFORE, BEFORE + 576)
    text = range(image.stop, image.stop + BEHIND)
    alike = (x[image.start : image.stop] @ x[text.start :].T).softmax(1).mean(0)
    raters = [place for place, one in zip(text, alike, strict=True) if one > alike.mean()]
    assert 0 < len(raters) < BEHIND
    published = {192: 300, 128: 303, 96: 238, 64: 66}[tokens]
    assert set(best(maps[2][raters].mean(0), image, published)) <= set(kept[2])


def test_sparsevlm_keeps_the_same_parts_of_other_numbers_of_tokens():
    kept, _ = run("sparsevlm", 16, 288)
    assert all(abs(len(kept[depth]) - n / 2) < 2 for depth, n in zip((1, 3, 7), SPARSE[192], strict=True))
    kept, _ = run("sparsevlm", 16, 2)
    assert len(kept[-1]) == 2
    with pytest.raises(
        ValueError, match=r"published for 192, 128, 96, 64\. For another .*calibrate\(.*visual_tokens=100\)"
    ):
        vp.preset("sparsevlm(tokens=100)")
    with pytest.raises(TypeError, match="preset 'sparsevlm' takes no argument 'budget'"):
        vp.preset("sparsevlm(budget=96)")
    with pytest.raises(TypeError, match="preset 'fastv' takes no arguments"):
        vp.preset("fastv(0.5)")
    assert vp.preset("sparsevlm(96)") == vp.preset("sparsevlm(tokens=96)") != vp.preset("sparsevlm")


def test_all_text_rates_where_no_token_of_it_is_above_the_mean():
    call = prompt(16)
    call["inputs_embeds"][0, BEFORE + 16 :] = call["inputs_embeds"][0, -1].clone()
    with torch.no_grad(), vp.collect() as traces:
        vp.prune(llama(4), "random", scorer="text_attention(raters=True)", at={"language": 1})(**call)
    assert traces[0].input_tokens.columns["rater"].nonzero().flatten().tolist() == [19, 20, 21, 22]
    call["visual_pos_masks"][:, 3:] = True  # a prompt that ends with its image
    with torch.no_grad(), vp.collect() as traces:
        vp.prune(llama(4), "random", scorer="text_attention(raters=True)", at={"language": 1})(**call)
    assert set(traces[0].input_tokens.columns["rater"].nonzero().flatten().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("preset", ["random", "pooling", "attention"])
def test_presets_of_other_towers_prune_a_language_model_where_they_are_told_to(preset):
    at = {"at": {"language": (1,)}, "place": "attention"}
    with vp.collect() as traces:
        vp.prune(llama(4), preset, keep="ratio(ratio=0.5)", **at)(**prompt(16, batch=2))
    assert traces[0].lengths[0] == (23, 23) and max(traces[0].lengths[1]) <= 7 + 9
