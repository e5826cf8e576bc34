"""Pruning in a language model: dropping a token equals masking it in the dense model, in the prompt and behind it."""

from __future__ import annotations

import copy

import language_models as lm
import pytest
import torch
from transformers import DynamicCache, StaticCache

import vltprune as vp

LENGTHS = {"alone": ((3, 12, 4),), "batch": ((3, 12, 4), (2, 7, 3), (5, 0, 6))}
PRUNE = {"keep": "ratio(ratio=0.5)", "scorer": "key_norm", "reducer": "drop"}
TIGHT = 1e-5


def pruned_model(name, at=(0, 1, 2), **parts):
    return vp.prune(lm.language_model(name), "random", at={"language": at}, **{**PRUNE, **parts})


def called(name, sizes="batch"):
    """A prompt; for Qwen3-VL with features that it adds behind its first two layers."""
    call = lm.prompt(name, LENGTHS[sizes])
    if name == "qwen3_vl":
        number, generator = int(call["visual_pos_masks"].sum()), torch.Generator().manual_seed(5)
        call["deepstack_visual_embeds"] = [torch.randn(number, lm.DIM, generator=generator) for _ in range(2)]
    return call


def read(pruned, call, valid=None):
    """The output of a prompt, which of its tokens are real, and which were pruned before each layer."""
    valid = call["attention_mask"].bool() if valid is None else valid
    with vp.collect() as traces:
        out = pruned(**call, use_cache=True)
    return out, valid, lm.gone(traces[0], valid)


