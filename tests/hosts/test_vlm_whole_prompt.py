"""What a pruned vision-language model gives is of the whole prompt: its logits, and the ids that `generate` hands out."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from small_vlms import IMAGE_ID, STEPS, make
from test_vlm import BATCH, same
from test_vlm_generate import KEEP, MODELS, masked

import vltprune as vp
from vltprune.hosts.transformers.vlm.prompt import PER_TOKEN, PromptIndex
from vltprune.hosts.transformers.vlm.whole_prompt import WholeLogits


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def filled(logits, stays):
    """Logits [batch, length, vocabulary], where a token is gone those of the last one that is left before it, else 0."""
    out = torch.zeros_like(logits)
    for row, want, there in zip(out, logits, stays, strict=True):
        for place in there.nonzero().flatten().tolist():
            row[place:] = want[place]
    return out


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_of_the_whole_prompt(name):
    case = make(name)
    pruned, inputs = case.pruned(keep=KEEP), case.prompts(*BATCH)
    hidden = masked(case, pruned, inputs)
    want = filled(case.model(**hidden).logits, hidden["attention_mask"].bool())
    length = want.shape[1]
    same(pruned(**inputs).logits, want)
    same(pruned(**inputs, return_dict=False)[0], want)
    for number in (1, 3, 7, length, length + 9):
        same(pruned(**inputs, logits_to_keep=number).logits, want[:, -number:])
    some = torch.tensor([0, 5, length - 1])
    same(pruned(**inputs, logits_to_keep=some).logits, want[:, some])
    each = torch.randint(length, (len(want), 4))
    same(pruned(**inputs, logits_to_keep=each).logits, want.take_along_dim(each[..., None], 1))
    is_text = (inputs["input_ids"] != IMAGE_ID) & (inputs["attention_mask"] != 0)
    same(pruned(**inputs, logits_to_keep=is_text).logits, want[is_text])


def pruned_at(place):
    """A LLaVA pruned in its image tower, behind it, or there and in the language model."""
    where = {"place": "block", "at": (1,)} if place == "block" else {"place": "output"}
    then = [vp.Stage("key_norm", "count(count=1)", at={"language": (0,)})] if place == "both" else []
    return vp.prune(make("llava").model, vp.PruneConfig("cls_attention", "count(count=3)", then=then, **where))


@pytest.mark.parametrize("place", ["output", "block", "both"])
@torch.no_grad()
def test_all_places_give_the_whole_prompt(place):
    pruned, inputs = pruned_at(place), make("llava").prompts((3, 4), (2, 3, 5))
    is_image = inputs["input_ids"] == IMAGE_ID
    logits, following = pruned(**inputs).logits, pruned.generate(**inputs, **STEPS)
    same(logits[:, -1], following.logits[0])
    is_before = (logits[:, 1:] == logits[:, :-1]).all(-1) & is_image[:, 1:]
    assert logits.shape[:2] == is_image.shape
    # three of each image, or one of each prompt
    left = 2 if place == "both" else 9
    assert int(is_before.sum()) == int(is_image.sum()) - left
    ids, first, *_ = recorded(pruned, {key: value[:1] for key, value in inputs.items()})
    assert torch.equal(first, inputs["input_ids"][:1]) and torch.equal(ids[:, :-3], first)


@torch.no_grad()
def test_only_the_logits_that_are_asked_for_are_computed():
    case = make("llava")
    pruned, inputs = case.pruned(keep="count(count=3)"), case.prompts((3, 4), (5, 2))
    computed = []
    with case.model.lm_head.register_forward_hook(lambda module, args, out: computed.append(out.shape[1])):
        for number in (0, 1, 2, 6):
            pruned(**inputs, logits_to_keep=number)
    # the six last tokens are four words and two visual tokens of one prompt, and two words and four of the other; of these a
    # token that is gone needs the last one that is left
    assert computed[0] == 3 + 3 + 4 and computed[1:3] == [1, 2] and computed[3] <= 6


def test_tokens_with_none_before_them():
    prompt = PromptIndex(torch.tensor([[0, 2, 5], [1, 3, 4]]), 6)
    is_token = torch.tensor([[False, True, True], [True, True, True]])
    whole = WholeLogits.from_prompt(prompt, is_token, 6, 0)
    logits = torch.arange(1.0, 7).view(2, 3, 1).requires_grad_()
    out = whole.expand(logits)
    assert out[..., 0].tolist() == [[0, 0, 2, 2, 2, 3], [0, 4, 4, 5, 6, 6]]
    out.sum().backward()
    assert logits.grad.flatten().tolist() == [0, 3, 1, 2, 1, 2]


def labeled(case, *texts):
    rows = case.prompts(*texts)
    return rows | {"labels": rows["input_ids"].masked_fill(rows["input_ids"] == IMAGE_ID, -100)}


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"eval_strategy": "steps", "eval_steps": 1}])
def test_trainer_compares_logits_with_labels(options, tmp_path):
    case, seen = make.__wrapped__("llava"), []
    rows = [labeled(case, (3, 4)) for _ in range(2)]
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **options}
    trainer = hf.Trainer(
        case.pruned(keep="count(count=3)"),
        hf.TrainingArguments(str(tmp_path), **options),
        lambda given: {key: torch.cat([row[key] for row in given]) for key in given[0]},
        rows,
        rows,
        compute_metrics=lambda result: seen.append(result) or {},
    )
    assert trainer.train().training_loss > 0
    assert all(result.predictions[0].shape[:2] == result.label_ids.shape for result in seen)
    assert len(seen) == int("eval_steps" in options)


def test_a_likelihood_is_sliced_by_the_length_of_the_prompt():
    case = make("llava")
    inputs = labeled(case, (3, 6))
    length = inputs["input_ids"].shape[1] - 2
    inputs["labels"][:, :length] = -100
    out = case.pruned(keep="count(count=3)")(**inputs)
    target = inputs["labels"][0, length:]
    want = -out.logits[0, length - 1 : -1].log_softmax(-1).gather(1, target[:, None]).mean()
    same(out.loss, want)


class Processor(hf.LogitsProcessor):
    """Keeps the ids that `generate` gives it."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


