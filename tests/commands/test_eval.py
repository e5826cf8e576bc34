"""`eval` from end to end: NLVR on drawn pairs and on files, retrieval with CLIP, stopped runs, and what cannot be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vltprune as vp
from vltprune import cli, exam
from vltprune.data import SyntheticPairs
from vltprune.evaluate import draw, evaluate


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def nlvr(output, *options, model="blip_nlvr_tiny_madtp.p80", data="synthetic:test"):
    return ["eval", "--task", "nlvr", "--model", model, "--data", str(data), "--output", str(output), *options]


@pytest.fixture
def statements(tmp_path):
    """An annotation file of NLVR2's form: four entries, one malformed; of the pictures one is broken."""
    folder = tmp_path / "nlvr2"
    folder.mkdir()
    for i in range(3):
        for name, pixels in zip(("left", "right"), SyntheticPairs("test", 3)[i].images, strict=True):
            Image.fromarray(pixels).save(folder / f"{i}-{name}.png")
    (folder / "1-right.png").write_bytes(b"broken")
    entries = [
        {"images": [f"{i}-left.png", f"{i}-right.png"], "sentence": f"there are {word} stars", "label": str(i == 0)}
        for i, word in enumerate(["two", "no", "three"])
    ]
    entries.insert(1, {"images": ["a.png"], "sentence": "cut", "label": "True"})
    (folder / "test.json").write_text(json.dumps(entries))
    return folder / "test.json"


def test_nlvr_agrees_with_the_demos_evaluation(tmp_path, capsys):
    assert cli.main(nlvr(tmp_path, "--limit", "5", "--batch-size", "2")) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    model = vp.create_model("blip_nlvr_tiny_madtp.p80", pretrained=True)
    outcome = evaluate({"it": model}, draw("test", 5, batch=2))["it"]
    np.testing.assert_allclose([row["chance"] for row in rows(tmp_path)], outcome.chance, atol=1e-3)
    assert summary["scores"] == {"accuracy": pytest.approx(outcome.accuracy)}
    assert summary["macs"] == pytest.approx(outcome.macs, rel=1e-3)
    assert summary["kept"]["image"] == pytest.approx(outcome.kept["image"], rel=1e-3)
    out = capsys.readouterr().out
    assert "accuracy" in out and "5 records" in out and "image tokens, layer by layer (mean): 145 ->" in out


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main(nlvr(whole, "--limit", "6", "--batch-size", "2")) == 0
    answered = []

    def interrupted(self, records, images, _answer=exam.Exam._answer):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(records)
        return _answer(self, records, images)

    with monkeypatch.context() as patch:
        patch.setattr(exam.Exam, "_answer", interrupted)
        assert cli.main(nlvr(stopped, "--limit", "6", "--batch-size", "2")) == 130
    assert len(rows(stopped)) == 4
    assert cli.main(nlvr(stopped, "--limit", "6", "--batch-size", "2")) == 0
    without_time = [[{**row, "seconds": 0} for row in rows(folder)] for folder in (whole, stopped)]
    assert without_time[0] == without_time[1]


def test_a_trial_goes_on_to_the_whole(tmp_path):
    for limit in ("2", "5", "3"):
        assert cli.main(nlvr(tmp_path, "--limit", limit)) == 0
        assert json.loads((tmp_path / "summary.json").read_text())["records"] == int(limit)
    assert len(rows(tmp_path)) == 5


def test_other_settings_are_refused(tmp_path, fails):
    assert cli.main(nlvr(tmp_path, "--limit", "1")) == 0
    complaint = fails(*nlvr(tmp_path, "--limit", "1", model="blip_nlvr_tiny"))
    assert "other settings (model: 'blip_nlvr_tiny_madtp.p80' there, 'blip_nlvr_tiny' now)" in complaint


def test_what_cannot_be_read_is_skipped_and_told(statements, tmp_path, capsys, fails):
    assert cli.main(nlvr(tmp_path / "out", data=statements, model="blip_nlvr_tiny")) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["records"] == 2
    assert [one["index"] for one in summary["skipped"]] == [2, 1]
    captured = capsys.readouterr()
    assert "skipped 2 entries" in captured.out
    assert f"entry 2: cannot read {statements.parent / '1-right.png'}" in captured.err
    assert "entry 1: not enough values" in captured.err
    assert [row["index"] for row in rows(tmp_path / "out")] == [0, 2, 3]

    assert "test.json, entry 1" in fails(*nlvr(tmp_path / "strict", "--strict", data=statements))


