"""`eval` from end to end: NLVR on synthetic pairs and on files, retrieval with CLIP, stopped runs, and what cannot be read."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

import vltprune as vp
from vltprune.cli import main as cli
from vltprune.data import SyntheticPairs
from vltprune.demo.measure import evaluate_models, generate_batches
from vltprune.evaluation import caption_metrics, evaluator


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def nlvr(output, *options, model="blip_nlvr_tiny_madtp.p80", data="synthetic:test"):
    return ["eval", "--task", "nlvr", "--model", model, "--data", str(data), "--output", str(output), *options]


@pytest.fixture
def statements(tmp_path):
    """An annotation file of NLVR2's form: four entries, one malformed; of the images one is broken."""
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
    result = evaluate_models({"it": model}, generate_batches("test", 5, batch_size=2))["it"]
    np.testing.assert_allclose([row["probability"] for row in rows(tmp_path)], result.probability, atol=1e-3)
    assert summary["scores"] == {"accuracy": pytest.approx(result.accuracy)}
    assert summary["macs"] == pytest.approx(result.macs, rel=1e-3)
    assert summary["kept"]["image"] == pytest.approx(result.kept["image"], rel=1e-3)
    out = capsys.readouterr().out
    assert "accuracy" in out and "5 records" in out and "image tokens, layer by layer (mean): 145 ->" in out

    saved = summary["dense_macs"] - summary["macs"]
    for tower, images in (("image", 2), ("text", 1)):
        macs, dense = summary["towers"][tower]
        assert summary["reductions"][tower] == pytest.approx(1 - macs / dense)
        assert summary["shares"][tower] == pytest.approx(images * (dense - macs) / saved)
        own, part = (
            f"{100 * summary['reductions'][tower]:.1f} % fewer than dense",
            f"{100 * summary['shares'][tower]:.0f} % of the saving",
        )
        assert re.search(f"GMACs of one {tower}: .* {own} .*; {part}", out)
    assert sum(summary["shares"].values()) == pytest.approx(1)


def test_a_stopped_run_resumes(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main(nlvr(whole, "--limit", "6", "--batch-size", "2")) == 0
    answered = []

    def interrupted(self, records, images, _predict=evaluator.Evaluator._predict):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(records)
        return _predict(self, records, images)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "_predict", interrupted)
        assert cli.main(nlvr(stopped, "--limit", "6", "--batch-size", "2")) == 130
    assert len(rows(stopped)) == 4
    assert cli.main(nlvr(stopped, "--limit", "6", "--batch-size", "2")) == 0
    without_time = [[{**row, "seconds": 0} for row in rows(folder)] for folder in (whole, stopped)]
    assert without_time[0] == without_time[1]


def test_a_limited_run_resumes_at_a_larger_limit(tmp_path):
    for limit in ("2", "5", "3"):
        assert cli.main(nlvr(tmp_path, "--limit", limit)) == 0
        assert json.loads((tmp_path / "summary.json").read_text())["records"] == int(limit)
    assert len(rows(tmp_path)) == 5


def test_other_settings_are_refused(tmp_path, fails):
    assert cli.main(nlvr(tmp_path, "--limit", "1")) == 0
    complaint = fails(*nlvr(tmp_path, "--limit", "1", model="blip_nlvr_tiny"))
    assert "other settings (model: 'blip_nlvr_tiny_madtp.p80' there, 'blip_nlvr_tiny' now)" in complaint


def test_what_cannot_be_read_is_skipped_and_reported(statements, tmp_path, capsys, fails):
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
    for image in statements.parent.glob("*.png"):
        image.unlink()
    assert "none of the 3 records could be answered: there is no image" in fails(*nlvr(tmp_path, data=statements))


def test_dense_models_are_counted_too(tmp_path, capsys):
    assert cli.main(nlvr(tmp_path, "--limit", "3", "--batch-size", "1", model="blip_nlvr_tiny")) == 0
    model = vp.prune(vp.create_model("blip_nlvr_tiny"), "evit")
    costs = [
        vp.count_macs(model, *batch.inputs_for(model)).dense_total
        for batch in generate_batches("test", 3, batch_size=1)
    ]
    assert [row["macs"] for row in rows(tmp_path)] == pytest.approx(costs)
    assert "dense" in capsys.readouterr().out


def test_a_saved_folder(tmp_path, fails):
    vp.save(vp.create_model("blip_nlvr_tiny_evit"), tmp_path / "model")
    folder = str(tmp_path / "model")
    assert cli.main(nlvr(tmp_path / "out", "--limit", "2", model=folder)) == 0
    assert "says itself what its model is" in fails(*nlvr(tmp_path / "new", "--pretrained", "x", model=folder))


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


