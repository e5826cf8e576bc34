"""The tasks: which models can do them, how they are read, and BLIP's second stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vltprune as vp
from vltprune import metrics, tasks
from vltprune.data import SyntheticPairs
from vltprune.text import BlipTokenizer


def test_the_tasks_have_names():
    assert {"nlvr", "retrieval"} <= set(tasks.tasks.names())
    with pytest.raises(LookupError, match="did you mean nlvr"):
        tasks.tasks["nlvr2"]


def test_drawn_pairs_need_no_file():
    records = tasks.Nlvr.read("synthetic:val", "nowhere")
    assert records[3].sentence == SyntheticPairs("val", 4)[3].sentences[0]
    with pytest.raises(ValueError, match="no split 'vall'"):
        tasks.Nlvr.read("synthetic:vall", "nowhere")


def test_blip_reads_sentences_as_blip_does(tmp_path, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "both", "are", "dogs", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    model = vp.create_model("blip_nlvr_tiny", vocab_size=30)
    task = tasks.Nlvr.of(model, tmp_path / "vocab.txt")
    record = SyntheticPairs("val", 1)
    statement = tasks.Nlvr.read("synthetic:val", "")[0]
    (ids, mask), counts = task.texts([replace(statement, sentence="Both are (dogs).")])
    assert (ids.tolist(), mask.tolist(), counts) == ([[9, 4, 5, 6, 3]], [[1] * 5], [1])
    long = replace(statement, sentence="dogs " * 60)
    assert task.texts([long])[0][0].shape == (1, 35)
    assert len(record) == 1 and len(BlipTokenizer.load(tmp_path)) == 10


@pytest.mark.parametrize(
    ("task", "model", "complaint"),
    [
        (tasks.Nlvr, "blip_tiny", "nlvr asks about two images, and a Blip reads one"),
        (tasks.Nlvr, "vit_tiny_patch16_224", "a VisionTransformer reads one"),
        (tasks.Retrieval, "blip_nlvr_tiny_evit", "a BlipNlvr gives none: use a model of open_clip"),
    ],
)
def test_models_that_cannot(task, model, complaint):
    with pytest.raises(ValueError, match=complaint):
        task.of(vp.create_model(model))


def test_reranking_judges_the_nearest():
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.7, 0.6]])
    truth = torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 0.0]])
    asked = []

    def match(images, texts):
        asked.append((images.tolist(), texts.tolist()))
        return truth[images, texts]

    by_image, by_text = tasks.rerank(similarity, match, most=2)
    assert asked[:2] == [([0, 0], [0, 1]), ([1, 1], [1, 2])]
    assert by_image.argmax(1).tolist() == [1, 1]  # text 2 matches image 0 best, but was not among its nearest
    assert by_text.argmax(0).tolist() == [1, 0, 0]  # two images: each text's are all judged
    torch.testing.assert_close(by_image[0], torch.tensor([0.9, 1.8, -1e4]))
    found = metrics.recalls(by_image, [0, 0, 1], ranks=(1,), by_text=by_text)
    assert (found["i2t_r1"], found["t2i_r1"]) == (0.5, 1 / 3)


def test_judging_all_by_the_same_measure_changes_nothing():
    similarity = torch.rand(4, 8)
    by_image, by_text = tasks.rerank(similarity, lambda images, texts: similarity[images, texts])
    torch.testing.assert_close(by_image, 2 * similarity)
    torch.testing.assert_close(by_text, 2 * similarity)
