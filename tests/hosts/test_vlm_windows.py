"""Vision-language models whose language model has sliding windows shorter than prompts: dropping tokens equals masking them."""

from __future__ import annotations

import copy

import language_models as lm
import pytest
import torch
import transformers as hf
from small_vlms import IMAGE_ID, LLAMA, STEPS, WINDOWED, llava, make
from test_vlm import BATCH, check_dropping_is_masking, same
from test_vlm_generate import KEEP, masked
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vltprune as vp


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_dropping_is_masking(name):
    case = make(name)
    pruned = case.pruned(keep=KEEP)
    check_dropping_is_masking(case, pruned, case.prompts((3, 4)))
    kept = check_dropping_is_masking(case, pruned, case.prompts(*BATCH))
    assert len(set(kept)) > 1


@torch.no_grad()
def test_dropping_inside_the_tower_is_masking():
    case = make("mistral window")
    pruned = case.pruned("divprune", place="block", at=(1,), keep="ratio(ratio=0.5)")
    inputs = case.prompts(*BATCH)
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **STEPS)
    # what the pruned tower makes of the patches that stay, which attend to fewer there
    (trace,) = traces
    features = torch.cat(list(pruned.get_image_features(inputs["pixel_values"]).pooler_output))
    visible = case.visible(inputs, trace)
    whole = torch.zeros(int((inputs["input_ids"] == IMAGE_ID).sum()), features.shape[1])
    whole[visible[inputs["input_ids"] == IMAGE_ID] == 1] = features
    given = {name: value for name, value in inputs.items() if name != "pixel_values"}
    output = BaseModelOutputWithPooling(pooler_output=list(whole.split(case.rows)))
    given |= {
        "attention_mask": visible,
        "position_ids": case.positions(inputs),
        "mm_encoder_outputs": {"image": output},
    }
    want = case.model.generate(**given, **STEPS)
    same(got.logits, want.logits)


@pytest.mark.parametrize("name", ["gemma3 window", "mistral window", "paligemma2 window"])
@torch.no_grad()
def test_layers_of_the_language_model_drop_too(name):
    case = make(name)
    pruned = lm.pruned_twice(case, KEEP)
    for prompts in (((3, 4),), BATCH):
        inputs = case.prompts(*prompts)
        with vp.collect() as traces:
            got = pruned.generate(**inputs, **STEPS)
        image, language = traces
        entered, real = case.visible(inputs, image).bool(), inputs["attention_mask"].bool()
        counts = entered.sum(1)
        read = torch.arange(int(counts.max())) >= counts.max() - counts[:, None]
        gone = [(real & ~entered).masked_scatter(entered, one[read]) for one in lm.gone(language, read)]
        same(torch.stack(got.logits, 1), lm.dense_logits(case, inputs, got.sequences, gone))
    assert gone[1].sum() > gone[0].sum() > 0


@pytest.mark.parametrize("name", ["gemma3 window", "mistral window"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "do_sample": False, "max_new_tokens": 8},
        {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5},
        {"do_sample": False, "use_cache": False, "max_new_tokens": 5},
        {"do_sample": False, "cache_implementation": "static", "max_new_tokens": 8},
    ],
    ids=lambda how: next(key for key in reversed(how) if key != "max_new_tokens"),
)
@torch.no_grad()
def test_strategies(name, how):
    case = make(name)
    pruned, inputs = case.pruned(keep="count(count=2)"), case.prompts(*BATCH)
    results = []
    for model, given in ((pruned, inputs), (case.model, masked(case, pruned, inputs))):
        torch.manual_seed(2)
        results.append(model.generate(**given, **how, output_logits=True, return_dict_in_generate=True))
    assert torch.equal(*(result.sequences for result in results))
    same(*(result.logits for result in results))


