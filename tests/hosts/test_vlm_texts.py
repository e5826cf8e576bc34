"""Visual tokens compared with the text of their prompt, where nobody gives another one."""

from __future__ import annotations

import pytest
import torch
from small_vlms import IMAGE_ID, STEPS, make
from test_vlm import BATCH, check_dropping_is_masking
from torch.nn.functional import cosine_similarity

import vltprune as vp

MODELS = ("llava", "qwen2.5", "qwen3", "internvl", "smolvlm", "gemma3", "paligemma")
NEAREST = {"selector": "top", "keep": "count(count=3)"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def kept(model, inputs):
    """Positions of the visual tokens of each image that stay."""
    with vp.collect() as traces, torch.no_grad():
        model(**inputs)
    tokens = traces[0].output_tokens
    return [part.tolist() for part in tokens.position.split(list(tokens.layout.lengths))]


def nearest(case, inputs):
    """Of each image the three visual tokens that resemble the words of its prompt most; a class token stays."""
    pixels = {name: inputs[name] for name in case.draw([1]).keys() & inputs.keys()}
    features = torch.cat([*case.model.base_model.get_image_features(**pixels, return_dict=True).pooler_output])
    found, words = [], case.model.get_input_embeddings()
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        images, text = int((ids == IMAGE_ID).sum()) // case.rows, words(ids[(ids != IMAGE_ID) & (mask == 1)])
        for _ in range(images):
            image, features = features[: case.rows], features[case.rows :]
            relevance = cosine_similarity(image[:, None], text[None], dim=-1).mean(1)
            found.append((relevance.topk(3).indices.sort().values + case.first).tolist())
    return found


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_words_of_a_prompt_are_compared_behind_the_projector(name):
    case = make(name)
    # in SmolVLM the images of a prompt are one instance
    prompts = ((3, 4), (5, 6)) if name == "smolvlm" else BATCH
    inputs, pruned = case.prompts(*prompts), case.pruned("cdpruner", **NEAREST)
    prefix = [0] if name == "llava" else []
    assert kept(pruned, inputs) == [prefix + one for one in nearest(case, inputs)]


INSIDE = {"place": "block", "at": {"image": (1,)}}


@pytest.mark.parametrize(
    ("name", "place"),
    [("smolvlm", {}), ("idefics3", {}), ("paligemma", {}), ("qwen3", {}), ("internvl", INSIDE), ("gemma3", INSIDE)],
)
@torch.no_grad()
def test_a_batch_keeps_of_each_prompt_what_it_keeps_alone(name, place):
    case = make(name)
    inputs, pruned = case.prompts((2, 3, 5), (3, 4), (6,)), case.pruned("cdpruner", **NEAREST | place)
    by_prompt = name in ("smolvlm", "idefics3")
    per_image = len(inputs["pixel_values"]) // 3
    alone, images = [], 0
    for row, number in enumerate((2, 1)):
        rows = slice(images * per_image, (images + number) * per_image)
        one = {
            key: value[row : row + 1, :number] if by_prompt and key == "pixel_values" else value[row : row + 1]
            for key, value in inputs.items()
        }
        if not by_prompt:
            one |= {"pixel_values": inputs["pixel_values"][rows]}
            one |= {key: value[images : images + number] for key, value in inputs.items() if key == "image_grid_thw"}
        images += number
        alone += kept(pruned, one)
    # a text has an instance without tokens where an instance is a prompt
    assert [one for one in kept(pruned, inputs) if one] == alone


@pytest.mark.parametrize("name", ["llava", "qwen3", "llava-next"])
@torch.no_grad()
def test_prompts_with_one_image_keep_other_tokens_of_it(name):
    case = make(name)
    first, second = case.prompts((3, 4)), case.prompts((3, 4))
    second = {key: first[key] if key in case.draw([1]) else value for key, value in second.items()}
    pruned = case.pruned("cdpruner", keep="ratio(ratio=0.5)")
    assert kept(pruned, first) != kept(pruned, second)
    check_dropping_is_masking(case, pruned, case.prompts(*BATCH))
    # without a prompt, and with the caller's own text, it is the image that decides
    pixels = {key: value for key, value in first.items() if key in case.draw([1])}
    features = pruned.get_image_features(**pixels).pooler_output
    plain = case.pruned("cdpruner", keep="ratio(ratio=0.5)", scorer="equal", guide=None)
    torch.testing.assert_close(features, plain.get_image_features(**pixels).pooler_output)
    with vp.query(torch.randn(1, pruned.pruning.guide.query_dim)):
        assert kept(pruned, first) == kept(pruned, second)


@torch.no_grad()
def test_a_prompt_keeps_the_same_alone_and_in_a_batch_and_before_its_answer():
    case = make("llava")
    inputs, pruned = case.prompts((3, 4), (2, 9)), case.pruned("cdpruner", keep="count(count=5)")
    for row, want in enumerate(kept(pruned, inputs)):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        assert kept(pruned, one) == [want]
        answer = torch.randint(1, IMAGE_ID, (1, 6))
        ids = torch.cat([one["input_ids"], answer], 1)
        labels = torch.cat([torch.full_like(one["input_ids"], -100), answer], 1)
        mask = torch.cat([one["attention_mask"], torch.ones_like(answer)], 1)
        taught = {**one, "input_ids": ids, "attention_mask": mask}
        assert kept(pruned, {**taught, "labels": labels}) == [want]
        assert kept(pruned, taught) != [want]


@torch.no_grad()
def test_both_places_and_the_costs():
    case = make("llava")
    inputs = case.prompts(*BATCH)
    layers = vp.Stage(scorer="random", keep="ratio(ratio=0.5)", reducer="drop", at={"language": 1}, place="block")
    stage = vp.preset("cdpruner").replace(keep="count(count=5)")
    pruned, plain = (
        vp.prune(case.model, config.replace(then=[layers]))
        for config in (stage, stage.replace(guide=None, scorer="equal"))
    )
    with_text, without = (vp.count_macs(model, **inputs).towers["image"].sum() for model in (pruned, plain))
    # the projector runs on all tokens of four images, and each is compared with one text
    assert float(with_text - without) == 4 * 17 * (32 * 48 + 48 * 48 + 48)


@torch.no_grad()
def test_a_trained_query_reads_the_prompt_too():
    case = make("llava")
    inputs = case.prompts((3, 4))
    pruned = case.pruned("trips", guide="text_query(dim=48)", place="block", at={"image": (0,)})
    kept(pruned, inputs)
    pixels = {"pixel_values": inputs["pixel_values"]}
    with pytest.raises(ValueError, match="no text is given"):
        pruned.get_image_features(**pixels)
    with pytest.raises(ValueError, match=r"48 wide, .* takes 32: prune it with guide='text_query\(dim=48\)'"):
        kept(case.pruned("trips", place="block", at={"image": (0,)}), inputs)


def test_placeholders_of_another_number():
    case = make("internvl")
    inputs = case.prompts((3, 4)) | {"pixel_values": torch.zeros(2, 3, 32, 32)}
    with pytest.raises(ValueError, match="4 placeholders of images, and the images give 8 visual tokens"):
        case.pruned("cdpruner").generate(**inputs, **STEPS)
