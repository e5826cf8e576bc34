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


def test_pyramiddrop_halves_three_times_by_the_last_token():
    kept, maps = run("pyramiddrop", 8, 16)
    assert [len(one) for one in kept] == [16, 16, 8, 8, 4, 4, 2, 2]
    assert kept[2] == best(maps[2][-1], IMAGE, 8)
    assert all(set(later) <= set(earlier) for earlier, later in itertools.pairwise(kept))


@pytest.mark.parametrize(("layers", "last"), [(8, 3), (5, 2), (2, 0)])
def test_vtw_withdraws_all_visual_tokens_before_the_middle(layers, last):
    kept, _ = run("vtw", layers, 16)
    assert [len(one) for one in kept] == [16] * last + [0] * (layers - last)


def test_sparsevlm_keeps_its_published_numbers_and_means_of_clusters():
    kept, maps = run("sparsevlm", 32, 576)
    assert [len(kept[depth]) for depth in (1, 2, 5, 6, 14, 15, 31)] == [576, 309, 309, 204, 204, 113, 113]
    text = [*range(BEFORE), *range(BEFORE + 576, BEFORE + 576 + BEHIND)]
    rated = maps[2][text].mean(0)
    assert set(best(rated, range(BEFORE, BEFORE + 576), 300)) <= set(kept[2])


@pytest.mark.parametrize("preset", ["random", "pooling", "attention"])
def test_presets_of_other_towers_prune_a_language_model_where_they_are_told_to(preset):
    at = {"at": {"language": (1,)}, "place": "attention"}
    with vp.collect() as traces:
        vp.prune(llama(4), preset, keep="ratio(ratio=0.5)", **at)(**prompt(16, batch=2))
    assert traces[0].lengths[0] == (23, 23) and max(traces[0].lengths[1]) <= 7 + 9