def steps(*sizes, seed=1):
    """Embeddings of further tokens, [batch, size, dim] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, lm.DIM, generator=generator) for size in sizes]


@pytest.mark.parametrize("sizes", LENGTHS)
@pytest.mark.parametrize("name", lm.MODELS)
@torch.no_grad()
def test_dropping_is_masking_in_the_prompt_and_eight_steps_behind_it(name, sizes):
    model, call = lm.language_model(name), called(name, sizes)
    pruned = pruned_model(name)
    out, valid, gone = read(pruned, call)
    assert gone[3].any()
    with lm.masked(model, gone):
        wanted = lm.dense(model, call)
    assert (out.last_hidden_state - wanted)[valid & ~gone[3]].abs().max() < TIGHT
    for x in steps(*[(len(valid), 1)] * 8):
        call = lm.continued(call, x)
        out = pruned(**lm.only_new(call, 1), cache=out.cache, use_cache=True)
        with lm.masked(model, gone):
            wanted = lm.dense(model, call)
        assert (out.last_hidden_state[:, -1] - wanted[:, -1]).abs().max() < TIGHT


@pytest.mark.parametrize("name", ["llama", "qwen2_window", "qwen3_vl", "gemma3"])
@torch.no_grad()
def test_what_leaves_before_a_layer_is_masked_in_it_and_not_in_its_cache(name):
    model, call = lm.language_model(name), called(name)
    parts = {"keep": "ratio(ratio=0.6)", "scorer": "last_attention", "place": "before"}
    pruned = pruned_model(name, at=(0, 2), **parts)
    out, valid, gone = read(pruned, call)
    assert gone[0].any() and (gone[2] & ~gone[1]).any() and len({int(one.sum()) for one in gone[2]}) > 1
    held = [int((valid & ~one).sum(1).max()) for one in gone]
    assert [layer.keys.shape[2] for layer in out.cache.layers] == held
    with lm.masked(model, gone):
        wanted = lm.dense(model, call)
    assert (out.last_hidden_state - wanted)[valid & ~gone[3]].abs().max() < TIGHT
    for x in steps((3, 1), (3, 2), (3, 1)):
        call = lm.continued(call, x)
        out = pruned(**lm.only_new(call, x.shape[1]), cache=out.cache, use_cache=True)
        with lm.masked(model, gone):
            wanted = lm.dense(model, call)
        assert (out.last_hidden_state - wanted[:, -x.shape[1] :]).abs().max() < TIGHT


@torch.no_grad()
def test_what_is_merged_before_a_layer_is_what_is_merged_behind_the_former():
    call, equal = called("llama"), {"scorer": "equal", "reducer": "merge(by='content')", "keep": "ratio(ratio=0.5)"}
    before, behind = (
        pruned_model("llama", at=(at,), place=place, **equal)(**call).last_hidden_state
        for at, place in ((2, "before"), (1, "block"))
    )
    torch.testing.assert_close(before, behind, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", ["llama", "qwen2_window", "gemma3"])
@torch.no_grad()
def test_counts_per_instance_and_turns_of_several_tokens(name):
    model, call = lm.language_model(name), called(name)
    pruned = pruned_model(name, keep="random_ratio(mean=0.5, half_width=0.4)", at=(1, 2))
    out, _, gone = read(pruned, call)
    assert len({int(one.sum()) for one in gone[3]}) > 1
    for x in steps((3, 4), (3, 1), (3, 3)):
        call = lm.continued(call, x)
        out = pruned(**lm.only_new(call, x.shape[1]), cache=out.cache, use_cache=True)
        with lm.masked(model, gone):
            wanted = lm.dense(model, call)
        assert (out.last_hidden_state - wanted[:, -x.shape[1] :]).abs().max() < TIGHT


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
@torch.no_grad()
def test_images_that_see_both_ways(name):
    model, call = lm.language_model(name), called(name)
    pruned, valid = pruned_model(name), call["attention_mask"].bool()
    out, _, gone = read(pruned, {**call, "attention_mask": lm.both_ways(model, call)}, valid)
    with lm.masked(model, gone):
        wanted = lm.dense(model, {**call, "attention_mask": lm.both_ways(model, call)})
    assert (out.last_hidden_state - wanted)[valid & ~gone[3]].abs().max() < TIGHT
    for x in steps((3, 1), (3, 1)):
        call = lm.continued(call, x)
        masks = lm.both_ways(model, call)
        last = {kind: mask[:, :, -1:] for kind, mask in masks.items()} if isinstance(masks, dict) else masks[:, :, -1:]
        out = pruned(**{**lm.only_new(call, 1), "attention_mask": last}, cache=out.cache, use_cache=True)
        with lm.masked(model, gone):
            wanted = lm.dense(model, {**call, "attention_mask": masks})
        assert (out.last_hidden_state[:, -1] - wanted[:, -1]).abs().max() < TIGHT


@pytest.mark.parametrize("name", lm.MODELS)
@torch.no_grad()
def test_keeping_all_is_the_dense_model_whose_submodules_run(name):
    model = copy.deepcopy(lm.language_model(name))
    for module in model.modules():
        if not list(module.children()) and module is not model.rotary_emb:
            # as an adapter would
            module.register_forward_hook(lambda module, args, out: out * 1.25 if isinstance(out, torch.Tensor) else out)
    call = called(name)
    pruned = vp.prune(model, "random", at={"language": (0, 2)}, keep="ratio(ratio=1.0)")
    out = pruned(**call)
    assert (out.last_hidden_state - lm.dense(model, call))[call["attention_mask"].bool()].abs().max() < TIGHT
    ids = torch.tensor([[1, 2, 3]])
    assert (pruned(input_ids=ids).last_hidden_state - model(input_ids=ids).last_hidden_state).abs().max() < TIGHT


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_scores_read_the_dense_models_attention(name):
    model, call = lm.language_model(name), called(name)
    call["attention_mask"] = lm.both_ways(model, call) if name == "gemma3" else call["attention_mask"]
    named = {key: value for key, value in call.items() if key != "visual_pos_masks"}
    maps = model(**named, use_cache=False, output_attentions=True).attentions[1].mean(1)
    for scorer, rows in {
        "text_attention": lambda valid, visual: valid & ~visual,
        "column_attention": torch.logical_or,
    }.items():
        pruned = pruned_model(name, at=(1,), scorer=scorer)
        with vp.collect() as traces:
            pruned(**call, use_cache=False)
        tokens, scores = traces[0].layers[1].scored
        valid, visual = torch.zeros_like(call["visual_pos_masks"]), call["visual_pos_masks"]
        valid[tokens.layout.instance, tokens.position] = True
        queries = (rows(valid, visual) & valid).to(maps.dtype)
        wanted = (queries[:, None] @ maps).squeeze(1) / queries.sum(1, keepdim=True)
        got = torch.zeros_like(wanted)
        got[tokens.layout.instance, tokens.position] = scores.to(maps.dtype)
        assert (got - wanted)[visual].abs().max() < TIGHT


@torch.no_grad()
def test_beams_take_their_tokens_along():
    pruned, call = pruned_model("llama", keep="random_ratio(mean=0.5, half_width=0.4)"), called("llama")
    out = pruned(**call, use_cache=True)
    (x,) = steps((3, 1))
    more = lm.only_new(lm.continued(call, x), 1)
    rows = torch.tensor([2, 0, 0])
    straight, moved = copy.deepcopy(out.cache), out.cache
    moved.reorder_cache(rows)
    wanted = pruned(**more, cache=straight, use_cache=True).last_hidden_state[rows]
    got = pruned(**{key: value[rows] for key, value in more.items()}, cache=moved, use_cache=True).last_hidden_state
    assert (got - wanted).abs().max() < TIGHT
    for cache, change in (
        (straight, lambda c: c.batch_repeat_interleave(2)),
        (moved, lambda c: c.batch_select_indices(rows)),
    ):
        change(cache)
        assert all(len(layer.index) == len(layer.keys) for layer in cache.layers)
    moved.reset()
    assert moved.get_seq_length() == 0


@torch.no_grad()
def test_a_token_that_is_gone_has_the_output_of_the_one_left_before_it():
    pruned, call = pruned_model("llama", keep="count(count=0)", at=(1,)), called("llama", "alone")
    out = pruned(**call).last_hidden_state[0]
    assert torch.equal(out[3:15], out[2].expand(12, -1)) and not torch.equal(out[15], out[2])


def test_the_loss_reaches_the_embeddings_of_tokens_that_stay():
    pruned, call = pruned_model("llama", at=(0,)), called("llama", "alone")
    call["inputs_embeds"].requires_grad_()
    pruned.train()
    with vp.collect() as traces:
        out = pruned(**call)
    out.last_hidden_state[:, -4:].sum().backward()
    assert (call["inputs_embeds"].grad[0].abs().sum(1) > 0).all()  # those that go were read in the first layer
    assert traces[0].lengths[0] == (13,) and out.cache.get_seq_length() == 19


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused():
    model, pruned, call = lm.language_model("llama"), pruned_model("llama"), called("llama", "alone")
    with pytest.raises(ValueError, match="StaticLayer cannot: leave cache_implementation out"):
        pruned(**call, cache=StaticCache(config=model.config, max_cache_len=64))
    filled = model(inputs_embeds=call["inputs_embeds"], cache=DynamicCache(), use_cache=True).cache
    with pytest.raises(ValueError, match="another model put there"):
        pruned(**lm.only_new(lm.continued(call, *steps((1, 1))), 1), cache=filled)
    cache = pruned(**call, past_key_values=DynamicCache()).cache
    assert [layer.keys.shape[2] for layer in cache.layers] == [19, 13, 10, 9] and not cache.is_croppable
    with pytest.raises(ValueError, match="generate without assistant_model"):
        cache.crop(-1)


def test_calls_that_are_not_understood_are_refused():
    pruned, call = pruned_model("llama"), called("llama", "alone")
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 19\], got \[1, 5\]"):
        pruned(**{**call, "attention_mask": torch.ones(1, 5)})
    with pytest.raises(TypeError, match="set_attn_implementation"):
        pruned(**{**call, "attention_mask": "causal"})
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        pruned(input_ids=torch.tensor([[1]]), inputs_embeds=call["inputs_embeds"])
    with pytest.raises(ValueError, match="no mask for full_attention, only for sliding_attention"):
        pruned(**{**call, "attention_mask": {"sliding_attention": None}})
    with pytest.raises(TypeError, match="does not take output_hidden_states"):
        pruned(**call, output_hidden_states=True)
