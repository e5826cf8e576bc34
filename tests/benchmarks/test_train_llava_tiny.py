"""The training of llava_tiny."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import vltprune as vp
from vltprune.data import SyntheticPairs, normalize
from vltprune.data.llava import statement_inputs
from vltprune.data.word_tokenizer import WordTokenizer

BENCHMARKS = Path(vp.__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_llava_tiny")


@torch.no_grad()
def test_sentences_read_behind_shared_images_are_what_the_model_reads(script):
    model = script.build_model().eval()
    pairs = [SyntheticPairs("val", 2, sentences=3)[index] for index in range(2)]
    statements = [sentence for pair in pairs for sentence in pair.sentences]
    images = torch.cat([torch.from_numpy(normalize(pair.images)) for pair in pairs])
    tokens = script.look(model, images)[0][:, 1:].unflatten(0, (-1, 2))
    ids, mask = WordTokenizer().encode(statements)

    hidden = script.hidden_states(model, tokens, ids)[-1][torch.arange(len(ids)), mask.sum(1) - 1]
    ours = model.lm_head(model.model.language_model.norm(hidden))
    inputs = statement_inputs([pair.images for pair in pairs for _ in range(3)], statements)
    torch.testing.assert_close(ours, model(**inputs).logits[:, -1], rtol=0, atol=1e-4)
