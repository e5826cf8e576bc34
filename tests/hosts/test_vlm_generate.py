"""What users do with pruned vision-language models: strategies of generation, several turns, losses, files, and bad input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as hf
from small_vlms import IMAGE_ID, STEPS, VLMS, make
from test_vlm import BATCH, same

import vltprune as vp

KEEP = "random_ratio(mean=0.5, half_width=0.4)"
MODELS = ("llava", "qwen3", "gemma3")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def masked(case, pruned, inputs):
    """The inputs of the dense model that hide what the pruned one drops."""
    with vp.collect() as traces, torch.no_grad():
        pruned(**inputs)
    return inputs | {"attention_mask": case.visible(inputs, traces[0]), "position_ids": case.positions(inputs)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "do_sample": False, "max_new_tokens": 5},
        {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5},
        {"do_sample": False, "use_cache": False, "max_new_tokens": 3},
        {"do_sample": False, "max_length": 50, "min_length": 45},
        {"do_sample": False, "generation_config": hf.GenerationConfig(max_length=50, pad_token_id=0)},
        {"do_sample": False, "cache_implementation": "static", "max_new_tokens": 3},
    ],
    ids=lambda how: next(key for key in reversed(how)),
)
@torch.no_grad()
def test_strategies(name, how):
    case = make(name)
    # one count for all images: a model whose images are one tensor has no other with beams
    pruned, inputs = case.pruned(keep="count(count=2)"), case.prompts(*BATCH)
    hidden = masked(case, pruned, inputs)
    results = []
    for model, given in ((pruned, inputs), (case.model, hidden)):
        torch.manual_seed(2)
        results.append(model.generate(**given, **how))
    assert torch.equal(*results)
    repeats = results[0].shape[0] // len(BATCH)
    assert torch.equal(results[0][:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(repeats, 0))


@torch.no_grad()
def test_beams_of_prompts_with_different_counts():
    case = make("llava")
    pruned, inputs = case.pruned(keep=KEEP), case.prompts(*BATCH)
    how = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5}
    assert torch.equal(pruned.generate(**inputs, **how), case.model.generate(**masked(case, pruned, inputs), **how))
    case = make("internvl")
    inputs = case.prompts(*BATCH)
    with pytest.raises(ValueError, match="one prompt at a time"):
        case.pruned(keep=KEEP).generate(**inputs, **how)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_of_the_tokens_that_stay(name):
    case = make(name)
    pruned, inputs = case.pruned(keep=KEEP), case.prompts(*BATCH)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE_ID) | (inputs["attention_mask"] == 0), -100)
    out = pruned(**inputs, labels=labels)
    with vp.collect() as traces:
        pruned(**inputs)
    visible = case.visible(inputs, traces[0]).bool()
    with torch.no_grad():
        positions = {"position_ids": case.positions(inputs)}
        logits = case.model(**inputs | {"attention_mask": visible.long()} | positions).logits
    rows = [(row[stays][:-1], label[stays][1:]) for row, label, stays in zip(logits, labels, visible, strict=True)]
    want = torch.nn.functional.cross_entropy(*(torch.cat(column) for column in zip(*rows, strict=True)))
    same(out.loss, want)
    out.loss.backward()
    tower = case.model.model.visual if name == "qwen3" else case.model.model.vision_tower
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in tower.parameters())
    case.model.zero_grad()


def test_prompts_without_images():
    case = make("llava")
    inputs = case.prompts((4,), (6,))
    got, want = (model.generate(**inputs, **STEPS) for model in (case.pruned(), case.model))
    same(got.logits, want.logits)


@pytest.mark.parametrize("name", ["llava", "qwen3"])
def test_copies_and_files(name, tmp_path):
    # a model that has returned hidden states cannot be pickled
    case = make.__wrapped__(name)
    pruned, inputs = case.pruned(keep="count(count=3)"), case.prompts(*BATCH)
    want = pruned(**inputs).logits
    pruned.save_pretrained(tmp_path)
    for other in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned)), vp.load(tmp_path)):
        assert type(other) is type(pruned)
        same(other.eval()(**inputs).logits, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "no pixel_values"),
        ({"input_ids": None}, "without input_ids"),
        ({"input_ids": torch.full((1, 7), 5), "attention_mask": None}, "0 placeholders"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, "32 visual tokens"),
        ({"pixel_values": torch.zeros(1, 3, 24, 24)}, "32"),
        ({"mm_encoder_outputs": {}}, "not pruned"),
        ({"attention_mask": torch.ones(1, 1, 23, 23)}, "attention_mask must be"),
        ({"vision_feature_layer": -1}, "vision_feature_layer"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"pixel_values_images": torch.zeros(1, 3, 32, 32)}, "does not take pixel_values_images"),
        (
            {"pixel_values_videos": torch.zeros(1, 3, 32, 32)},
            "no placeholders of videos: leave pixel_values_videos out",
        ),
    ],
)
def test_bad_input(change, message):
    case = make("llava")
    inputs = {key: value for key, value in (case.prompts((3, 4)) | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        case.pruned().generate(**inputs, **STEPS)


def spoiled(case, inputs):
    """Inputs of another model's processor, or of a damaged batch, each with what is said of it."""
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    place = int((ids[0] == IMAGE_ID).nonzero()[0])
    wrong = {
        "more": torch.cat([ids, torch.full((1, 2), IMAGE_ID)], 1),
        "fewer": ids.clone(),
        "none": torch.full_like(ids, 5),
    }
    wrong["fewer"][0, place] = 7
    for changed in wrong.values():
        types = {} if case.types is None else {case.types: (changed == IMAGE_ID).long()}
        count = int((changed == IMAGE_ID).sum())
        message = f"{count} placeholders of images, and the images give {case.rows} visual tokens"
        yield {"input_ids": changed, "attention_mask": torch.ones_like(changed), **types}, message
    yield {"pixel_values": pixels.clone().index_fill(0, torch.tensor([0]), torch.nan)}, "holds NaN or infinity"
    # another image is not of the same size, has other dimensions
    shapes = [(1, 3, 40, 40), (1, 2, 3, 40, 40), (7, 96)]
    for shape in shapes:
        yield {"pixel_values": torch.zeros(shape)}, "pixel_values (must be|are)|and the pixels are"
    for name in inputs.keys() - {"input_ids", "attention_mask", "pixel_values", case.types}:
        yield {name: None}, f"pixel_values is given without {name}"


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_bad_input_of_each_model(name):
    case = make(name)
    inputs = case.prompts((3, 4))
    places = {"preset": "divprune"}, {"preset": "random", "at": {"language": (0,)}, "keep": "ratio(ratio=0.5)"}
    for pruned in (case.pruned(**place) for place in places):
        for change, message in spoiled(case, inputs):
            given = {key: value for key, value in (inputs | change).items() if value is not None}
            for call in (pruned, pruned.generate):
                with pytest.raises(ValueError, match=message):
                    call(**given)


