"""MADTP on vision-language models with a language model: the guide sees both, and images and prompts have their own counts."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import language_models as lm
import pytest
import torch
from small_vlms import IMAGE_ID, STEPS, make

import vltprune as vp

BATCH = ((3, 4), (2, 3, 5), (4,), (1, 6))
WORDS = {**STEPS, "suppress_tokens": [IMAGE_ID]}
PLACES = {
    "tower": {"at": {"image": (0, 1)}},
    "language": {"at": {"language": (0,)}},
    "both": {"at": {"image": (1,), "language": (0,)}},
    "output": {"place": "output"},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def madtp(case, **parts):
    return case.pruned("madtp", **{"guide": "codebook(anchors=6)", "reducer": "drop", **parts})


def traced(model, inputs, **options):
    with vp.collect() as traces:
        out = model(**inputs, **options)
    return out, {trace.tower: trace for trace in traces}


@contextlib.contextmanager
def masked_tower(tower, trace):
    """Hides what a pruned image tower dropped, from the block behind on, in the dense tower."""
    lengths, hooks = trace.input_tokens.layout.lengths, []
    for depth, layer in enumerate(trace.layers[:-1]):
        there = torch.zeros(len(lengths), lengths[0], dtype=torch.bool)
        there[layer.layout.instance, layer.position] = True
        bias = torch.zeros(there.shape).masked_fill(~there, float("-inf"))[:, None, None]
        block = tower.encoder.layers[depth + 1]
        hooks.append(block.register_forward_pre_hook(lambda module, args, bias=bias: (args[0], bias)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def dense_logits(case, inputs, sequences, traces):
    """The dense model's logits of each new token, with all hidden that a pruned one dropped in its tower and its layers."""
    image, language = traces["image"], traces.get("language")
    visible = case.visible(inputs, image).bool()
    layers = [inputs["attention_mask"].bool() & ~visible]
    # the language model's positions are of the short prompts, padded at the left
    short = int(visible.sum(1).max())
    rows = [torch.nn.functional.pad(row.nonzero().squeeze(1), (short - int(row.sum()), 0)) for row in visible]
    for layer in language.layers[:-1] if language else ():
        there = torch.zeros_like(visible)
        there[layer.layout.instance, torch.stack(rows)[layer.layout.instance, layer.position]] = True
        layers.append(inputs["attention_mask"].bool() & ~there)
    layers += layers[:1] * (2 - len(layers))
    ids, new = sequences[:, :-1], sequences.shape[1] - 1 - inputs["input_ids"].shape[1]
    positions = case.positions(inputs)
    whole = {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1),
        "position_ids": torch.cat([positions, positions[..., -1:] + 1 + torch.arange(new)], -1),
    }
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")
    with lm.masked(model.model.language_model, layers), masked_tower(model.model.vision_tower, image):
        return model(**whole, use_cache=False).logits[:, -new - 1 :]


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_dropping_is_masking(place):
    case = make("llava")
    pruned = madtp(case, **PLACES[place])
    for prompts in (((3, 4),), BATCH):
        inputs = case.prompts(*prompts)
        with vp.collect() as found:
            got = pruned.generate(**inputs, **WORDS)
        traces = {trace.tower: trace for trace in found}
        want = dense_logits(case, inputs, got.sequences, traces)
        assert (torch.stack(got.logits, 1) - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_each_image_and_each_prompt_has_a_count_of_its_own(place):
    case = make("llava")
    pruned = madtp(case, **PLACES[place])
    traces = traced(pruned, case.prompts(*[(3, 4)] * 6))[1]
    towers = [name for name in traces if pruned.pruning.towers[name].pruners]
    assert towers == {"both": ["image", "language"], "language": ["language"]}.get(place, ["image"])
    for trace in (traces[name] for name in towers):
        layer = next(layer for layer in trace.layers if layer.steps)
        assert len(set(layer.lengths)) > 1


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_keeping_all_is_the_dense_model(place):
    case = make("llava")
    inputs = case.prompts(*BATCH)
    pruned = madtp(case, keep="ratio(ratio=1.0)", **PLACES[place])
    got, want = (model.generate(**inputs, **WORDS) for model in (pruned, case.model))
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_the_alignment_loss_reaches_both_sides(place):
    case = make("llava")
    model = copy.deepcopy(case.model).train()
    pruned = vp.prune(model, "madtp", guide="codebook(anchors=6)", **PLACES[place])
    guide = pruned.pruning.guide
    assert {tower: layer.weight.shape for tower, layer in guide.maps.items()} == {
        "image": (48, 32),
        "language": (48, 48),
    }
    traces = traced(pruned, case.prompts((2, 3, 5), (1, 2, 6)))[1]
    loss = vp.losses.alignment(traces["image"].aligned, traces["language"].aligned, images=2)
    loss.backward()
    towers = model.model
    learned = [guide.anchors, guide.maps["image"].weight, guide.maps["language"].weight]
    learned.append(towers.language_model.embed_tokens.weight)
    if place in ("tower", "output"):  # elsewhere the one layer that is pruned
        learned.append(towers.language_model.layers[0].mlp.down_proj.weight)
    if place != "output":
        learned.append(towers.vision_tower.embeddings.patch_embedding.weight)
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in learned)


