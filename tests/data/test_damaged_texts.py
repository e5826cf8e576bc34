"""Annotations with one bad record among good ones: it is repaired or set aside with its reason, and the others are read."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from vltprune import data
from vltprune.data.annotations import parse_captioned
from vltprune.data.shards import Shards, iterate_samples
from vltprune.models.wordpiece import BlipTokenizer, well_formed

GOOD = {"image": "a.jpg", "caption": "a dog"}


def read(tmp_path, *entries: str):
    """The captions of a file of these JSON texts, between two good entries."""
    texts = [json.dumps(GOOD), *entries, json.dumps(GOOD)]
    (tmp_path / "a.json").write_text(f"[{', '.join(texts)}]", encoding="utf-8", errors="surrogateescape")
    return data.captions(tmp_path / "a.json", "images")


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("a dog \ud83d", "a dog \ufffd"),
        ("\udc00dog", "\ufffddog"),
        ("\ud83d\ude00", "\U0001f600"),
        ("dog\udce9 \ud800\ud800", "dog\ufffd \ufffd\ufffd"),
        ("a\0dog", "a\0dog"),
    ],
)
def test_half_characters_are_replaced_in_texts(text, repaired, tmp_path):
    assert well_formed(text) == repaired
    found = read(tmp_path, json.dumps(GOOD | {"caption": ["a", text]}))
    assert found[1].captions == ("a", repaired) and not found.skipped
    entry = {"image": "a.jpg", "question": text, "answer": [text, "b"]}
    (tmp_path / "q.json").write_text(json.dumps([entry]))
    (question,) = data.vqa(tmp_path / "q.json", ".")
    assert (question.question, question.answers) == (repaired, (repaired, "b"))
    (tmp_path / "l.json").write_text(json.dumps([text]))
    assert data.answer_list(tmp_path / "l.json") == (repaired,)


def test_names_and_identifiers_stay_as_they_are(tmp_path):
    found = read(tmp_path, json.dumps({"image": "half \ud83d.jpg", "image_id": "id \udc00", "caption": "a"}))
    assert (found[1].images[0].name, found[1].id, found[1].original_id) == ("half \ud83d.jpg", "id \udc00", "id \udc00")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ('{"image": "a.jpg", "caption": %s}' % ("[" * 100_000 + "]" * 100_000), "it is nested too deeply"),
        ('{"image": "a.jpg", "caption": [["a"]]}', "'caption' must be a text or a list of texts"),
        ('{"image": "a.jpg", "caption": null}', "there is no 'caption'"),
        ('{"image": "a.jpg", "caption": NaN}', "'caption' must be"),
        ('{"image": "a.jpg", "caption": " \\u00a0 "}', "'caption' must be"),
        ('{"image": null, "caption": "a"}', "there is no 'image'"),
        ('{"image": 7, "caption": "a"}', "'image' must be a text, it is 7"),
        ('{"image": "a.jpg", "image_id": NaN, "caption": "a"}', "'image_id' must be a text or a number, it is nan"),
        ('{"image": "a.jpg", "image_id": [1], "caption": "a"}', "'image_id' must be a text or a number"),
        ("null", "subscriptable"),
        ("[]", "list indices"),
        ("17", "subscriptable"),
    ],
)
def test_entries_that_are_set_aside(entry, reason, tmp_path):
    found = read(tmp_path, entry)
    assert [record.index for record in found] == [0, 2]
    (skipped,) = found.skipped
    assert skipped.index == 1 and reason in skipped.reason and len(skipped.reason) < 400


@pytest.mark.parametrize(
    ("entry", "id"),
    [
        ('{"image": "a.jpg", "image_id": null, "captions": null, "caption": "a"}', "a.jpg"),
        ('{"image": "a.jpg", "image_id": %s, "caption": "a"}' % ("9" * 5000), "9" * 5000),
        ('{"image": "a.jpg", "image_id": 1e999, "image_id": 5, "caption": "a"}', "5"),
        ('{"image": "a.jpg", "caption": "caf\udce9"}', "a.jpg"),
    ],
)
def test_entries_that_are_read_all_the_same(entry, id, tmp_path):
    found = read(tmp_path, entry)
    assert len(found) == 3 and found[1].id == id


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends(encoding, newline, tmp_path):
    text = json.dumps([GOOD | {"caption": "café"}], indent=1, ensure_ascii=False).replace("\n", newline)
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    assert data.captions(tmp_path / "a.json", ".")[0].captions == ("café",)


@pytest.mark.parametrize(
    "text", ["", "7", "null", '{"a": 1}', "{" * 9, "[" * 200_000, '{"a":' * 100_000, "\0", "[1,,2]"]
)
def test_files_that_are_no_lists(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    for reader in (data.captions, data.vqa, data.nlvr2):
        with pytest.raises(ValueError, match=r"a\.json"):
            reader(tmp_path / "a.json", ".")


def test_nulls_in_questions_and_statements(tmp_path):
    entry = {"image": "a.jpg", "question": "what", "question_id": None, "dataset": None, "answer": None}
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    (question,) = data.vqa(tmp_path / "a.json", ".")
    assert (question.id, question.original_id, question.answers, question.weight) == ("0", None, (), 1.0)
    good = {"images": ["a", "b"], "sentence": "s", "label": "True"}
    bad = [{"label": None}, {"label": []}, {"label": float("nan")}, {"images": "ab"}, {"images": [None, "b"]}]
    (tmp_path / "a.json").write_text(json.dumps([good, *(good | one for one in bad)]))
    found = data.nlvr2(tmp_path / "a.json", ".")
    assert (len(found), len(found.skipped)) == (1, 5)


def sample(tmp_path, **files: bytes):
    """What a shard with one sample of these files gives."""
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, content in {"png": b"", **files}.items():
            info = tarfile.TarInfo(f"0007.{kind}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (found,) = iterate_samples(str(tmp_path / "a.tar"), print)
    return Shards((), parse_captioned).record(3, found)


@pytest.mark.parametrize(
    ("files", "captions", "id"),
    [
        ({"json": b'{"caption": null}', "txt": b"a dog"}, ("a dog",), "0007"),
        ({"json": b'{"captions": null, "image_id": 5}', "txt": b"a dog\r\n"}, ("a dog",), "5"),
        ({"json": b'{"caption": "", "captions": []}', "txt": b"a dog"}, ("a dog",), "0007"),
        ({"json": b'\xef\xbb\xbf{"caption": "a cat"}', "txt": b"a dog"}, ("a cat",), "0007"),
        ({"json": b'{"captions": ["a cat"]}', "txt": b"\xff"}, ("a cat",), "0007"),
        ({"txt": b"\xef\xbb\xbfa dog"}, ("a dog",), "0007"),
        ({"txt": b"caf\xe9"}, ("caf\ufffd",), "0007"),
    ],
)
def test_samples_of_shards(files, captions, id, tmp_path):
    record = sample(tmp_path, **files)
    assert (record.captions, record.id) == (captions, id)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"", b"\0\0\0\0", b"\xff\xfe\0", b"3", b"NaN"])
def test_samples_that_are_lost(content, tmp_path):
    with pytest.raises(OSError, match=r"\w+"):
        sample(tmp_path, json=content)


def test_vocabularies_with_a_byte_order_mark_and_odd_words(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a\u2028b", "dog"]
    for encoding, newline in (("utf-8-sig", "\n"), ("utf-8", "\r\n")):
        (tmp_path / "vocab.txt").write_bytes((newline.join(words) + newline).encode(encoding))
        blip = BlipTokenizer.load(tmp_path)
        assert len(blip) == 8
        assert blip.encode("dog \ud83d")[0].tolist() == [[2, 5, 3]]