class Criterion(hf.StoppingCriteria):
    """Keeps the ids that `generate` gives it."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **named):
        self.seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Streamer:
    def __init__(self):
        self.seen, self.is_done = [], False

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.is_done = True


def recorded(model, inputs, **how):
    """What parts of the user's own get in a call of `generate`, and what it returns."""
    processor, criterion, prefixes = Processor(), Criterion(), []

    def allowed(row, ids):
        prefixes.append(torch.cat([torch.tensor([row]), ids]))
        return list(range(100))

    how = {"max_new_tokens": 3, "do_sample": False, **how}
    lists = {
        "logits_processor": hf.LogitsProcessorList([processor]),
        "stopping_criteria": hf.StoppingCriteriaList([criterion]),
        "prefix_allowed_tokens_fn": allowed,
    }
    streamer = None if how.get("num_beams") else Streamer()
    out = model.generate(**inputs, **lists, **how, **({} if streamer is None else {"streamer": streamer}))
    streamed = [] if streamer is None else streamer.seen
    assert streamer is None or streamer.is_done
    return [out, *processor.seen, *criterion.seen, *prefixes, *streamed]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=len)
@torch.no_grad()
def test_own_parts_see_the_whole_prompt(name, how):
    case = make(name)
    # one count for all images: a model whose images are one tensor has no other with beams
    texts = BATCH if how else ((2, 3, 5),)
    pruned, inputs = case.pruned(keep="count(count=2)"), case.prompts(*texts)
    got, want = recorded(pruned, inputs, **how), recorded(case.model, masked(case, pruned, inputs), **how)
    assert len(got) == len(want) > 6
    assert all(map(torch.equal, got, want))


