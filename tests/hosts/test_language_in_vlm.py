"""Layers of the language model of vision-language models, under stock `generate`: dropping tokens equals masking them."""

from __future__ import annotations

import copy

import language_models as lm
import pytest
import torch
import transformers as hf
from small_vlms import LLAMA, QWEN_IDS, QWEN_TOWER, ROPE, STEPS, VLMS, make

import vltprune as vp

BATCH = ((3, 4), (2, 3, 5), (4,), (1, 6))
# in place of the words that begin and end an image, which a text may not have
WORDS = {**STEPS, "suppress_tokens": [110, 111, 112, 113]}
PARTS = {"scorer": "key_norm", "keep": "random_ratio(mean=0.5, half_width=0.4)", "reducer": "drop"}


def pruned_vlm(case, **parts):
    return case.pruned("random", **{**PARTS, "at": {"language": (0,)}, **parts})


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_dropping_is_masking_under_generate(name):
    torch.manual_seed(1)
    case = make(name)
    pruned = pruned_vlm(case)
    for prompts in (((3, 4),), BATCH):
        inputs = case.prompts(*prompts)
        with vp.collect() as traces:
            got = pruned.generate(**inputs, **WORDS)
        (trace,) = (trace for trace in traces if trace.tower == "language")
        gone = lm.gone(trace, inputs["attention_mask"].bool())
        assert not (gone[1] & (inputs["input_ids"] != 110)).any()
        want = lm.dense_logits(case, inputs, got.sequences, gone)
        assert (torch.stack(got.logits, 1) - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)
    assert gone[1].any() and len({len(one) for one in trace.layers[0].position.split(trace.lengths[0])}) > 1


def first_step_and_loss(model, inputs):
    """Logits of the first new token, and the loss of the text, but for words that padding would predict."""
    real = inputs["attention_mask"].bool()
    follows = real & torch.nn.functional.pad(real[:, :-1], (1, 0))
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == 110) | ~follows, -100)
    return model.generate(**inputs, **WORDS).logits[0], model(**inputs, labels=labels).loss


@pytest.mark.parametrize("name", ["llava", "qwen3", "gemma3"])
@torch.no_grad()
def test_keeping_all_is_the_dense_model(name):
    torch.manual_seed(1)
    case = make(name)
    pruned, inputs = pruned_vlm(case, keep="ratio(ratio=1.0)"), case.prompts(*BATCH)
    for got, want in zip(*(first_step_and_loss(model, inputs) for model in (pruned, case.model)), strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ["llava", "qwen2.5", "gemma3"])
@torch.no_grad()
def test_two_turns_on_one_cache(name):
    torch.manual_seed(1)
    case = make(name)
    pruned, first = pruned_vlm(case), case.prompts((3, 4))
    with vp.collect() as traces:
        got = pruned.generate(**first, **WORDS)
    gone = lm.gone(traces[-1], first["attention_mask"].bool())
    words = torch.randint(1, 100, (1, 3))
    second = {**first, "input_ids": torch.cat([got.sequences, words], 1)}
    second["attention_mask"] = torch.ones_like(second["input_ids"])
    if case.types is not None:
        second[case.types] = (second["input_ids"] == 110).long()
    got = pruned.generate(**second, **WORDS, cache=got.cache)
    want = lm.dense_logits(case, second, got.sequences, gone)
    assert (torch.stack(got.logits, 1) - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)


@torch.no_grad()
def test_ways_of_generating():
    torch.manual_seed(1)
    case = make("llava")
    pruned, inputs = pruned_vlm(case, keep="ratio(ratio=0.5)"), case.prompts((3, 4), (2, 3, 5))
    want = pruned.generate(**inputs, **WORDS)
    one_by_one = pruned.generate(**inputs, **{**WORDS, "use_cache": False})
    assert torch.equal(one_by_one.sequences, want.sequences)
    assert pruned.generate(**inputs, **WORDS, num_beams=3, num_return_sequences=2).sequences.shape == (
        4,
        want.sequences.shape[1],
    )
    assert pruned.generate(**inputs, **{**WORDS, "do_sample": True}).sequences.shape == want.sequences.shape
    for option, message in (
        ({"cache_implementation": "static"}, "leave cache_implementation out"),
        ({"cache_implementation": "quantized"}, "leave cache_implementation out|quanto|hqq"),
        ({"prefill_chunk_size": 4}, "leave prefill_chunk_size out"),
    ):
        with pytest.raises((ValueError, ImportError), match=message):
            pruned.generate(**inputs, **WORDS, **option)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens= takes drafts out of the cache again"):
        pruned.generate(**case.prompts((3, 4)), **WORDS, prompt_lookup_num_tokens=2)


