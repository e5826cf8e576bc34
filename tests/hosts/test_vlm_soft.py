"""Soft training of vision-language models: a language model attends in part to visual tokens that are there in part."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from small_models import soften
from small_vlms import IMAGE_ID, LLAMA, QWEN_IDS, QWEN_TOWER, ROPE, make

import vltprune as vp
from vltprune.hosts.transformers.vlm.prompt import VisualTokens, visual_tokens

PLACES = {
    "tower": {"at": {"image": (0, 1)}},
    "output": {"place": "output"},
    "language": {"at": {"language": (0,)}},
    "both": {"at": {"image": (1,), "language": (0,)}},
}
PROMPTS = ((3, 4), (2, 3, 5), (1, 6))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def pruned_copy(name, keep="learned(threshold=-0.3)", **parts):
    model = copy.deepcopy(make(name).model)
    scorer = {} if name.startswith("llava") else {"scorer": "alignment"}
    return vp.prune(model, "madtp", keep=keep, **{"guide": "codebook(anchors=5)", "reducer": "drop", **scorer, **parts})


def call(model, inputs):
    """The loss of the text that tokens which stay predict, its last words alone; and the traces."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    with vp.collect() as traces:
        out = model(**inputs, labels=labels)
    return out.loss, traces


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("keep", ["learned(threshold=-0.3)", "threshold(temperature=20.0)"])
def test_a_hard_sigmoid_decides_as_evaluation_does(place, keep):
    model, inputs = pruned_copy("llava", keep, **PLACES[place]), make("llava").prompts(*PROMPTS)
    soft, traces = call(soften(model, 1e-7), inputs)
    hard, plain = call(model.eval(), inputs)
    assert traces[0].lengths == plain[0].lengths
    assert plain[0].output_tokens.layout.total < plain[0].input_tokens.layout.total or place == "language"
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qwen2.5", {"at": {"image": (0, 1)}}),
        ("gemma3", PLACES["output"]),
        ("llava-next", PLACES["output"]),
        ("llava-next", {"at": {"image": (0, 1)}}),
        ("internvl", {"at": {"image": (0, 1)}}),
    ],
)
def test_a_hard_sigmoid_decides_as_evaluation_does_in_other_models(name, parts):
    model, inputs = pruned_copy(name, **parts), make(name).prompts(*PROMPTS)
    soft, traces = call(soften(model, 1e-7), inputs)
    hard, plain = call(model.eval(), inputs)
    assert traces[0].lengths == plain[0].lengths
    assert plain[0].output_tokens.layout.total < plain[0].input_tokens.layout.total
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=1e-5)
    call(soften(model, 0.5), inputs)[0].backward()
    assert all(p.keeper.threshold.grad.abs() > 0 for p in model.pruning.towers["image"].pruners.values())


