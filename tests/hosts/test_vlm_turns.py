"""Several turns on one cache, as the dense models take them: the whole conversation, and images of its new part alone."""

from __future__ import annotations

import copy

import language_models as lm
import pytest
import torch
from small_vlms import STEPS, VLMS, WINDOWED, make, samples
from test_vlm import BATCH, same

import vltprune as vp

# in place of placeholders, which models with random weights may write
WORDS = {**STEPS, "suppress_tokens": [110, 111, 112, 113]}
KEEP = "random_ratio(mean=0.5, half_width=0.4)"
MORE = ((0, 5), (4,), (2, 1, 3), (1, 2))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def conversation(case, first, sequences, more):
    """Inputs of a further turn: the whole conversation, with pixels of the new part alone, and with all of them."""
    answer = sequences[:, first["input_ids"].shape[1] :]
    parts = {"input_ids": answer, "attention_mask": torch.ones_like(answer), case.types: torch.zeros_like(answer)}
    if case.types == "token_type_ids" and "PaliGemma" in type(case.model).__name__:
        parts[case.types] += 1  # what it writes sees backward
    named = [name for name in parts if name in first]
    texts = {name: torch.cat([first[name], parts[name], more[name]], 1) for name in named}
    new = {name: value for name, value in more.items() if name not in named}
    old = {name: value for name, value in first.items() if name not in named}
    # samples have the images of a prompt in a row
    along = int(case.draw is samples)
    every = {name: torch.cat([one[name] for one in (old, new) if name in one], along) for name in {**old, **new}}
    return {**texts, **new}, {**texts, **every}


def traced(model, **given):
    with vp.collect() as traces:
        out = model.generate(**given, **WORDS)
    return out, traces


def check_two_turns(case, pruned, prompts, further):
    """Generates twice on one cache, and so does the dense model with what is dropped masked."""
    first, more = case.prompts(*prompts), case.prompts(*further)
    start, traces = traced(pruned, **first)
    visible = case.visible(first, traces[0]) if traces else first["attention_mask"]
    hidden = {"attention_mask": visible, "position_ids": case.positions(first)}
    dense = case.model.generate(**first | hidden, **WORDS)
    same(start.logits, dense.logits)

    second, every = conversation(case, first, start.sequences, more)
    got, traces = traced(pruned, **second, cache=start.cache)
    shown = case.visible(more, traces[0]) if traces else more["attention_mask"]
    written = torch.ones(len(shown), STEPS["max_new_tokens"], dtype=torch.int64)
    hidden = {"attention_mask": torch.cat([visible, written, shown], 1), "position_ids": case.positions(every)}
    want = case.model.generate(**second | hidden, **WORDS, cache=dense.cache)
    same(got.logits, want.logits)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("name", [*VLMS, *WINDOWED])
@torch.no_grad()
def test_dropping_is_masking(name):
    case = make(name)
    check_two_turns(case, case.pruned(keep=KEEP), BATCH, MORE)


@pytest.mark.parametrize("name", ["qwen2.5", "idefics3", "gemma3 window"])
@pytest.mark.parametrize(("prompts", "further"), [(((3, 4),), ((0, 5),)), (((3, 4),), ((3,),)), (((4,),), ((2, 3),))])
@torch.no_grad()
def test_one_prompt_with_and_without_images(name, prompts, further):
    case = make(name)
    check_two_turns(case, case.pruned(keep=KEEP), prompts, further)