@pytest.mark.parametrize("name", ["gemma3 window", "mistral window"])
@torch.no_grad()
def test_decoding_by_hand(name):
    case = make(name)
    pruned, inputs = case.pruned(keep="count(count=2)"), case.prompts((3, 4), (2, 5))
    want = case.model.generate(**masked(case, pruned, inputs), **STEPS)
    new = want.sequences[:, inputs["input_ids"].shape[1] :]
    last = case.positions(inputs)[:, -1:]
    out = pruned(**inputs, use_cache=True)
    logits, cache = [out.logits[:, -1]], out.cache
    for step in range(7):
        # also of a prompt that is read once and continued several times
        cache = copy.deepcopy(cache)
        given = {"input_ids": new[:, step, None], "position_ids": last + step + 1, "cache": cache}
        logits.append(pruned(**given).logits[:, -1])
    same(tuple(logits), want.logits)


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_two_turns_on_one_cache(name):
    case = make(name)
    pruned, first = case.pruned(keep="count(count=2)"), case.prompts((3, 2))
    start = pruned.generate(**first, **STEPS)
    words = torch.randint(1, 100, (1, 3))
    second = {**first, "input_ids": torch.cat([start.sequences, words], 1)}
    second["attention_mask"] = torch.ones_like(second["input_ids"])
    if case.types is not None:
        # what follows the first prompt sees backward, in PaliGemma type 1
        behind = torch.full((1, 8 + 3), int(name == "paligemma2 window"))
        second[case.types] = torch.cat([first[case.types], behind], 1)
    want = case.model.generate(**masked(case, pruned, second), **STEPS)
    got = pruned.generate(**second, **STEPS, cache=start.cache)
    same(got.logits, want.logits)


@pytest.mark.parametrize("name", ["gemma3 window", "mistral window"])
def test_loss_and_gradients(name):
    case = make(name)
    pruned, inputs = case.pruned(keep="count(count=2)"), case.prompts(*BATCH)
    hidden = masked(case, pruned, inputs)
    visible = hidden["attention_mask"].bool()
    real = visible & (inputs["input_ids"] != IMAGE_ID)
    # a word behind an image is predicted by the visual token before it that stays
    labels = inputs["input_ids"].masked_fill(~real, -100)
    labels = labels.masked_fill(~torch.nn.functional.pad(real[:, :-1], (1, 0)), -100)
    losses, gradients = [], []
    for model, given in ((pruned, inputs), (case.model, hidden)):
        case.model.zero_grad()
        loss = model(**given, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([one.grad.clone() for one in case.model.model.language_model.layers.parameters()])
    case.model.zero_grad()
    same(*losses)
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max().clamp(min=1)))


@pytest.mark.parametrize("name", ["gemma3 window", "mistral window"])
def test_the_host_has_the_windows_of_the_dense_code(name):
    case = make(name)
    pruned = case.pruned("madtp", place="output", scorer="column_attention", keep="count(count=2)")
    inputs = case.prompts(*BATCH)
    with torch.no_grad():
        want = pruned(**inputs).logits
    # with gradients and a collector, the guide reads the layers of the language model
    with vp.collect() as traces:
        got = pruned(**inputs).logits
    assert {trace.tower for trace in traces} == {"image", "language"}
    assert len(traces[0].layers[-1].position) < len(traces[0].input_tokens.position)
    is_token = inputs["attention_mask"].bool()
    assert (got[is_token].abs().sum(-1) > 0).all()
    same(got.detach(), want)


@torch.no_grad()
def test_attention_that_cannot_hide_pairs_is_refused():
    model = copy.deepcopy(make("mistral window").model)
    pruned, inputs = vp.prune(model, "divprune", keep="count(count=2)"), make("mistral window").prompts((3, 4))
    model.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(ValueError, match=r"flex_attention counts the sliding window of 12 .* the whole prompt has 23"):
        pruned(**inputs)


@torch.no_grad()
def test_prompts_within_the_window_are_read_as_before():
    case, masks = llava(text=hf.MistralConfig(**LLAMA, sliding_window=26)), []
    pruned, inputs = case.pruned(keep="count(count=2)"), case.prompts((3, 4))
    layer = case.model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda layer, args, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    with hook:
        pruned.generate(**inputs, **STEPS)
    # of the whole prompt's 23 tokens and those behind it, the window has room for three
    assert [mask is None for mask in masks] == [True] * 4 + [False] * 4
