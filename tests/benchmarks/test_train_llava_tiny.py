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


def test_a_stopped_run_goes_on_from_its_checkpoint(script, tmp_path, monkeypatch):
    training = importlib.import_module("synthetic_training")
    monkeypatch.setattr(training, "VAL", 2)
    monkeypatch.setattr(script.LlavaTraining, "keep_every", 2)
    look, read = training.Stage(2, 0, 2, 1e-3), training.Stage(2, 3, 3, 1e-3)
    run = script.LlavaTraining(tmp_path, 2, fast=False)
    run.run("look", look)
    run.run("read", read)
    kept = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    begun = script.build_model().state_dict()
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name and not torch.equal(kept[name], begun[name]) for name in kept), part

    again = script.LlavaTraining(tmp_path, 2, fast=False)
    again.run("look", look)
    again.run("read", read)  # has ended
    assert all(torch.equal(weight, kept[name]) for name, weight in again.model.state_dict().items())
    again.run("read", training.Stage(2, 3, 5, 1e-3))
    log = (tmp_path / "train.log").read_text()
    assert again.spent > run.spent > 0 and "read 5 on val: {'all': " in log and "read 3 on val" in log


def test_the_scripts_share_one_training(script, tmp_path, monkeypatch):
    """That of the other model learns from the same kind of pairs, and scores as well."""
    other, training = importlib.import_module("train_nlvr_tiny"), importlib.import_module("synthetic_training")
    monkeypatch.setattr(training, "VAL", 2)
    run = other.BlipTraining(tmp_path, 2)
    for stage in ("look", "read"):
        run.run(stage, training.Stage(2, 2, 1, 1e-3))
    assert set(run.score(run.val)) == {"all", "existence", "attribute", "count", "comparison", "spatial", "negation"}
    assert torch.load(tmp_path / "read.pt", weights_only=True)["step"] == 1
