"""Image towers whose images are cut into tiles, pruned inside: dropping equals masking in the dense tower and in the prompt."""

from __future__ import annotations

import pytest
import torch
from small_vlms import IMAGE_ID, STEPS, make
from test_patch_groups import masking
from test_vlm import BATCH, same

import vltprune as vp

MODELS = ("llava-next", "llava-onevision")
KEEP = "random_ratio(mean=0.5, half_width=0.4)"
INSIDE = {"at": (0, 1), "place": "block", "keep": KEEP}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def prompts(case, sizes):
    """Inputs of a prompt for each list of images, of whose sizes the prompts have the placeholders that these need."""
    every = [size for one in sizes for size in one]
    tiles = torch.randn(len(every), 3, 3, 32, 32)
    images = {"pixel_values": tiles, "image_sizes": torch.tensor(every)}
    rows = [len(one) for one in case.model.get_image_features(**images).pooler_output]
    ids, taken = [], iter(rows)
    for one in sizes:
        parts = [torch.randint(1, IMAGE_ID, (3,))]
        for _ in one:
            parts += [torch.full((next(taken),), IMAGE_ID), torch.randint(1, IMAGE_ID, (2,))]
        ids.append(torch.cat(parts))
    longest = max(map(len, ids))
    pads = [longest - len(one) for one in ids]
    return images | {
        "input_ids": torch.stack(
            [torch.cat([torch.zeros(n, dtype=int), one]) for n, one in zip(pads, ids, strict=True)]
        ),
        "attention_mask": torch.stack([(torch.arange(longest) >= n).long() for n in pads]),
    }


def there(trace, depth, before=False):
    """[tiles, tokens] bool: those that a block of the tower attends to. The last block of some is not read, and has any."""
    layout, depth = trace.input_tokens.layout, min(depth, len(trace.layers))
    kept = torch.zeros(layout.total, dtype=torch.bool)
    left = trace.layers[depth - 1] if depth else trace.input_tokens
    kept[layout.starts[left.layout.instance] + left.position] = True
    return kept.view(layout.batch, -1)


