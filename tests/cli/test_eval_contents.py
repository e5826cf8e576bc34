"""Results belong to the bytes they came from: a stopped run resumes by content, and recalls are per image."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import vltprune as vp
from vltprune.cli import main as cli
from vltprune.data import Captioned, Record, fingerprint
from vltprune.evaluation import metrics, tasks


def retrieval(data, output, model, *options):
    argv = ["eval", "--task", "retrieval", "--model", str(model), "--data", str(data), "--output", str(output)]
    return [*argv, "--batch-size", "2", *options]


SMALL = (
    "image_size=32",
    "vision_depth=1",
    "text_depth=1",
    "vision_width=32",
    "text_width=32",
    "vision_heads=2",
    "text_heads=2",
)


@pytest.fixture
def model(tmp_path, vocabulary):
    """The folder of a small model, and the vocabulary that goes with it."""
    file, (size, enc) = vocabulary
    sizes = {name: int(value) for name, value in (one.split("=") for one in (size, enc, *SMALL))}
    vp.save(vp.create_model("blip_retrieval_tiny", **sizes), tmp_path / "model")
    return tmp_path / "model", ["--vocabulary", file]


def test_fingerprints_follow_the_content():
    torch.manual_seed(3)
    dense = vp.create_model("blip_tiny")
    same = vp.create_model("blip_tiny")
    same.load_state_dict(dense.state_dict())
    assert fingerprint.hash_model(dense) == fingerprint.hash_model(same)
    assert fingerprint.hash_model(dense) != fingerprint.hash_model(vp.create_model("blip_tiny"))
    half, pruned = same.half(), vp.prune(dense, "evit")
    other = vp.prune(dense, "evit", keep="ratio(ratio=0.3)")
    assert len({fingerprint.hash_model(one) for one in (dense, half, pruned, other)}) == 4
    with torch.no_grad():
        before = fingerprint.hash_model(dense)
        dense.text.position.weight[-1, -1] += 1e-3
    assert fingerprint.hash_model(dense) != before


def test_fingerprints_of_files(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"x" * 10)
    before, (size, changed) = fingerprint.hash_file(file), (10, file.stat().st_mtime_ns)
    os.utime(file, ns=(changed + 10**9, changed + 10**9))
    assert fingerprint.hash_file(file) == before and fingerprint.hash_file(tmp_path / "b") is None
    record = Record(0, (file, tmp_path / "missing"))
    seen, ends = fingerprint.hash_images(record), fingerprint.hash_file_ends(record.images)
    file.write_bytes(b"y" * size)
    os.utime(file, ns=(changed, changed))
    assert fingerprint.hash_file(file) != before and fingerprint.hash_images(record) != seen
    assert fingerprint.hash_file_ends(record.images) != ends
    file.write_bytes(b"x" * size)
    assert fingerprint.hash_file_ends(record.images) == ends  # written anew, and the same
    file.write_bytes(b"y" * 11)
    assert fingerprint.hash_file_ends(record.images) != ends
    (tmp_path / "missing").touch()
    assert fingerprint.hash_images(record) != seen
    assert fingerprint.hash_images(Record(0, (np.zeros((2, 2, 3), np.uint8),))) is None
    assert fingerprint.hash_images(Record(0, (tmp_path / ("long" * 99), tmp_path / "a\0b"))) is not None


def test_each_part_of_a_file_is_in_its_fingerprint(tmp_path, monkeypatch):
    """A large file is read a block at a time, to its end; of its ends, the size and the name count too."""
    monkeypatch.setattr(fingerprint, "_BLOCK", 8)
    monkeypatch.setattr(fingerprint, "_END", 4)
    file, plain = tmp_path / "a", b"head" + b"." * 20 + b"tail"
    changed = {
        "head": b"Head" + plain[4:],
        "middle": plain[:12] + b"!" + plain[13:],
        "tail": plain[:-1] + b"L",
        "size": plain[:12] + plain[13:],
    }

    def seen(content):
        file.write_bytes(content)
        whole = fingerprint.hash_file(file)
        assert fingerprint.hash_file(file) == whole
        return whole, fingerprint.hash_file_ends([file])

    before = seen(plain)
    for part, content in changed.items():
        whole, ends = seen(content)
        assert whole != before[0], part
        assert (ends != before[1]) == (part != "middle"), part
    file.rename(tmp_path / "b")
    assert fingerprint.hash_file(tmp_path / "b") == whole and fingerprint.hash_file_ends([tmp_path / "b"]) != ends
    folders = []
    for names in ("ab", "ac"):
        (tmp_path / names).mkdir()
        for name in names:
            (tmp_path / names / name).write_bytes(plain)
        folders.append(fingerprint.hash_file(tmp_path / names))
    assert folders[0] != folders[1]


def change_model(folder, data, vocabulary):
    torch.manual_seed(9)
    loaded = vp.load(folder)
    with torch.no_grad():
        loaded.head.bias[0] += 1
    vp.save(loaded, folder)


def change_annotations(folder, data, vocabulary):
    entries = json.loads(data.read_text())
    entries[4]["captions"] = ["another caption"]
    data.write_text(json.dumps(entries))


def change_image(folder, data, vocabulary):
    """Of the same name, size and time."""
    file = data.parent / "1.jpg"
    found, content = file.stat(), bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def change_vocabulary(folder, data, vocabulary):
    words = vocabulary.read_text().splitlines()
    words[5], words[6] = words[6], words[5]
    vocabulary.write_text("\n".join(words))


def mend_image(folder, data, vocabulary):
    shutil.copy(data.parent / "1.jpg", data.parent / "0.jpg")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (change_model, "content_of_model"),
        (change_annotations, "content_of_data"),
        (change_image, "entry 1: its images, "),
        (change_vocabulary, "content_of_vocabulary"),
        (mend_image, "entry 0: its images, "),
    ],
)
@pytest.mark.parametrize("limit", [["--limit", "2"], []], ids=["stopped", "ended"])
def test_a_run_resumes_only_on_the_same_bytes(change, complaint, limit, model, captioned, tmp_path, fails):
    folder, words = model
    (captioned.parent / "0.jpg").write_bytes(b"no image")
    argv = retrieval(captioned, tmp_path / "out", folder, *words)
    assert cli.main([*argv, *limit]) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    assert cli.main(argv) == 0  # as it is, it resumes
    shutil.rmtree(tmp_path / "out")
    shutil.move(tmp_path / "before", tmp_path / "out")
    change(folder, captioned, tmp_path / "vocab.txt")
    assert complaint in fails(*argv)


def test_the_same_bytes_elsewhere_in_time_are_the_same(model, captioned, tmp_path):
    folder, words = model
    argv = retrieval(captioned, tmp_path / "out", folder, *words)
    assert cli.main([*argv, "--limit", "3"]) == 0
    first = (tmp_path / "out" / "results.jsonl").read_text()
    for file in (*captioned.parent.iterdir(), *folder.iterdir()):
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    assert cli.main(argv) == 0
    assert (tmp_path / "out" / "results.jsonl").read_text().startswith(first)


def test_strict_does_not_go_past_what_was_skipped(model, captioned, tmp_path, fails):
    folder, words = model
    (captioned.parent / "1.jpg").write_bytes(b"no image")
    argv = retrieval(captioned, tmp_path / "out", folder, *words)
    assert cli.main(argv) == 0
    assert "entry 1: cannot read" in fails(*argv, "--strict")


def layouts(entries):
    """The same captions of the same images: an entry an image, an entry a caption, and these shuffled."""
    single = [
        {"image": e["image"], "caption": text, "image_id": i} for i, e in enumerate(entries) for text in e["captions"]
    ]
    mixed = [single[i] for i in np.random.default_rng(1).permutation(len(single))]
    path = [{"image": "./" + one["image"], "caption": [one["caption"]]} for one in mixed]
    return {"single": single, "mixed": mixed, "path": path}


@pytest.mark.parametrize("layout", ["single", "mixed", "path"])
def test_recalls_do_not_depend_on_the_layout(layout, model, captioned, tmp_path):
    folder, words = model
    entries = json.loads(captioned.read_text())
    other = captioned.with_name("other.json")
    other.write_text(json.dumps(layouts(entries)[layout]))
    for name, file in (("whole", captioned), ("other", other)):
        assert cli.main(retrieval(file, tmp_path / name, folder, *words, "--k-test", "2")) == 0
    whole, split = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "other"))
    assert whole["scores"] == split["scores"]
    assert whole["matching"]["scores"] == split["matching"]["scores"]
    assert whole["matching"]["pairs"] == split["matching"]["pairs"]


@torch.no_grad()
def test_recalls_of_repeated_images_by_hand():
    model = vp.create_model("blip_retrieval_tiny")
    task, texts = tasks.Retrieval.from_model(model), ("a star", "no star", "two red squares", "a blue circle")
    images = torch.randn(2, 1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    text_to_image = [0, 1, 0, 1]
    records = [
        Captioned(i, (), f"id {owner}", (text,))
        for i, (owner, text) in enumerate(zip(text_to_image, texts, strict=True))
    ]
    rows = task.predict(model, records, images[text_to_image], task.tokenize(records)[0])
    ids, mask = task.encode(texts)
    similarity = model.image_features(images[:, 0]) @ model.text_features(ids, mask).T
    assert task.score(rows) == pytest.approx(metrics.recalls(similarity, text_to_image))


@pytest.mark.parametrize(
    "ids",
    [[7, "7", "007"], [2**80, -1, 0], ["262148000", "x y", "\u0663"], [1.5, 1e20, 3.0], [5, 5, 5], [None, "", "0"]],
)
@pytest.mark.filterwarnings("default:captions are written")
@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_identifiers_leave_as_they_came(task, ids, captioned, vocabulary, tmp_path):
    file, (size, enc) = vocabulary
    key = {"vqa": "question_id", "caption": "image_id"}[task]
    entries = [
        {"image": f"{i}.jpg", "question": "what", "answer": ["a"], "caption": "a", key: id} for i, id in enumerate(ids)
    ]
    captioned.write_text(json.dumps(entries))
    argv = [
        "eval",
        "--task",
        task,
        "--model",
        f"blip_{task}_tiny",
        "--model-args",
        size,
        "bos_id=23",
        "eos_id=3",
        *SMALL,
    ]
    argv += [enc] if task == "vqa" else []
    argv += ["--vocabulary", file, "--data", str(captioned), "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    results = json.loads((tmp_path / "out" / f"{task}_result.json").read_text())
    made = {"vqa": 0, "caption": "0.jpg"}[task]
    wanted = [made if id is None else id for id in ids]
    found = [one[key] for one in results]
    assert found == wanted and list(map(type, found)) == list(map(type, wanted))


def test_damaged_results_logs_are_refused(model, captioned, tmp_path, fails):
    folder, words = model
    argv = retrieval(captioned, tmp_path / "out", folder, *words)
    assert cli.main(argv) == 0
    rows = (tmp_path / "out" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "results.jsonl").write_text("".join([rows[0], "{broken\n", *rows[2:]]))
    assert "results.jsonl, line 2, is damaged" in fails(*argv)


def test_images_of_a_row_are_named(model, captioned, tmp_path):
    folder, words = model
    assert cli.main(retrieval(captioned, tmp_path / "out", folder, *words)) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    records = tasks.Retrieval.load_records(str(captioned), str(captioned.parent))
    assert [row["image_hash"] for row in rows] == [fingerprint.hash_images(record) for record in records]
    with Image.open(captioned.parent / "0.jpg") as image:
        assert image.size == (80, 60)


def test_costs_do_not_depend_on_the_batch(model, captioned, tmp_path):
    """A dense model's, of texts of several lengths."""
    folder, words = model
    entries = json.loads(captioned.read_text())
    for i, entry in enumerate(entries):
        entry["captions"] = ["a image " * (1 + i)]
    captioned.write_text(json.dumps(entries))
    found = []
    for size in ("1", "2", "5"):
        argv = retrieval(captioned, tmp_path / size, folder, *words, "--k-test", "0")
        argv[argv.index("--batch-size") + 1] = size
        assert cli.main(argv) == 0
        rows = [json.loads(line) for line in (tmp_path / size / "results.jsonl").read_text().splitlines()]
        found.append([row["macs"] for row in rows])
    assert found[0] == pytest.approx(found[1]) and found[0] == pytest.approx(found[2])
    assert len(set(found[0])) == 5