@pytest.mark.parametrize("name", ["llava", "llava-onevision", "qwen3", "idefics3", "gemma3 window", "mistral window"])
@torch.no_grad()
def test_layers_of_the_language_model_drop_too(name):
    case = make(name)
    pruned = lm.pruned_twice(case, KEEP)
    first, more = case.prompts((3, 2, 4)), case.prompts((0, 2, 5))
    start, traces = traced(pruned, **first)
    entered = case.visible(first, traces[0]).bool()
    gone = [(~entered).masked_scatter(entered, one) for one in lm.gone(traces[1], entered[entered][None])]
    second, every = conversation(case, first, start.sequences, more)
    got, traces = traced(pruned, **second, cache=start.cache)
    assert [trace.tower for trace in traces] == ["image"]
    # layers prune the first prompt alone
    shown = case.visible(more, traces[0]).bool()
    gone = [torch.cat([one, one.new_zeros(1, STEPS["max_new_tokens"]), ~shown], 1) for one in gone]
    assert gone[1].sum() > gone[0].sum() > 0
    want = lm.dense_logits(case, every, got.sequences, gone)
    same(torch.stack(got.logits, 1), want)


@pytest.mark.parametrize("name", ["llava", "qwen3", "smolvlm", "mistral window"])
@torch.no_grad()
def test_three_turns_in_all_ways(name):
    case = make(name)
    pruned, first = case.pruned(keep=KEEP), case.prompts((3, 4), (1, 2, 2))
    start = pruned.generate(**first, **WORDS)
    second, every = conversation(case, first, start.sequences, case.prompts((2, 3), (2, 3)))
    caches = [copy.deepcopy(start.cache) for _ in range(3)]
    outs = [pruned.generate(**second, **WORDS, past_key_values=caches[0])]
    # with the new tokens alone, and decoded by hand
    new = every["input_ids"].shape[1] - start.sequences.shape[1] + 1
    short = {key: value[:, -new:] if key in ("input_ids", case.types) else value for key, value in second.items()}
    outs.append(pruned.generate(**short, **WORDS, cache=caches[1]))
    assert torch.equal(outs[1].sequences[:, new:], outs[0].sequences[:, every["input_ids"].shape[1] :])
    by_hand = pruned(**short, cache=caches[2])
    same(by_hand.logits[:, -1], outs[0].logits[0])
    third, _ = conversation(case, second, outs[0].sequences, case.prompts((2,), (3,)))
    last = [pruned.generate(**third, **WORDS, cache=cache) for cache in caches[:2]]
    same(outs[1].logits, outs[0].logits)
    same(last[1].logits, last[0].logits)
    words, mask = outs[0].sequences[:, every["input_ids"].shape[1] :], second["attention_mask"]
    for step in range(3):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        by_hand = pruned(input_ids=words[:, step, None], attention_mask=mask, cache=by_hand.cache)
        same(by_hand.logits[:, -1], outs[0].logits[step + 1])


@pytest.mark.parametrize("name", ["qwen2", "smolvlm", "internvl"])
@torch.no_grad()
def test_images_of_earlier_turns_may_be_given_again(name):
    case = make(name)
    # what is kept of an image does not depend on others
    pruned, first = case.pruned(keep="ratio(ratio=0.5)"), case.prompts((3, 4))
    start = pruned.generate(**first, **WORDS)
    second, every = conversation(case, first, start.sequences, case.prompts((0, 5)))
    want = pruned.generate(**second, **WORDS, cache=copy.deepcopy(start.cache))
    got = pruned.generate(**every, **WORDS, cache=copy.deepcopy(start.cache))
    if name != "smolvlm":
        same(got.logits, want.logits)
    text, every = conversation(case, first, start.sequences, case.prompts((3,)))
    want = pruned.generate(**text, **WORDS, cache=copy.deepcopy(start.cache))
    got = pruned.generate(**every, **WORDS, cache=start.cache)
    same(got.logits, want.logits)


