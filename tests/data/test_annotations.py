"""Published annotation files to records: every form, every way an entry can be wrong, and the real files where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from on_disk import ROOM, on_disk

from vltprune import data

STATEMENT = {"images": ["dev/a-img0.png", "dev/a-img1.png"], "sentence": "Both are dogs.", "label": "True"}
QUESTION = {
    "image": "val2014/b.jpg",
    "question": "What is it?",
    "question_id": 262148000,
    "dataset": "vqa",
    "answer": ["dog"] * 7 + ["cat"] * 3,
}


@pytest.fixture
def write(tmp_path):
    """Writes entries to a file and gives its path."""

    def to_file(*entries):
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(entries))
        return path

    return to_file


def test_nlvr2(write):
    file = write(STATEMENT, STATEMENT | {"label": "False"}, STATEMENT | {"label": True})
    records = data.nlvr2(file, "images")
    assert [record.label for record in records] == [1, 0, 1]
    assert (len(records), records[2].index, records.skipped) == (3, 2, ())
    assert records[0].images == (Path("images/dev/a-img0.png"), Path("images/dev/a-img1.png"))
    assert records[1].sentence == "Both are dogs."


def test_vqa_and_visual_genome(write):
    genome = {"image": "VG/c.jpg", "question": "Where?", "question_id": 7, "dataset": "vg", "answer": "left, in front"}
    held_back = {key: value for key, value in QUESTION.items() if key != "answer"}
    first, second, third = data.vqa(write(QUESTION, genome, held_back), {"vqa": "coco", "vg": "genome"})
    assert (first.id, first.images) == ("262148000", (Path("coco/val2014/b.jpg"),))
    assert first.answers == ("dog",) * 7 + ("cat",) * 3
    assert not first.is_answer_set
    assert first.answer_weights == {"dog": 0.7, "cat": 0.3}
    assert (second.images, second.answer_weights) == ((Path("genome/VG/c.jpg"),), {"left, in front": 0.2})
    assert (third.answers, third.answer_weights) == ((), {})


def test_daquar(write):
    entry = {"image": "images/d.jpg", "question": "what is on the desk", "answer": "lamp, paper_tray"}
    (record,) = data.vqa(write(entry), "daquar")
    assert (record.answers, record.is_answer_set, record.id) == (("lamp", "paper_tray"), True, "0")
    assert record.answer_weights == {"lamp": 0.5, "paper_tray": 0.5}


def test_captions(write):
    coco, several, flickr = data.captions(
        write(
            {"image": "train2014/e.jpg", "caption": "a dog", "image_id": "coco_1"},
            {"image": "val2014/f.jpg", "caption": ["a cat", "cats"]},
            {"image": "images/g.jpg", "captions": ["x", "y", "z"]},
        ),
        "images",
    )
    assert (coco.id, coco.captions) == ("coco_1", ("a dog",))
    assert (several.id, several.captions) == ("val2014/f.jpg", ("a cat", "cats"))
    assert flickr.captions == ("x", "y", "z")


def test_answer_list(write):
    assert data.answer_list(write("yes", "no")) == ("yes", "no")
    with pytest.raises(ValueError, match="no list of answers"):
        data.answer_list(write("yes", 3))


@pytest.mark.parametrize(
    ("read", "entry", "reason"),
    [
        (data.nlvr2, STATEMENT | {"label": "maybe"}, "label 'maybe' is neither True nor False"),
        (data.nlvr2, STATEMENT | {"images": ["one.png"]}, "not enough values"),
        (data.nlvr2, {"images": ["a", "b"], "label": "True"}, "there is no 'sentence'"),
        (data.nlvr2, "a line of text", "string indices"),
        (data.vqa, QUESTION | {"question": "  "}, "'question' must be a text"),
        (data.vqa, QUESTION | {"answer": []}, "'answer' must be a text or a list of texts"),
        (data.captions, {"image": "a.jpg"}, "there is no 'caption'"),
        (data.captions, {"image": "a.jpg", "captions": ["a", 3]}, "'captions' must be"),
    ],
)
def test_entries_that_cannot_be_read(read, entry, reason, write):
    good = {data.nlvr2: STATEMENT, data.vqa: QUESTION, data.captions: {"image": "a.jpg", "caption": "a dog"}}[read]
    file = write(good, entry, good)
    records = read(file, "images")
    assert [record.index for record in records] == [0, 2]
    assert [skipped.index for skipped in records.skipped] == [1]
    assert str(records.skipped[0]).startswith("entry 1: ") and reason in str(records.skipped[0])
    with pytest.raises(ValueError, match=r"annotations.json, entry 1: "):
        read(file, "images", strict=True)


def test_files_that_cannot_be_read(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no annotation file nowhere"):
        data.vqa("nowhere.json", ".")
    with pytest.raises(ValueError, match=r"none of the 2 entries .* of this task\?; entry 0: there is no 'images'"):
        data.nlvr2(write(QUESTION, QUESTION), ".")
    (tmp_path / "text.json").write_text("dogs")
    with pytest.raises(ValueError, match=r"text.json is not JSON"):
        data.nlvr2(tmp_path / "text.json", ".")
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a list of entries, it holds a dict"):
        data.nlvr2(tmp_path / "object.json", ".")


def test_a_data_set_without_its_folder(write):
    (skipped,) = data.vqa(write(QUESTION, QUESTION | {"dataset": "vg"}), {"vqa": "coco"}).skipped
    assert skipped.reason == "there is no 'vg'"


@on_disk
def test_flickr8k():
    records = data.captions(ROOM / "flickr8k/dev.json", ROOM / "flickr8k", strict=True)
    assert len(records) == 1000
    assert all(len(record.captions) == 5 for record in records)
    assert records[0].load_images()[0].size == (224, 224)


@on_disk
def test_daquar_on_disk():
    records = data.vqa(ROOM / "daquar/dev.json", ROOM / "daquar", strict=True)
    assert len(records) == 836
    assert records[0].answers == ("paper_tray",)
    assert max(len(record.answers) for record in records) > 1
    assert all(abs(sum(record.answer_weights.values()) - 1) < 1e-9 for record in records)
    assert all(path.is_file() for record in records for path in record.images)
