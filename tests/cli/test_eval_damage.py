"""`eval` of data sets with one bad text among good ones: it is set aside or repaired, reported, and the others are answered."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vltprune.cli import main as cli

HALF = "a caption \ud83d of image 1"


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def pairs(tmp_path):
    """Statements about two images in the words of the tiny model, some of them with words that it does not know."""
    for name in "ab":
        Image.new("RGB", (96, 96), "red").save(tmp_path / f"{name}.png")

    def write(*sentences):
        entries = [{"images": ["a.png", "b.png"], "sentence": one, "label": "True"} for one in sentences]
        (tmp_path / "data.json").write_text(json.dumps(entries))
        return str(tmp_path / "data.json")

    return write


@pytest.mark.parametrize("batch", ["1", "2", "16"])
def test_words_that_the_tiny_model_does_not_know(batch, pairs, tmp_path, capsys):
    file = pairs("no star", "a pink star", "half \ud83d", "red " * 40, "a circle", "no zebra")
    argv = ["eval", "--task", "nlvr", "--model", "blip_nlvr_tiny", "--data", file, "--batch-size", batch]
    assert cli.main([*argv, "--output", str(tmp_path / "out")]) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["records"] == 2 and [one["index"] for one in summary["skipped"]] == [1, 2, 3, 5]
    assert "'pink'" in summary["skipped"][0]["skipped"]
    captured = capsys.readouterr()
    assert "skipped: entry 1: unknown words in 'a pink star'" in captured.err and "skipped 4 entries" in captured.out
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(6))

    assert cli.main([*argv, "--output", str(tmp_path / "strict"), "--strict"]) == 2
    assert "entry 1: unknown words" in capsys.readouterr().err
    file = pairs("a zebra", "a horse")
    assert cli.main([*argv, "--output", str(tmp_path / "none")]) == 2
    assert "none of the 2 records could be answered: unknown words" in capsys.readouterr().err


@pytest.mark.filterwarnings("default:captions are written")
@pytest.mark.parametrize("task", ["caption", "vqa", "retrieval"])
def test_half_an_emoji(task, captioned, vocabulary, tmp_path):
    file, (size, enc) = vocabulary
    own = {"caption": ["bos_id=23", "eos_id=3"], "vqa": ["bos_id=23", "eos_id=3", enc], "retrieval": [enc]}
    entries = json.loads(captioned.read_text())
    entries[1] |= {"captions": [HALF], "image_id": "\udc00"}
    entries[0] |= {"captions": ["a", HALF]}
    for entry in entries:
        entry |= {"question": entry["captions"][-1], "answer": entry["captions"], "question_id": "\ud83d"}
    captioned.write_text(json.dumps([*entries, {"image": "half \ud83d.jpg", "captions": ["a"], "question": "a"}]))
    argv = ["eval", "--task", task, "--model", f"blip_{task}_tiny", "--model-args", size, *own[task]]
    argv += ["--vocabulary", file, "--data", str(captioned), "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["records"] == 5
    assert [one["index"] for one in summary["skipped"]] == [5] and "half \ud83d.jpg" in summary["skipped"][0]["skipped"]
    if task == "vqa":
        results = json.loads((tmp_path / "out" / "vqa_result.json").read_text())
        assert [one["question_id"] for one in results] == ["\ud83d"] * 5
