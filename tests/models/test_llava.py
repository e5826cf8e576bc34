"""llava_tiny: how it is built and saved."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import vltprune as vp
from vltprune.data import SyntheticPairs
from vltprune.data.llava import VOCABULARY, statement_inputs

NAME = "llava_tiny"


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


@torch.no_grad()
def test_it_is_saved_and_loaded(tmp_path):
    dense, pair = vp.create_model(NAME), SyntheticPairs("test", 1)[0]
    inputs = statement_inputs([pair.images], pair.sentences[0])
    wanted = dense(**inputs).logits
    vp.save(dense, tmp_path / "ours")
    dense.save_pretrained(tmp_path / "theirs")
    for model in (vp.load(tmp_path / "ours"), LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs")):
        torch.testing.assert_close(model(**inputs).logits, wanted)


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'vltprune\[hf\]'"):
        vp.create_model(NAME)