@torch.no_grad()
def test_pruned_behind_the_tower_and_in_the_language_model():
    torch.manual_seed(1)
    case = make("llava")
    at = {"scorer": "key_norm", "reducer": "drop", "keep": "ratio(ratio=0.5)"}
    config = vp.PruneConfig(**at, place="output", then=[vp.Stage(**at, at={"language": 0})])
    pruned = vp.prune(case.model, config)
    with vp.collect() as traces:
        pruned.generate(**case.prompts((3, 4)), **WORDS)
    image, language = traces
    assert (image.lengths[-1], language.input_tokens.layout.lengths, language.lengths[0]) == ((9,), (15,), (11,))


@pytest.mark.parametrize("preset", ["fastv", "pyramiddrop", "sparsevlm", "vtw"])
@torch.no_grad()
def test_presets_run_and_are_saved(preset, tmp_path):
    torch.manual_seed(1)
    case = make("llava")
    pruned, inputs = case.pruned(preset), case.prompts((3, 4), (2, 3, 5))
    want = pruned.generate(**inputs, **WORDS)
    vp.save(pruned, tmp_path, only="pruning")
    loaded = vp.load(tmp_path, case.model)
    assert torch.equal(loaded.generate(**inputs, **WORDS).sequences, want.sequences)


def test_the_loss_trains_the_whole_model():
    torch.manual_seed(1)
    case = make("llava")
    model = copy.deepcopy(case.model).train()
    pruned = vp.prune(model, "fastv", at={"language": 0})
    inputs = case.prompts((3, 4), (2, 3, 5))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 110, -100)
    pruned(**inputs, labels=labels).loss.backward()
    unreached = [name for name, parameter in pruned.named_parameters() if parameter.grad is None]
    # the block behind the one that the projector reads
    assert all("vision_tower" in name for name in unreached)


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
@torch.no_grad()
def test_rows_that_end_a_line_stay(name):
    torch.manual_seed(1)
    case = make(name)
    with vp.collect() as traces:
        pruned_vlm(case, keep="count(count=0)").generate(**case.prompts((3, 4)), **WORDS)
    assert traces[-1].lengths[0] == (3 + 4 + 4,)  # of four lines


def test_macs_of_a_pruned_language_model():
    torch.manual_seed(1)
    case = make("llava")
    inputs = case.prompts((3, 4), (2, 3, 5))
    behind, inside = (
        vp.visual_tokens(case.pruned("random", **{**PARTS, "keep": "ratio(ratio=0.5)", **where}), inputs)
        for where in ({"place": "output"}, {"at": {"language": (0,)}})
    )
    assert inside.dense_macs == pytest.approx(behind.dense_macs)
    assert (inside.dense, inside.layers) == (24, (24, 12))
    # per token: query, key, value and output 48 x (48 + 24 + 24 + 48), MLP 3 x 48 x 64; per pair 2 x 48; logits 48 x 120
    linear, mlp, pair, words = 48 * 144, 3 * 48 * 64, 96, 2 * 48 * 120
    whole, left = (23, 42), (15, 26)
    wanted = linear * sum(whole) + pair * sum(n * n for n in whole) + mlp * sum(left) + words
    wanted += (linear + mlp) * sum(left) + pair * sum(n * n for n in left)
    # the output projection of the first layer runs on what is left
    assert inside.macs["prefill"] == pytest.approx(wanted - 48 * 48 * (sum(whole) - sum(left)))