BUILT_IN = [
    {"repetition_penalty": 5.0},
    {"repetition_penalty": 5.0, "num_beams": 2},
    {"no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 5.0},
    {"encoder_no_repeat_ngram_size": 1},
    {"min_new_tokens": 4, "eos_token_id": list(range(100))},
    {"min_length": 45, "max_length": 50, "eos_token_id": list(range(100))},
    {"begin_suppress_tokens": list(range(60))},
    {"exponential_decay_length_penalty": (2, 9.0), "eos_token_id": 7},
    {"forced_eos_token_id": 7, "eos_token_id": 7},
    {"prompt_lookup_num_tokens": 2, "repetition_penalty": 5.0},
]


@pytest.mark.parametrize("how", BUILT_IN, ids=lambda how: next(iter(how)))
@torch.no_grad()
def test_own_processors_of_generate_count_the_whole_prompt(how):
    case = make("llava")
    texts = ((2, 3, 5),) if "prompt_lookup_num_tokens" in how else BATCH
    pruned, inputs = case.pruned(keep="count(count=0)"), case.prompts(*texts)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
    if "max_length" in how:
        del how["max_new_tokens"]
    got, want = (
        model.generate(**given, **how)
        for model, given in ((pruned, inputs), (case.model, masked(case, pruned, inputs)))
    )
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_limit_of_the_whole_length_as_a_criterion():
    case = make("llava")
    pruned, inputs = case.pruned(keep="count(count=3)"), case.prompts((3, 4))
    criteria = hf.StoppingCriteriaList([hf.MaxLengthCriteria(26)])
    for limit in ({"max_new_tokens": 9}, {"max_new_tokens": 9, "num_beams": 2}):
        assert pruned.generate(**inputs, **limit, do_sample=False, stopping_criteria=criteria).shape == (1, 26)


@torch.no_grad()
def test_own_parts_see_earlier_turns():
    case = make("llava")
    pruned, first = case.pruned(keep="count(count=2)"), case.prompts((3, 4))
    start = pruned.generate(**first, **STEPS)
    second = {**first, "input_ids": torch.cat([start.sequences, torch.randint(1, 100, (1, 3))], 1)}
    second["attention_mask"] = torch.ones_like(second["input_ids"])
    got, want = recorded(pruned, second, cache=copy.deepcopy(start.cache)), recorded(pruned, second)
    assert torch.equal(got[1], second["input_ids"]) and all(map(torch.equal, got, want))
    new = {"input_ids": second["input_ids"][:, -4:], "attention_mask": second["attention_mask"]}
    gone = second["input_ids"].shape[1] - 4
    out, *want = recorded(pruned, second)[: 1 + 2 * 3]  # what is streamed and allowed is not a row of ids
    got = recorded(pruned, new, cache=start.cache)
    assert all(torch.equal(one, whole[:, gone:]) for one, whole in zip(got, [out, *want], strict=False))


@pytest.mark.parametrize("name", ["llava", "qwen3", "smolvlm"])
@torch.no_grad()
def test_logits_of_new_tokens(name):
    case = make(name)
    pruned, first, more = case.pruned(keep=KEEP), case.prompts((3, 4), (1, 2)), case.prompts((1, 4), (2, 3))
    every = {key: torch.cat([first[key], more[key]], 1) for key in first if key in PER_TOKEN}
    given = more | {"attention_mask": every["attention_mask"]}
    hidden = masked(case, pruned, first)
    cache, dense = pruned(**first).cache, case.model(**hidden).cache
    with vp.collect() as traces:
        got = pruned(**given, cache=copy.deepcopy(cache)).logits
    shown = case.visible(more, traces[0])
    # all images have equal grids
    grids = {key: torch.cat([first[key], more[key]]) for key in first if key == "image_grid_thw"}
    positions = case.positions(first | every | grids)[..., -shown.shape[1] :]
    mask = torch.cat([hidden["attention_mask"], shown], 1)
    want = filled(
        case.model(**more | {"attention_mask": mask, "position_ids": positions}, cache=dense).logits, shown.bool()
    )
    same(got, want)
    same(pruned(**given, cache=cache, logits_to_keep=3).logits, want[:, -3:])