@pytest.mark.parametrize("place", PLACES)
def test_certain_tokens_are_those_of_the_dense_model(place):
    model, inputs = pruned_copy("llava", "learned(threshold=-1000.0)", **PLACES[place]), make("llava").prompts(*PROMPTS)
    loss, traces = call(soften(model, 0.5), inputs)
    assert {trace.tower for trace in traces} == {"image", "language"}
    want, _ = call(model.host, inputs)
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2.5", "gemma3"])
@torch.no_grad()
def test_a_weight_is_a_bias_of_the_keys(name):
    """log p is added to the logits of a token's key, in each layer; at p near 0 that masks the token."""
    case = make(name)
    pruned = pruned_copy(name, place="output").eval()
    inputs = case.prompts((2, 3))
    is_visual = inputs["input_ids"] == IMAGE_ID
    part = torch.where(is_visual, torch.rand(is_visual.shape), 1.0)
    gone = torch.where(is_visual & (torch.arange(is_visual.shape[1]) % 2 == 0), 1e-30, 1.0)
    encoder = pruned.pruning.towers["language"]
    dense = copy.deepcopy(encoder.host)
    dense.set_attn_implementation("eager")
    x = torch.randn(*is_visual.shape, 48)
    for prob in (part, gone):
        with visual_tokens(VisualTokens(is_visual, prob, prob)):
            got = encoder(inputs_embeds=x, attention_mask=inputs["attention_mask"], use_cache=False).last_hidden_state
        causal = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        bias = (causal + prob.log()[:, None])[:, None]
        masks = dict.fromkeys(("full_attention", "sliding_attention"), bias) if name == "gemma3" else bias
        want = dense(inputs_embeds=x, attention_mask=masks, use_cache=False).last_hidden_state
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    hidden = dense(inputs_embeds=x, attention_mask=(gone == 1).long(), use_cache=False).last_hidden_state
    torch.testing.assert_close(got[gone == 1], hidden[gone == 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen3"])
def test_the_loss_reaches_what_decides_before_the_language_model(name):
    model, inputs = pruned_copy(name, place="output"), make(name).prompts(*PROMPTS)
    call(soften(model, 0.5), inputs)[0].backward()
    (pruner,) = model.pruning.towers["image"].pruners.values()
    assert pruner.keeper.threshold.grad.abs() > 0
    assert model.pruning.guide.anchors.grad.abs().sum() > 0


@pytest.mark.parametrize("keep", ["learned(threshold=-0.3)", "learned(threshold=-0.3, hard=True)"])
def test_the_loss_reaches_what_decides_in_a_layer_of_the_language_model(keep):
    model, inputs = pruned_copy("llava", keep, at={"language": (0,)}), make("llava").prompts(*PROMPTS)
    call(soften(model, 0.5), inputs)[0].backward()
    assert model.pruning.towers["language"].pruners["0"].keeper.threshold.grad.abs() > 0
    assert model.pruning.guide.anchors.grad.abs().sum() > 0


def total(cost):
    """All expected MACs of a call, with gradients."""
    return sum(macs.sum() for macs in cost.towers.values()) + cost.decoder


@pytest.mark.parametrize(("name", "place"), [*(("llava", place) for place in PLACES), ("qwen2.5", "tower")])
def test_expected_macs_end_at_the_counted_ones(name, place):
    model, inputs = pruned_copy(name, **PLACES[place]), make(name).prompts(*PROMPTS)
    cost = vp.CostMeter(model)(call(soften(model, 0.3), inputs)[1])
    total(cost).backward()
    thresholds = [p.grad for name, p in model.named_parameters() if name.endswith("keeper.threshold")]
    assert thresholds and all(gradient < 0 for gradient in thresholds)  # higher thresholds cost less
    hard, plain = (vp.CostMeter(m)(call(m, inputs)[1]) for m in (soften(model, 1e-7), soften(model, 0.0)))
    assert hard.total == pytest.approx(plain.total, rel=1e-5)
    assert hard.dense_total == pytest.approx(plain.dense_total, rel=1e-5)
    assert float(total(cost).detach()) == pytest.approx(cost.total, rel=1e-5)


def test_the_expected_number_of_visual_tokens_enters_the_language_model():
    model, inputs = pruned_copy("llava", place="output"), make("llava").prompts(*PROMPTS)
    image, language = call(soften(model, 0.5), inputs)[1]
    # the class token is protected, and no visual token
    images = image.output_tokens.expected - 1
    prompts = torch.tensor([len(words) for words in ((3, 4), (2, 3, 5), (1, 6))]) - 1
    texts = torch.tensor([7.0, 10.0, 7.0])
    want = torch.stack([one.sum() for one in images.split(prompts.tolist())]) + texts
    torch.testing.assert_close(language.input_tokens.expected, want.double())
    torch.testing.assert_close(image.decode_stats[0].rows, images.sum().float())


def test_what_takes_tokens_for_whole_is_refused():
    model, inputs = soften(pruned_copy("llava", place="output"), 0.5), make("llava").prompts((3, 4))
    with pytest.raises(ValueError, match=r"generate takes tokens for whole.*model\.eval\(\)"):
        model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(ValueError, match="get_image_features takes tokens for whole"):
        model.get_image_features(pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="give the prompt without a cache"):
        model(**inputs, past_key_values=hf.DynamicCache(config=model.config.text_config))
    assert model(**inputs).past_key_values is None
    model = soften(pruned_copy("llava", at={"language": (0,)}), 0.5)
    cache = model(**inputs).past_key_values
    with pytest.raises(ValueError, match="a cache cannot hold tokens"):
        model(input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache, position_ids=torch.tensor([[40]]))


def test_a_language_model_that_no_host_runs_cannot_weigh():
    text = {**LLAMA, "head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "rope_parameters": ROPE}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text |= {"layer_types": ["linear_attention", "full_attention"]}
    vision = {**QWEN_TOWER, "depth": 1, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48}
    config = hf.Qwen3_5Config(text_config=text, vision_config={**vision, "num_position_embeddings": 16}, **QWEN_IDS)
    model = hf.Qwen3_5ForConditionalGeneration(config)
    pruned = vp.prune(model, "random", scorer="equal", keep="learned(threshold=-0.3)", place="output", at=None)
    with pytest.raises(ValueError, match=r"a language model without a host cannot weigh tokens.*docs/supported\.md"):
        soften(pruned, 0.5)(**make("qwen3").prompts((3, 4)))
