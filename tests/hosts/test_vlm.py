"""Vision-language models pruned between the image tower and the language model: dropping tokens equals masking them."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers as hf
from small_vlms import IMAGE_ID, STEPS, VLMS, make

import vltprune as vp

BATCH = ((3, 4), (2, 3, 5), (4,), (1, 6))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def same(got, want):
    """Logits, one tensor or one a step, are equal to 1e-5 of the largest, which is rounding in single precision."""
    largest = max(float(one.detach().abs().max()) for one in (want if isinstance(want, tuple) else (want,)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(largest, 1.0))


def check_dropping_is_masking(case, pruned, inputs):
    """Generates both ways; returns how many visual tokens each image keeps."""
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **STEPS)
    masked = inputs | {"attention_mask": case.visible(inputs, traces[0]), "position_ids": case.positions(inputs)}
    want = case.model.generate(**masked, **STEPS)
    assert torch.equal(got.sequences, want.sequences)
    same(got.logits, want.logits)
    return [length - case.first for length in traces[0].lengths[-1]]


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_dropping_is_masking(name):
    case = make(name)
    pruned = case.pruned(keep="random_ratio(mean=0.5, half_width=0.4)")
    check_dropping_is_masking(case, pruned, case.prompts((3, 4)))
    kept = check_dropping_is_masking(case, pruned, case.prompts(*BATCH))
    assert len(set(kept)) > 1


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_keeping_all_is_the_dense_model(name):
    case = make(name)
    inputs = case.prompts(*BATCH)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    pruned = case.pruned(keep="ratio(ratio=1.0)")
    got, want = (model.generate(**inputs, **STEPS) for model in (pruned, case.model))
    assert torch.equal(got.sequences, want.sequences)
    same(got.logits, want.logits)
    same(pruned(**inputs).logits, case.model(**inputs).logits)
    after = case.model.state_dict()
    assert before.keys() == after.keys() == pruned.state_dict().keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


PRESETS = (
    "fastervlm visionzip prumerge vispruner divprune cdpruner hiprune vscan dart scissor flowcut random pooling evit"
)


@pytest.mark.parametrize("preset", PRESETS.split())
@torch.no_grad()
def test_a_count_is_what_enters_the_language_model(preset):
    case = make("llava")
    inputs, seen = case.prompts((3, 4), (2, 3, 5)), []
    pruned = case.pruned(preset, keep="count(count=6)")
    # what is fused, and what PruMerge makes of the rest, is one token more
    count = 7 if preset in ("prumerge", "evit") else 6
    hook = case.model.model.language_model.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with hook, vp.collect() as traces:
        pruned(**inputs)
    assert [length - case.first for length in traces[0].lengths[-1]] == [count] * 3
    assert seen == [2 + 3 + 5 + 2 * count]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"preset": "fastervlm"}, "reads attention of the image tower|reads the attention of a summary token"),
        ({"preset": "divprune", "at": {"text": None}}, "names the tower 'text'"),
    ],
)
def test_what_pruning_behind_a_projector_refuses(parts, message):
    with pytest.raises(ValueError, match=message):
        make("llava-onevision").pruned(**parts)


def test_a_model_with_a_generate_of_its_own_is_refused():
    config = hf.JanusConfig()
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    with torch.device("meta"):
        model = hf.JanusForConditionalGeneration(config)
    with pytest.raises(TypeError, match="is its own"):
        vp.prune(model, "divprune")


def test_attention_of_an_image_tower_that_is_not_known():
    config = hf.AyaVisionConfig()
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    config.vision_config.num_attention_heads = 16
    with torch.device("meta"):
        model = hf.AyaVisionForConditionalGeneration(config)
    with pytest.raises(ValueError, match="choose parts that read contents"):
        vp.prune(model, "dart")
    with pytest.raises(ValueError, match="pruned behind its projector alone: write place='output'"):
        vp.prune(model, "divprune", place="block", at={"image": (1,)})


@pytest.mark.parametrize("name", ["qwen2", "qwen2.5", "qwen3"])
@torch.no_grad()
def test_statistics_are_means_over_the_patches_of_a_visual_token(name, monkeypatch):
    case, maps = make(name), []
    module = sys.modules[type(case.model).__module__]
    eager = module.eager_attention_forward

    def record(*args, **named):
        out = eager(*args, **named)
        maps.append(out[1])
        return out

    inputs, visual = case.prompts((1, 2, 3)), case.model.model.visual
    monkeypatch.setattr(module, "eager_attention_forward", record)
    visual.set_attn_implementation("eager")
    visual(inputs["pixel_values"], inputs["image_grid_thw"])
    visual.set_attn_implementation("sdpa")
    # the last block attends within each of the two images; patches of a visual token are side by side
    received = torch.stack([one[0].mean(0).sum(0) for one in maps[-2:]]).unflatten(1, (6, 4)).mean(2)
    if name == "qwen2.5":
        # in windows of 2 x 2 visual tokens, of an image of 2 x 3
        received = received[:, torch.tensor([0, 1, 3, 4, 2, 5]).argsort()]
    pruned = case.pruned("fastervlm", scorer="column_attention", keep="count(count=2)")
    with vp.collect() as traces:
        pruned(**inputs)
    assert traces[0].output_tokens.position.tolist() == received.topk(2).indices.sort().values.flatten().tolist()
    check_dropping_is_masking(case, pruned, inputs)
    for preset in ("visionzip", "dart"):
        case.pruned(preset, scorer="column_attention" if preset == "visionzip" else "key_norm")(**inputs)


@torch.no_grad()
def test_class_attention_of_tiles_goes_where_their_patches_go():
    case = make("llava-next")
    inputs, tower = case.prompts((3, 4)), case.model.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(inputs["pixel_values"][0], output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    # of the last block but one, whose output the projector reads
    whole, left, right = maps[-2][:, :, 0, 1:].mean(1).unflatten(1, (4, 4))
    lines = torch.cat([left, right, torch.full((4, 1), torch.inf)], 1)
    kept = torch.cat([whole.flatten(), lines.flatten()]).topk(5 + 4).indices.sort().values
    pruned = case.pruned("fastervlm", keep="count(count=5)")
    with vp.collect() as traces:
        pruned(**inputs)
    assert traces[0].output_tokens.position.tolist() == kept.tolist()
    check_dropping_is_masking(case, pruned, inputs)


@pytest.mark.parametrize("name", ["paligemma", "gemma3", "internvl", "smolvlm", "idefics3"])
@torch.no_grad()
def test_attention_that_patches_receive(name):
    case = make(name)
    inputs, base = case.prompts((3, 4)), case.model.model
    tower = base.vision_tower if hasattr(base, "vision_tower") else base.vision_model
    tower.set_attn_implementation("eager")
    maps = tower(inputs["pixel_values"].flatten(0, -4), output_attentions=True).attentions[-1].mean(1)
    tower.set_attn_implementation("sdpa")
    # InternVL has a class token
    received = maps[:, 0, 1:] if name == "internvl" else maps.sum(1)
    if name != "paligemma":
        received = torch.nn.functional.avg_pool2d(received.view(1, 4, 4), 2).flatten(1)
    parts = {} if name == "internvl" else {"scorer": "column_attention"}
    pruned = case.pruned("fastervlm", keep="count(count=2)", **parts)
    with vp.collect() as traces:
        pruned(**inputs)
    assert traces[0].output_tokens.position.tolist() == received[0].topk(2).indices.sort().values.tolist()
    check_dropping_is_masking(case, pruned, inputs)
    for preset in ("visionzip", "vispruner"):
        assert case.pruned(preset, **parts)(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("name", ["llava-next", "gemma3", "internvl", "smolvlm"])
@torch.no_grad()
def test_attention_is_computed_once_and_leaves_the_tower_as_it_was(name):
    case, calls = make.__wrapped__(name), []
    inputs, base = case.prompts((3, 4)), case.model.model
    tower = base.vision_tower if hasattr(base, "vision_tower") else base.vision_model
    queries = [module for key, module in tower.named_modules() if key.endswith("q_proj")]
    hooks = [module.register_forward_hook(lambda module, *_: calls.append(module)) for module in queries]
    case.pruned("fastervlm", scorer="column_attention")(**inputs)
    assert calls == queries
    for hook in hooks:
        hook.remove()
    assert not any(module._forward_hooks for module in tower.modules())
    assert {module.config._attn_implementation for module in tower.modules() if hasattr(module, "config")} == {"sdpa"}


@pytest.mark.parametrize("name", ["llava", "qwen3", "gemma3"])
def test_features_are_of_the_tokens_that_stay(name):
    case = make(name)
    pixels = case.draw([2])
    given = pixels.pop("pixel_values")
    features = case.pruned(keep="count(count=3)").get_image_features(given, **pixels).pooler_output
    assert [len(one) for one in features] == [3, 3]


def test_a_language_model_that_no_stage_names_stays_dense():
    case = make("llava")
    assert case.pruned().model.language_model is case.model.model.language_model


def test_newlines_stay():
    case = make("llava-next")
    inputs = case.prompts((3, 4))
    with vp.collect() as traces:
        case.pruned(keep="count(count=5)").generate(**inputs, **STEPS)
    # four rows of patches end with one each
    assert traces[0].lengths[-1] == (5 + 4,)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
@torch.no_grad()
def test_an_image_and_a_video_in_one_prompt(name):
    case = make(name)
    # Qwen3-VL has words, its time stamps, between frames
    frames = [*[111] * 6, *([9] if name == "qwen3" else []), *[111] * 6]
    ids = torch.tensor([[1, 2, *[IMAGE_ID] * 6, 3, *frames, 4, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **case.draw([1])}
    inputs["mm_token_type_ids"] = (ids == IMAGE_ID).long() + 2 * (ids == 111).long()
    inputs |= {"pixel_values_videos": torch.randn(48, 96), "video_grid_thw": torch.tensor([[2, 4, 6]])}
    pruned = case.pruned(keep="count(count=4)")
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **STEPS)
    mask = case.visible(inputs, traces[0])
    video = torch.zeros(12, dtype=torch.int64).index_fill(0, traces[1].output_tokens.position, 1)
    hidden = {"attention_mask": mask.masked_scatter(ids == 111, video), "position_ids": case.positions(inputs)}
    want = case.model.generate(**inputs | hidden, **STEPS)
    same(got.logits, want.logits)
    assert torch.equal(got.sequences, want.sequences) and int(video.sum()) == 4
