"""The tasks: which models can do them, how they are read, and BLIP's second stage."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vltprune as vp
from vltprune import data
from vltprune.data import SyntheticPairs
from vltprune.data.word_tokenizer import WordTokenizer
from vltprune.evaluation import caption_metrics, metrics, tasks


def test_the_tasks_have_names():
    assert {"nlvr", "retrieval"} <= set(tasks.tasks.names())
    with pytest.raises(LookupError, match="did you mean nlvr"):
        tasks.tasks["nlvr2"]


def test_synthetic_nlvr_needs_no_file():
    records = tasks.Nlvr.load_records("synthetic:val", "nowhere")
    assert records[3].sentence == SyntheticPairs("val", 4)[3].sentences[0]
    with pytest.raises(ValueError, match="no split 'vall'"):
        tasks.Nlvr.load_records("synthetic:vall", "nowhere")


def test_blip_reads_sentences_as_blip_does(tmp_path, monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "both", "are", "dogs", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    model = vp.create_model("blip_nlvr_tiny", vocab_size=10, max_positions=42)
    task = tasks.Nlvr.from_model(model, tasks.Options(vocabulary=tmp_path))
    statement = tasks.Nlvr.load_records("synthetic:val", "")[0]
    (ids, mask), counts = task.tokenize([replace(statement, sentence="Both are (dogs).")])
    assert (ids.tolist(), mask.tolist(), counts) == ([[9, 4, 5, 6, 3]], [[1] * 5], [1])
    long = replace(statement, sentence="dogs " * 60)
    assert task.tokenize([long])[0][0].shape == (1, 42)  # BLIP cuts at forty words, and not at tokens
    short = tasks.Retrieval.from_model(
        vp.create_model("blip_retrieval_tiny", vocab_size=10, enc_id=9), tasks.Options(tmp_path)
    )
    assert short.encode(["dogs " * 60])[0].shape == (1, 32)  # the longest that this one takes
    with pytest.raises(ValueError, match=r"has enc_id=58 bos_id=57 .* build the model with enc_id=9 bos_id=8 eos_id=3"):
        tasks.Vqa.from_model(vp.create_model("blip_vqa_tiny", vocab_size=10), tasks.Options(tmp_path))
    with pytest.raises(ValueError, match=r"has 10 ids, the model 30: give the model's own"):
        tasks.Nlvr.from_model(vp.create_model("blip_nlvr_tiny", vocab_size=30), tasks.Options(tmp_path))


@pytest.mark.parametrize(
    ("task", "model", "complaint"),
    [
        (tasks.Nlvr, "blip_tiny", "nlvr asks about two images, and a Blip reads one"),
        (tasks.Vqa, "blip_tiny", "a Blip gives none: use a blip_vqa"),
        (tasks.Caption, "blip_tiny", "a Blip writes none: use a blip_caption"),
        (tasks.Nlvr, "vit_tiny_patch16_224", "a VisionTransformer reads one"),
        (tasks.Retrieval, "blip_nlvr_tiny_evit", "a BlipNlvr has none .* use a model of open_clip"),
    ],
)
def test_models_that_cannot(task, model, complaint):
    with pytest.raises(ValueError, match=complaint):
        task.from_model(vp.create_model(model))


def test_reranking_judges_the_nearest():
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.7, 0.6]])
    truth = torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 0.0]])
    asked = []

    def match(images, texts):
        asked.append((images.tolist(), texts.tolist()))
        return truth[images, texts]

    by_image, by_text = tasks.rerank(similarity, match, k=2)
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


class Speaker(torch.nn.Module):
    """Says the same of every image, in our own words, and knows which of a list is best: its last."""

    prompt = (57, 4)

    def __init__(self):
        super().__init__()
        self.text = self.decoder = vp.create_model("blip_tiny").text
        self.decoder.body = self.decoder

    def generate(self, images, input_ids=None, attention_mask=None):
        (said,) = WordTokenizer().encode("a red star")[0].tolist()
        given = self.prompt if input_ids is None else self.prompt[:1]
        return torch.tensor([[*given, *said[1:], 0]] * len(images))

    def rank(self, images, input_ids, attention_mask, answer_ids, answer_mask):
        assert WordTokenizer().decode(answer_ids) == ["star", "no", "red"] and len(answer_mask) == 3
        return torch.tensor([[2, 0]] * len(images)), torch.zeros(len(images), 2)


IMAGES = torch.zeros(2, 1, 3, 8, 8)


def questions(*answers, **kind):
    return [data.Question(i, (), str(i), "is there a star", some, **kind) for i, some in enumerate(answers)]


def test_vqa_in_free_words():
    speaker = Speaker()
    task = tasks.Vqa.from_model(speaker)
    asked = questions(("red star",) * 10, ("star",) * 10)
    texts, counts = task.tokenize(asked)
    assert (texts[0].shape, counts) == ((2, 6), [1, 1])
    rows = task.predict(speaker, asked, IMAGES, texts)
    assert [row["answer"] for row in rows] == ["a red star"] * 2
    assert task.score(rows) == {"vqa_accuracy": 0.5}


def test_vqa_from_a_list(tmp_path):
    (tmp_path / "answers.json").write_text('["star", "no", "red"]')
    speaker = Speaker()
    task = tasks.Vqa.from_model(speaker, tasks.Options(answers=tmp_path / "answers.json"))
    asked = questions(("red",), ("red", "star"), is_answer_set=True)
    rows = task.predict(speaker, asked, IMAGES, task.tokenize(asked)[0])
    assert [row["answer"] for row in rows] == ["red", "red"]
    assert task.score(rows) == {"exact": 0.5, "overlap": 0.75}


def test_answers_held_back_are_not_scored():
    speaker = Speaker()
    asked, task = questions((), ()), tasks.Vqa.from_model(speaker)
    assert task.score(task.predict(speaker, asked, IMAGES, task.tokenize(asked)[0])) == {}


def test_captions_leave_the_prompt_out(monkeypatch):
    speaker, scored = Speaker(), []
    monkeypatch.setattr(caption_metrics, "caption_scorer_lacks", lambda: None)
    monkeypatch.setattr(caption_metrics, "caption_scores", lambda *pair: scored.append(pair) or {"CIDEr": 1.0})
    task, records = tasks.Caption.from_model(speaker), [data.Captioned(i, (), "same", ("a star",)) for i in (4, 7)]
    assert task.tokenize(records) == ((), [1, 1])
    rows = task.predict(speaker, records, IMAGES, ())
    assert task.score([{"index": r.index, **row} for r, row in zip(records, rows, strict=True)]) == {"CIDEr": 1.0}
    assert scored == [({"4": "a red star", "7": "a red star"}, {"4": ["a star"], "7": ["a star"]})]


def test_captions_tell_before_the_work_that_they_will_not_be_scored(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.warns(UserWarning, match=r"written, and not scored: .* pip install 'vltprune\[eval\]'"):
        task = tasks.Caption.from_model(Speaker())
    assert task.score([{"index": 0, "caption": "a", "captions": ["a"]}]) == {}
    assert "pip install 'vltprune[eval]'" in task.unscored({})["captions"]


def test_captions_tell_why_there_is_no_spice(monkeypatch):
    monkeypatch.setattr(caption_metrics, "caption_scorer_lacks", lambda: None)
    monkeypatch.setattr(caption_metrics, "spice_lacks", lambda: "no jars")
    task = tasks.Caption.from_model(Speaker())
    assert isinstance(task, tasks.SupportsUnscored)
    assert task.unscored({"CIDEr": 1.0}) == {"SPICE": "no jars"}
    assert task.unscored({"CIDEr": 1.0, "SPICE": 0.2}) == {}


@pytest.mark.parametrize(
    ("id", "published"),
    [("391895", 391895), ("val2014/COCO_val2014_000000391895.jpg", 391895), ("images/12_ab.jpg", "images/12_ab.jpg")],
)
def test_captions_in_the_form_of_coco(monkeypatch, id, published):
    monkeypatch.setattr(caption_metrics, "caption_scorer_lacks", lambda: None)
    (result,) = tasks.Caption.from_model(Speaker()).submission(
        [{"index": 0, "id": id, "caption": "a dog", "captions": ["x"]}]
    )
    assert result == {"image_id": published, "caption": "a dog"}


def test_answers_in_the_form_of_vqa():
    task = tasks.Vqa.from_model(Speaker())
    assert isinstance(task, tasks.SupportsSubmission) and not isinstance(tasks.Nlvr, tasks.SupportsSubmission)
    assert task.submission([{"id": "262148000", "answer": "dog"}]) == [{"question_id": 262148000, "answer": "dog"}]


def test_only_questions_come_from_several_folders(tmp_path):
    entry = {"image": "a.jpg", "question": "what", "answer": ["dog"], "dataset": "vg"}
    (tmp_path / "vqa.json").write_text(json.dumps([entry]))
    (question,) = tasks.Vqa.load_records(str(tmp_path / "vqa.json"), {"vg": "there"})
    assert question.images == (Path("there/a.jpg"),)
    with pytest.raises(ValueError, match="images of vqa, vg: this task's images are of one data set"):
        tasks.Caption.load_records(str(tmp_path / "vqa.json"), {"vqa": "here", "vg": "there"})


def test_retrieval_with_features_of_blip():
    model = vp.create_model("blip_tiny")
    model.match = None  # the mark of a model whose features were trained to be compared
    task, records = (
        tasks.Retrieval.from_model(model),
        [data.Captioned(i, (), str(i), ("a star", "a circle")) for i in (0, 1)],
    )
    texts, counts = task.tokenize(records)
    with torch.no_grad():
        rows = task.predict(model, records, torch.randn(2, 1, 3, 96, 96), texts)
    assert counts == [2, 2]
    assert set(task.score(rows)) >= {"i2t_r1", "t2i_r10"}