@pytest.mark.parametrize("place", ["tower", "language"])
def test_the_text_of_a_prompt_is_aligned_and_no_visual_token(place):
    case = make("llava")
    inputs, pruned = case.prompts((3, 4), (1, 6)), madtp(case, **PLACES[place])
    trace = traced(pruned, inputs)[1]["language"]
    got = dataclasses.replace(trace, layers=trace.layers[:1]).aligned
    guide, embed = pruned.pruning.guide, case.model.get_input_embeddings()
    for row, ids in enumerate(inputs["input_ids"]):
        text = embed(ids[inputs["attention_mask"][row].bool() & (ids != IMAGE_ID)])
        mapped = guide.maps["language"](text)
        want = (mapped @ guide.anchors.T / 48**0.5).softmax(0).T @ mapped
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_language_model_stays_dense():
    case = make("llava")
    pruned, inputs = madtp(case), case.prompts((3, 4))
    assert pruned.model.language_model is case.model.model.language_model
    with torch.no_grad():
        out, traces = traced(pruned, inputs)
    assert set(traces) == {"image"}
    # with them its host runs it, and computes the same
    again, traces = traced(pruned, inputs)
    assert set(traces) == {"image", "language"}
    torch.testing.assert_close(again.logits, out.logits, rtol=0, atol=1e-5)
    assert set(traced(case.pruned("divprune"), inputs)[1]) == {"image"}


@torch.no_grad()
def test_it_is_saved_with_its_guide(tmp_path):
    case = make("llava")
    inputs = case.prompts(*BATCH)
    pruned = madtp(case, reducer="fuse", **PLACES["both"])
    vp.fit_guide(pruned, [inputs])
    want = pruned.generate(**inputs, **WORDS)
    vp.save(pruned, tmp_path, only="pruning")
    assert torch.equal(vp.load(tmp_path, case.model).generate(**inputs, **WORDS).sequences, want.sequences)


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5"])
def test_behind_a_projector(name):
    case = make(name)
    scorer = {} if name == "llava-next" else {"scorer": "alignment"}
    pruned, inputs = madtp(case, place="output", **scorer), case.prompts((3, 4), (1, 6))
    traces = traced(pruned, inputs)[1]
    assert traces["image"].output_tokens.layout.total < traces["image"].input_tokens.layout.total
    vp.losses.alignment(traces["image"].aligned, traces["language"].aligned).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in pruned.pruning.guide.parameters())


def test_macs_of_prompts_with_several_images():
    case = make("llava")
    inputs = case.prompts((3, 4), (2, 3, 5))
    cost = vp.count_macs(madtp(case), **inputs)
    assert cost.instances == 2
    # run by its own code or by its host, a language model costs the same
    with torch.enable_grad():
        hosted = vp.CostMeter(pruned := madtp(case))(list(traced(pruned.eval(), inputs)[1].values()))
    assert hosted.dense_total == pytest.approx(cost.dense_total, rel=1e-6)