def test_random_weights_are_reported(tmp_path, capsys):
    assert cli.main(nlvr(tmp_path, "--limit", "1", model="blip_nlvr_tiny_evit")) == 0
    assert "RANDOM weights" in capsys.readouterr().err


def captioning(captioned, vocabulary, output):
    argv = ["eval", "--task", "caption", "--model", "blip_caption_tiny", "--model-args", vocabulary[1][0], "eos_id=3"]
    argv += ["bos_id=23", "--vocabulary", vocabulary[0], "--data", str(captioned), "--output", str(output)]
    return argv


def test_captions_of_a_stopped_run_are_scored_all_together(captioned, vocabulary, tmp_path, monkeypatch, capsys):
    scored = []
    monkeypatch.setattr(caption_metrics, "caption_scorer_lacks", lambda: None)
    monkeypatch.setattr(caption_metrics, "spice_lacks", lambda: "no jars")
    monkeypatch.setattr(caption_metrics, "caption_scores", lambda *pair: scored.append(pair) or {"CIDEr": 1.5})
    argv = [*captioning(captioned, vocabulary, tmp_path / "out"), "--batch-size", "2"]

    def stop(self, loader, log, tick, _run=evaluator.Evaluator.run):
        _run(self, loader, log, lambda count: (_ for _ in ()).throw(KeyboardInterrupt))

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "run", stop)
        assert cli.main(argv) == 130
    assert len(rows(tmp_path / "out")) == 2 and not scored
    assert cli.main(argv) == 0

    ((written, references),) = scored
    assert list(written) == list(references) == ["0", "1", "2", "3", "4"]
    printed = capsys.readouterr().out
    assert "CIDEr  150.00" in printed and "SPICE: not scored (no jars)" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["scores"], summary["unscored"]) == ({"CIDEr": 1.5}, {"SPICE": "no jars"})


@pytest.mark.filterwarnings("default:captions are written")
def test_captions_are_written_for_scoring_elsewhere(captioned, vocabulary, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert cli.main(captioning(captioned, vocabulary, tmp_path / "out")) == 0
    results = json.loads((tmp_path / "out" / "caption_result.json").read_text())
    assert [result["image_id"] for result in results] == [f"{i}.jpg" for i in range(5)]
    assert [result["caption"] for result in results] == [row["caption"] for row in rows(tmp_path / "out")]
    captured = capsys.readouterr()
    assert "written, and not scored: captions are scored by the package pycocoevalcap" in captured.err
    assert "no scores here" in captured.out
    assert "captions: not scored (captions are scored by the package pycocoevalcap" in captured.out


def test_answers_are_written_for_scoring_elsewhere(captioned, vocabulary, tmp_path):
    """Two data sets in two folders, answers held back."""
    (captioned.parent / "more").mkdir()
    (captioned.parent / "1.jpg").rename(captioned.parent / "more" / "1.jpg")
    entries = [
        {"image": f"{i}.jpg", "question": "what is on the desk", "question_id": 7 + i, "dataset": name}
        for i, name in enumerate(("vqa", "vg"))
    ]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    argv = ["eval", "--task", "vqa", "--model", "blip_vqa_tiny_evit", "--model-args", *vocabulary[1], "eos_id=3"]
    argv += ["bos_id=23", "--vocabulary", vocabulary[0], "--data", str(tmp_path / "test.json")]
    argv += ["--images", f"vqa={captioned.parent}", "--images", f"vg={captioned.parent / 'more'}"]
    assert cli.main([*argv, "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "vqa_result.json").read_text())
    assert [set(result) for result in results] == [{"question_id", "answer"}] * 2
    assert [result["question_id"] for result in results] == [7, 8]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "blip_nlvr_tiny", "--k-test", "5"], "--k-test 5: only retrieval has a second stage"),
        (["--model", "blip_nlvr_tiny", "--images", "a", "--images", "vg=b"], "one folder, or one for each data set"),
        (["--model", "blip_nlvr_tiny", "--model-args", "image_sizes=3"], "did you mean image_size"),
    ],
)
def test_options_that_do_not_fit(options, complaint, tmp_path, fails):
    assert complaint in fails("eval", "--task", "nlvr", "--data", "synthetic:test", *options, "--output", str(tmp_path))


def test_default_outputs_of_two_models_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["eval", "--task", "nlvr", "--data", "synthetic:test:2", "--model"]
    for model in ("blip_nlvr_tiny", "blip_nlvr_tiny_evit", "blip_nlvr_tiny"):
        assert cli.main([*argv, model]) == 0
    folders = sorted(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("summary.json"))
    assert folders == ["eval/nlvr/blip_nlvr_tiny", "eval/nlvr/blip_nlvr_tiny_evit"]
