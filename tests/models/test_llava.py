"""llava_tiny: how it is built, and what its packaged weights answer."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import vltprune as vp
from vltprune.data import SyntheticPairs
from vltprune.data.llava import END, FALSE, TRUE, VOCABULARY, is_true, llava_processor, statement_inputs
from vltprune.models import zoo

NAME = "llava_tiny"


@pytest.fixture(scope="module")
def trained():
    return vp.create_model(NAME, pretrained=True)


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


@pytest.fixture(scope="module")
def asked(processor):
    """Statements about held-out pairs, as inputs, and their labels."""
    pairs = [SyntheticPairs("test", 200)[index] for index in range(200)]
    inputs = statement_inputs([pair.images for pair in pairs], [pair.sentences[0] for pair in pairs], processor)
    return inputs, torch.tensor([pair.labels[0] for pair in pairs]).bool()


def test_it_is_transformers_own_class():
    model = vp.create_model(NAME)
    assert type(model) is LlavaForConditionalGeneration and not model.training
    assert model.config.text_config.vocab_size == len(VOCABULARY)
    assert model.config.image_seq_length == 64 and model.config.vision_feature_layer == -2


def test_sizes_can_be_given():
    model = vp.create_model(NAME, text_depth=2, patch_size=16)
    assert len(model.model.language_model.layers) == 2 and model.config.image_seq_length == 36
    with pytest.raises(TypeError, match="text_layers"):
        vp.create_model(NAME, text_layers=2)


def test_its_weights_are_small():
    assert sum(file.stat().st_size for file in zoo.packaged(NAME).iterdir()) < 6e6


@torch.no_grad()
def test_it_answers(trained, asked):
    inputs, labels = asked
    answers = torch.cat(
        [is_true(trained(**part).logits) for part in (batch(inputs, start) for start in range(0, 200, 40))]
    )
    assert (answers == labels).float().mean() >= 0.85


def batch(inputs, start, size=40):
    images = slice(2 * start, 2 * (start + size))
    rows = {
        key: value[images if key == "pixel_values" else slice(start, start + size)] for key, value in inputs.items()
    }
    return {**rows, "logits_to_keep": 1}


@torch.no_grad()
def test_it_says_its_answer_and_stops(trained, asked, processor):
    inputs, labels = asked
    rows = {key: value[: 16 if key == "pixel_values" else 8] for key, value in inputs.items()}
    said = trained.generate(**rows, max_new_tokens=5, do_sample=False)[:, rows["input_ids"].shape[1] :]
    assert said.shape == (8, 2) and (said[:, 1] == END).all()
    assert set(said[:, 0].tolist()) <= {TRUE, FALSE}
    words = processor.batch_decode(said, skip_special_tokens=True)
    agrees = [word == str(bool(label)).lower() for word, label in zip(words, labels, strict=False)]
    assert sum(agrees) >= 6


@torch.no_grad()
def test_it_is_saved_and_loaded(trained, asked, tmp_path):
    rows = {key: value[: 4 if key == "pixel_values" else 2] for key, value in asked[0].items()}
    wanted = trained(**rows).logits
    vp.save(trained, tmp_path / "ours")
    trained.save_pretrained(tmp_path / "theirs")
    for model in (vp.load(tmp_path / "ours"), LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs")):
        torch.testing.assert_close(model(**rows).logits, wanted)


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'vltprune\[hf\]'"):
        vp.create_model(NAME)