SIZES = {
    "alone": [[(32, 64)]],
    "padding that is cut off": [[(20, 64)]],
    "a batch": [[(32, 64), (64, 20)], [(12, 64)], []],
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dropping_is_masking(name, sizes, monkeypatch):
    case = make(name)
    pruned, inputs = case.pruned("random", **INSIDE), prompts(case, SIZES[sizes])
    with vp.collect() as traces:
        got = pruned.generate(**inputs, **STEPS)
    mask = case.visible(inputs, traces[0])
    given = inputs | {"attention_mask": mask, "position_ids": case.positions(inputs)}
    with masking(case, traces[0], monkeypatch, seen=there):
        want = case.model.generate(**given, **STEPS)
    assert torch.equal(got.sequences, want.sequences)
    same(got.logits, want.logits)
    counts = traces[0].lengths[-1]
    assert len(set(counts)) > 1 and mask.sum() < inputs["attention_mask"].sum()
    features = pruned.get_image_features(**{key: inputs[key] for key in ("pixel_values", "image_sizes")}).pooler_output
    assert sum(map(len, features)) == mask[inputs["input_ids"] == IMAGE_ID].sum()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_keeping_all_is_the_dense_model(name):
    case = make(name)
    inputs = case.prompts(*BATCH)
    pruned = case.pruned("random", **INSIDE | {"keep": "ratio(ratio=1.0)"})
    same(pruned(**inputs).logits, case.model(**inputs).logits)
    # tiles of all images in a row
    inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
    same(pruned(**inputs).logits, case.model(**inputs).logits)


@torch.no_grad()
def test_counts_are_of_tiles():
    case = make("llava-next")
    inputs = case.prompts((3, 4))
    pruned = case.pruned("evit", at=(0,), keep="count(count=3)", reducer="drop")
    # three of 16 patches of each of three tiles, and four newlines; the class token is no visual token
    pixels = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
    assert pruned.get_image_features(**pixels).pooler_output[0].shape[0] == 3 * 3 + 4
    found = vp.visual_tokens(pruned, inputs)
    assert set(found.layers) == {13.0} and found.dense == 52.0


@torch.no_grad()
def test_stages_in_the_tower_behind_it_and_in_the_language_model():
    case = make("llava-next")
    stages = [
        vp.Stage("random", "count(count=5)", place="output", at={"image": None}),
        vp.Stage("key_norm", "count(count=4)", at={"language": (0,)}),
    ]
    model = vp.prune(
        case.model, vp.PruneConfig("random", "count(count=9)", at={"image": (0,)}, place="block", then=stages)
    )
    inputs = case.prompts((3, 4), (2, 2))
    with vp.collect() as traces:
        model.generate(**inputs, **STEPS)
    image, language = traces
    assert image.lengths[0] == (9 + 1,) * 6 and tuple(image.output_tokens.layout.lengths) == (5 + 1,) * 6
    # newlines are no tokens that a layer may drop
    assert language.lengths[-1] == (4 + 4 + 7, 4 + 4 + 4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_tile_is_compared_with_the_text_of_its_prompt(name):
    case = make(name)
    parts = {"place": "block", "at": {"image": (1,)}, "keep": "count(count=4)"}
    pruned, inputs = case.pruned("cdpruner", **parts), case.prompts((3, 4, 2), (5, 6))

    def kept(numbers, prompt):
        pixels = {key: inputs[key][numbers] for key in ("pixel_values", "image_sizes")}
        with vp.collect() as traces:
            pruned(**pixels | {key: inputs[key][prompt] for key in ("input_ids", "attention_mask")})
        tokens = traces[0].output_tokens
        return tokens.layout.instance, tokens.position

    _, together = kept([0, 1, 2], [0, 1])
    alone = torch.cat([kept([0, 1], [0])[1], kept([2], [1])[1]])
    assert torch.equal(together, alone)
    # with another question other patches stay
    before, inputs["input_ids"] = inputs["input_ids"], inputs["input_ids"].clone()
    is_word = (before != IMAGE_ID) & (before != 0)
    inputs["input_ids"][is_word] = torch.randint(1, IMAGE_ID, (int(is_word.sum()),))
    assert not torch.equal(kept([0, 1, 2], [0, 1])[1], together)


@torch.no_grad()
def test_what_is_refused_inside_the_tower():
    case = make("llava-onevision")
    pruned, inputs = case.pruned("random", **INSIDE), case.prompts((3, 4))
    video = {"pixel_values_videos": torch.randn(1, 2, 3, 32, 32)}
    with pytest.raises(ValueError, match=r"average of patches.*place='output' with at=None"):
        pruned(**inputs, **video)
    with pytest.raises(ValueError, match="without image_sizes"):
        pruned(**inputs | {"image_sizes": None})
    with pytest.raises(ValueError, match=r"have .3. tiles, and pixel_values are"):
        pruned(**inputs | {"pixel_values": inputs["pixel_values"][:, :2]})
    with pytest.raises(ValueError, match="vision_aspect_ratio='anyres_max_4': a pruned model runs with its config"):
        pruned(**inputs, vision_aspect_ratio="anyres_max_4")
    case.model.config.vision_aspect_ratio = "anyres_max_1"
    try:
        with pytest.raises(
            ValueError, match=r"more patches than vision_aspect_ratio='anyres_max_1' allows.*place='output'"
        ):
            pruned(**inputs)
    finally:
        case.model.config.vision_aspect_ratio = "anyres_max_9"


def test_copies_files_and_training(tmp_path):
    case = make.__wrapped__("llava-next")
    pruned, inputs = case.pruned("evit", at=(0,), keep="ratio(ratio=0.5)"), case.prompts((3, 4), (2, 3))
    loss = pruned(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert case.model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    pruned.save_pretrained(tmp_path)
    with torch.no_grad():
        same(vp.load(tmp_path).eval()(**inputs).logits, pruned(**inputs).logits)
