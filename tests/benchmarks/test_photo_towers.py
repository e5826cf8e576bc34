"""The models that benchmarks start from are the trained encoders they are made of. Needs what test_real_weights.py needs."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vltprune as vp
from vltprune.data.images import list_images, load_image
from vltprune.evaluation.tasks import Retrieval

ROOM = Path(os.environ.get("VLTPRUNE_REAL") or os.devnull)
TOWERS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "photo_towers.py"))
PARTS = (ROOM / TOWERS["VIT"], ROOM / TOWERS["MINILM"] / "model.safetensors", ROOM / "photographs")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not all(part.exists() for part in PARTS),
        reason="VLTPRUNE_REAL names no folder with all that the head of test_real_weights.py lists",
    ),
]
SENTENCES = ("A dog runs through the snow.", "Two children in red jackets build a castle out of wet sand.", "No.")


@pytest.fixture(scope="module")
def vit():
    return TOWERS["image_encoder"](ROOM, 112)


@pytest.fixture(scope="module")
def bert():
    return TOWERS["sentence_encoder"](ROOM)


@pytest.fixture(scope="module")
def words():
    """Ids and mask of SENTENCES."""
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(ROOM / TOWERS["MINILM"])(list(SENTENCES), padding=True, return_tensors="pt")
    return read.input_ids, read.attention_mask


def photographs(prepare):
    return torch.stack([prepare(load_image(path)) for path in list_images(ROOM / "photographs")[:4]])


def assert_near(got, want, tolerance=1e-4):
    """Relative to the largest number."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@torch.no_grad()
def test_the_dual_encoder_is_both_encoders_and_a_projection(vit, bert, words):
    model = TOWERS["dual_encoder"](ROOM, embed_dim=64)
    images = photographs(vp.transforms(model))
    assert torch.equal(images, photographs(vp.transforms(vit)))
    assert_near(model.encode_image(images), vit(images) @ model.visual.head.proj.weight.T)

    ids, mask = words
    states = bert(ids, attention_mask=mask).last_hidden_state
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    (read,) = Retrieval.from_model(model).encode(SENTENCES)
    assert torch.equal(read[:, : ids.shape[1]], ids) and read.shape[1] == 40
    assert_near(model.encode_text(read), mean @ model.text.proj.weight.T)
    assert model.logit_scale.exp() == pytest.approx(1 / 0.07)


@torch.no_grad()
def test_the_dual_encoder_is_saved_whole(words, tmp_path):
    model = vp.prune(TOWERS["dual_encoder"](ROOM, embed_dim=64), "evit")
    again = vp.load(vp.save(model, tmp_path))
    images = photographs(vp.transforms(again))
    assert torch.equal(model.encode_image(images), again.encode_image(images))
    assert torch.equal(model.encode_text(words[0]), again.encode_text(words[0]))


@torch.no_grad()
def test_the_dual_encoder_keeps_its_weights_at_another_size():
    model = TOWERS["dual_encoder"](ROOM, image_size=56, embed_dim=64)
    for size in (56, 84):
        other = TOWERS["resized"](model, ROOM, size)
        own, theirs = model.state_dict(), other.state_dict()
        changed = [key for key in own if not torch.equal(own[key], theirs[key])]
        assert changed == ([] if size == 56 else ["visual.trunk.pos_embed"])
        assert other.encode_image(photographs(vp.transforms(other))).isfinite().all()
    there, here = own["visual.trunk.pos_embed"], theirs["visual.trunk.pos_embed"]
    assert here.shape == (1, 1 + 6 * 6, 384) and torch.equal(here[:, 0], there[:, 0])  # the class token's is its own
    grid = there[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grown = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
    assert_near(here[:, 1:], grown.flatten(2).mT, 1e-5)


@torch.no_grad()
def test_the_model_that_answers_sees_and_reads_as_both_encoders(vit, bert, words):
    model = TOWERS["vqa_model"](ROOM)
    want = vit.forward_features(photographs(vp.transforms(vit)))
    assert_near(model.visual(photographs(vp.transforms(model))), want)  # of the same images, as each wants them

    ids, mask = words
    want = bert(ids, attention_mask=mask).last_hidden_state
    for tower in (model.text, model.decoder.body):
        assert_near(tower(ids, mask)[mask.bool()], want[mask.bool()])
    assert model.decoder.body.word.num_embeddings == bert.config.vocab_size + 2
    cross = [key for key in model.text.state_dict() if ".cross." in key]
    assert cross and not torch.equal(model.text.state_dict()[cross[0]], model.decoder.body.state_dict()[cross[0]])


@torch.no_grad()
def test_the_model_that_answers_can_be_pruned_and_saved(words, tmp_path):
    model = vp.prune(TOWERS["vqa_model"](ROOM), "evit")
    again = vp.load(vp.save(model, tmp_path))
    images = photographs(vp.transforms(again))[:3]
    answers = [each(images, *words, words[0]) for each in (model, again)]
    assert torch.equal(*answers) and answers[0].shape == (*words[0].shape, 30524)