@torch.no_grad()
def test_rows_of_a_cache_may_be_repeated():
    case = make("llava")
    pruned, first = case.pruned(keep=KEEP), case.prompts((3, 4), (2, 2))
    start = pruned.generate(**first, **WORDS)
    second, _ = conversation(case, first, start.sequences, case.prompts((2, 3), (4, 1)))
    how, caches = WORDS | {"max_new_tokens": 4, "num_beams": 2}, [copy.deepcopy(start.cache) for _ in range(2)]
    with pytest.raises(ValueError, match=r"holds 2 rows of 2 prompts, and this call has 4.*batch_repeat_interleave"):
        pruned.generate(**second, **how, cache=start.cache)
    for cache in caches:
        cache.batch_repeat_interleave(2)
    beams = pruned.generate(**second, **how, cache=caches[0])
    # the first beam of the first step is the likeliest of both
    sampled = pruned.generate(**second, **WORDS | {"do_sample": True, "num_return_sequences": 2}, cache=caches[1])
    alone = pruned.generate(**second, **WORDS, cache=start.cache)
    same(beams.logits[0], alone.logits[0].repeat_interleave(2, 0))
    same(sampled.logits[0], alone.logits[0].repeat_interleave(2, 0))
    third, _ = conversation(
        case,
        {name: value.repeat_interleave(2, 0) for name, value in second.items() if name != "pixel_values"},
        sampled.sequences,
        case.prompts((2,), (2,), (2,), (2,)),
    )
    assert pruned.generate(**third, **WORDS, cache=caches[1]).sequences.shape[0] == 4
    third["input_ids"][:, : beams.sequences.shape[1]] = beams.sequences.repeat_interleave(2, 0)
    with pytest.raises(ValueError, match="a search with beams put there"):
        pruned.generate(**third, **WORDS, cache=beams.cache)


@pytest.mark.parametrize("at", [None, {"language": (0,)}])
@torch.no_grad()
def test_caches_that_are_refused(at):
    case = make("llava")
    parts = {"keep": "ratio(ratio=0.5)", "scorer": "key_norm", "reducer": "drop", "at": at}
    pruned, other = case.pruned("random", **parts), case.pruned(keep="count(count=2)")
    first, more = case.prompts((3, 4)), case.prompts((2, 3))
    start = pruned.generate(**first, **WORDS)
    second, _ = conversation(case, first, start.sequences, more)
    for model, text in ((case.model, first), (other, first), (case.model, case.prompts((5,)))):
        cache = model.generate(**text, **WORDS).cache
        with pytest.raises(ValueError, match="that another model or a search with beams put there"):
            pruned.generate(**second, **WORDS, cache=cache)
    # copies have the same weights
    pruned, cache = copy.deepcopy((pruned, start.cache))
    with pytest.raises(ValueError, match="behind what the cache holds the prompt has 16 placeholders of images and no"):
        pruned.generate(**second | {"pixel_values": None}, **WORDS, cache=cache)
    with pytest.raises(ValueError, match="16 placeholders of images, and the images give 48"):
        pruned.generate(**second | {"pixel_values": second["pixel_values"].repeat(3, 1, 1, 1)}, **WORDS, cache=cache)
    with pytest.raises(
        ValueError, match="the cache holds the first 30 tokens of the conversation, and the call gives 23"
    ):
        pruned.generate(**first, **WORDS, cache=cache)
    with pytest.raises(ValueError, match="one row for each"):
        pruned.generate(**case.prompts((3, 30), (3, 30)), **WORDS, cache=cache)
    if at is None:
        cache.crop(-10)
        with pytest.raises(ValueError, match="the cache was cropped to"):
            pruned.generate(**second, **WORDS, cache=cache)
    cache.reset()
    same(pruned.generate(**first, **WORDS, cache=cache).logits, start.logits)


@torch.no_grad()
def test_what_a_further_turn_computes():
    case = make("llava")
    pruned, first = case.pruned(keep="count(count=2)"), case.prompts((3, 4))
    start = pruned.generate(**first, **WORDS)
    second, _ = conversation(case, first, start.sequences, case.prompts((2, 3)))
    _, (trace,) = traced(pruned, **second, cache=start.cache)
    assert trace.input_tokens.layout.batch == 1
    (call,) = trace.decode_stats
    # 3 + 2 + 4 of the first prompt and 7 written are in the cache; a word, 2 + 2 + 3 are new
    assert (call.tokens, call.pairs, call.visual) == (8, 8 * (8 + 16), (2,))
    assert (call.dense.tokens, call.dense.pairs, call.dense.visual) == (22, 22 * (22 + 30), (16,))