@pytest.mark.parametrize("name", ["qwen2", "qwen2.5", "qwen3"])
@torch.no_grad()
def test_placeholders_of_an_image_stand_in_a_row(name):
    case = make(name)
    inputs, pruned = case.prompts((3, 4, 5)), case.pruned()
    # one image is torn in two; two images have nothing between them
    for start, end, shift in ((3, 10, 4), (9, 19, -4)):
        ids = inputs["input_ids"].clone()
        ids[0, start:end] = ids[0, start:end].roll(shift)
        given = inputs | {"input_ids": ids, case.types: (ids == IMAGE_ID).long()}
        for call in (pruned, pruned.generate):
            with pytest.raises(
                ValueError, match=r"rows of \[.*\] placeholders of images, and the images give \[6, 6\]"
            ):
                call(**given)
    other = inputs | {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 6, 6]])}
    with pytest.raises(ValueError, match="60 patches"):
        pruned(**other)
    odd = inputs | {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 3, 8]])}
    with pytest.raises(ValueError, match="multiples of 2"):
        pruned(**odd)


@torch.no_grad()
def test_drafts_of_the_prompt_need_caches_of_one_length():
    case = make("llava")
    inputs, how = case.prompts((8, 9)), {"do_sample": False, "max_new_tokens": 6, "prompt_lookup_num_tokens": 2}
    pruned = case.pruned(keep="count(count=2)")
    assert torch.equal(
        pruned.generate(**inputs, **how), pruned.generate(**inputs, **how | {"prompt_lookup_num_tokens": None})
    )
    layers = case.pruned("random", keep="ratio(ratio=0.5)", at={"language": (0,)})
    with pytest.raises(ValueError, match="caches of different lengths: leave it out, or prune before"):
        layers.generate(**inputs, **how)


@pytest.mark.parametrize("name", ["llava", "qwen3", "internvl"])
@torch.no_grad()
def test_the_model_inside_takes_no_images(name):
    case = make(name)
    inputs, pruned = case.prompts((3, 4)), case.pruned()
    with pytest.raises(ValueError, match=r"call the whole model, model\(\*\*inputs\)"):
        pruned.model(**inputs)
    words = case.prompts((3,))
    same(pruned.model(**words).last_hidden_state, case.model.model(**words).last_hidden_state)
    assert case.model.model(**inputs).last_hidden_state.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
@torch.no_grad()
def test_tiles_of_an_image_are_those_of_its_size(name):
    case = make(name)
    inputs, pruned = case.prompts((3, 4)), case.pruned()
    pixels, want = inputs["pixel_values"], pruned(**inputs).logits
    same(pruned(**inputs | {"pixel_values": pixels[0]}).logits, want)
    for wrong in (pixels[:, :2], pixels[0, :1], torch.cat([pixels, pixels])):
        with pytest.raises(ValueError, match=r"have \[3\] tiles, and pixel_values are"):
            pruned(**inputs | {"pixel_values": wrong})


@torch.no_grad()
def test_decoding_by_hand():
    case = make("llava")
    pruned, inputs = case.pruned(), case.prompts((3, 4))
    start = pruned(**inputs, use_cache=True)
    following = {"input_ids": torch.tensor([[7]]), "cache": start.cache}
    length = inputs["input_ids"].shape[1]
    hidden = masked(case, pruned, inputs)
    mask = torch.cat([hidden.pop("attention_mask"), torch.ones(1, 1, dtype=torch.int64)], 1)
    hidden["input_ids"] = torch.cat([inputs["input_ids"], following["input_ids"]], 1)
    want = case.model(**hidden | {"attention_mask": mask, "position_ids": torch.arange(length + 1)[None]})
    for given in ({}, {"position_ids": torch.tensor([[length]])}):
        got = pruned(**following | given | {"cache": copy.deepcopy(start.cache)})
        same(got.logits[:, -1], want.logits[:, -1])