def test_nothing_readable(statements, tmp_path, fails):
    for picture in statements.parent.glob("*.png"):
        picture.unlink()
    assert "none of the 3 records could be answered: there is no picture" in fails(*nlvr(tmp_path, data=statements))


def test_dense_models_are_counted_too(tmp_path, capsys):
    assert cli.main(nlvr(tmp_path, "--limit", "3", "--batch-size", "1", model="blip_nlvr_tiny")) == 0
    model = vp.prune(vp.create_model("blip_nlvr_tiny"), "evit")
    costs = [vp.flops.count(model, *batch.inputs).dense_total for batch in draw("test", 3, batch=1)]
    assert [row["macs"] for row in rows(tmp_path)] == pytest.approx(costs)
    assert "dense" in capsys.readouterr().out


def test_a_saved_folder(tmp_path, fails):
    vp.save(vp.create_model("blip_nlvr_tiny_evit"), tmp_path / "model")
    folder = str(tmp_path / "model")
    assert cli.main(nlvr(tmp_path / "out", "--limit", "2", model=folder)) == 0
    assert "has weights already" in fails(*nlvr(tmp_path / "new", "--pretrained", "x", model=folder))


@pytest.fixture
def captioned(tmp_path):
    """Five pictures with one to three captions each, Flickr8k's form."""
    folder, noise = tmp_path / "flickr", np.random.default_rng(0)
    folder.mkdir()
    entries = []
    for i in range(5):
        Image.fromarray(noise.integers(0, 255, (60, 80, 3), np.uint8)).save(folder / f"{i}.jpg")
        entries.append({"image": f"{i}.jpg", "captions": [f"caption {j} of picture {i}" for j in range(1 + i % 3)]})
    (folder / "dev.json").write_text(json.dumps(entries))
    return folder / "dev.json"


@pytest.mark.parametrize("model", ["clip_vit_s_32_alt", "clip_vit_s_32_alt_evit"])
def test_retrieval_with_clip(model, captioned, tmp_path, capsys):
    import open_clip

    weights, output = tmp_path / "weights", tmp_path / "out"
    dense = vp.create_model("clip_vit_s_32_alt")
    vp.save(dense, weights)
    argv = ["eval", "--task", "retrieval", "--model", model, "--pretrained", str(weights / "model.safetensors")]
    argv += ["--data", str(captioned), "--output", str(output), "--batch-size", "2"]
    assert cli.main(argv) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["scores"]) >= {"i2t_r1", "i2t_r10", "t2i_r5", "mean_recall"}
    assert summary["records"] == 5
    assert (summary["macs_saved"] > 0.2) == model.endswith("evit")

    net = vp.create_model(model, pretrained=weights / "model.safetensors")
    images = torch.stack([vp.transforms(net)(Image.open(captioned.parent / f"{i}.jpg")) for i in range(5)])
    entries = json.loads(captioned.read_text())
    texts = open_clip.get_tokenizer("ViT-S-32-alt")([text for one in entries for text in one["captions"]])
    with torch.no_grad():
        similarity = net.encode_image(images, normalize=True) @ net.encode_text(texts, normalize=True).T
    scores = vp.metrics.recalls(similarity, [i for i, one in enumerate(entries) for _ in one["captions"]])
    assert summary["scores"] == pytest.approx(scores)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--task", "nlvrr", "--model", "blip_nlvr_tiny", "--data", "synthetic:test"], "invalid choice: 'nlvrr'"),
        (["--task", "nlvr", "--model", "blip_tiny", "--data", "synthetic:test"], "use a blip_nlvr"),
        (["--task", "nlvr", "--model", "blip_nlvr_tiny", "--data", "nowhere.json"], "no annotation file nowhere.json"),
        (["--task", "nlvr", "--model", "blip_nlvr_tiny", "--data", "synthetic:x"], "no split 'x'"),
        (["--task", "retrieval", "--model", "blip_tiny", "--data", "dev.json"], "use a model of open_clip"),
    ],
)
def test_refusals_leave_nothing_behind(options, complaint, captioned, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(captioned.parent)
    assert complaint in fails("eval", *options, "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_random_weights_are_told(tmp_path, capsys):
    assert cli.main(nlvr(tmp_path, "--limit", "1", model="blip_nlvr_tiny_evit")) == 0
    assert "RANDOM weights" in capsys.readouterr().err