def test_language_models_that_no_host_runs_are_refused():
    text = {**LLAMA, "head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "rope_parameters": ROPE}
    text |= {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }
    vision = {**QWEN_TOWER, "depth": 1, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48}
    config = hf.Qwen3_5Config(text_config=text, vision_config={**vision, "num_position_embeddings": 16}, **QWEN_IDS)
    model = hf.Qwen3_5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="a Qwen3_5TextModel, whose recurrent layers keep what they have read"):
        vp.prune(model, "fastv")
    vp.prune(model, "divprune", at=None)


def test_activation_checkpointing_gives_the_same_gradients():
    torch.manual_seed(1)
    case = make("llava")
    pruned, inputs = vp.prune(copy.deepcopy(case.model).train(), "fastv", at={"language": 0}), case.prompts((3, 4))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 110, -100)
    found = []
    for enable in (False, True):
        if enable:
            pruned.activation_checkpointing_enable()
        pruned.zero_grad()
        pruned(**inputs, labels=labels).loss.backward()
        found.append([parameter.grad for parameter in pruned.parameters() if parameter.grad is not None])
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(once, again)


@pytest.mark.parametrize("name", ["llava", "qwen2.5", "paligemma"])
@torch.no_grad()
def test_pooling_has_the_grid_of_the_images(name):
    case = make(name)
    inputs = case.prompts((3, 4), (2, 3, 5))
    pruned = vp.prune(case.model, "pooling", at={"language": (0,)}, keep="ratio(ratio=0.25)")
    with vp.collect() as traces:
        pruned(**inputs)
    trace = next(trace for trace in traces if trace.tower == "language")
    visual = trace.output_tokens.columns["grid"][trace.output_tokens.free]
    # a mean stands at the last of its cell: 2 x 2 of images of 4 x 4; of Qwen-VL 2 x 2 or 2 x 3, of images of 2 x 3
    one = {(1, 1), (1, 2)} if name == "qwen2.5" else {(1, 1), (1, 3), (3, 1), (3, 3)}
    two = {(1, 2), (3, 2)} if name == "qwen2.5" else {(row, column) for row in (1, 3, 5, 7) for column in (1, 3)}
    got = [{tuple(place) for place in part.tolist()} for part in visual.split(trace.output_tokens.available.lengths)]
    assert got == [one, two]


@torch.no_grad()
def test_macs_of_pruners_before_a_layer():
    torch.manual_seed(1)
    case = make("llava")
    inputs, parts = case.prompts((3, 4), (2, 3, 5)), {**PARTS, "keep": "ratio(ratio=0.5)", "at": {"language": (1,)}}
    linear, mlp, pair, words = 48 * 144, 3 * 48 * 64, 96, 2 * 48 * 120
    whole, left = (23, 42), (15, 26)
    first = (linear + mlp) * sum(whole) + pair * sum(n * n for n in whole)
    second = (linear + mlp) * sum(left) + pair * sum(n * n for n in left)
    # keys of all tokens are read, and queries and values are computed with them; `equal` reads none
    for scorer, read in (("key_norm", 48 * 96 * (sum(whole) - sum(left))), ("equal", 0)):
        found = vp.visual_tokens(case.pruned("random", **{**parts, "place": "before", "scorer": scorer}), inputs)
        assert found.layers == (24, 12)
        assert found.macs["prefill"] == pytest.approx(first + second + words + read)


@torch.no_grad()
def test_labels_say_which_token_ends_the_instruction():
    torch.manual_seed(1)
    case = make("llava")
    inputs = case.prompts((3, 7), (2, 6))
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True).attentions[1].mean(1)
    pruned = case.pruned("pyramiddrop", at={"language": 1}, keep="count(count=4)")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    rows = {-1: {}, -4: {"labels": labels}}
    found = {}
    for row, given in rows.items():
        with vp.collect() as traces:
            pruned(**inputs, **given)
        layer = traces[-1].layers[1]
        found[row] = layer.position[~layer.protected].tolist()
        wanted = maps[:, row].masked_fill(inputs["input_ids"] != 110, -1).topk(4).indices.sort().values
        assert found[row] == wanted.flatten().tolist()
    assert found[-1] != found[-4]
