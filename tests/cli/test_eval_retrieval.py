"""`eval --task retrieval` from end to end: with CLIP, and with BLIP in its two stages."""

from __future__ import annotations

import json

import encoders
import pytest
import torch
from on_disk import ROOM, on_disk
from PIL import Image
from transformers import AutoTokenizer

import vltprune as vp
from vltprune.cli import main as cli
from vltprune.evaluation import evaluator, metrics


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The folder of a CLIP of open_clip, dense."""
    return vp.save(vp.create_model("clip_vit_s_32_alt"), tmp_path_factory.mktemp("weights") / "clip")


@pytest.mark.parametrize("model", ["clip_vit_s_32_alt", "clip_vit_s_32_alt_evit"])
def test_retrieval_with_clip(model, weights, captioned, tmp_path, capsys):
    import open_clip

    output = tmp_path / "out"
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
    scores = metrics.recalls(similarity, [i for i, one in enumerate(entries) for _ in one["captions"]])
    assert summary["scores"] == pytest.approx(scores)


@pytest.mark.parametrize("preset", ["", "_evit"])
def test_retrieval_with_a_folder_whose_text_tower_is_of_transformers(preset, captioned, tmp_path):
    encoder = encoders.write(tmp_path / "encoder")
    model = vp.create_model(f"clip{preset}", **encoders.clip(encoder))
    folder = vp.save(model, tmp_path / "model")
    argv = ["eval", "--task", "retrieval", "--model", str(folder), "--data", str(captioned)]
    assert cli.main([*argv, "--output", str(tmp_path / "out"), "--batch-size", "2"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())

    images = torch.stack([vp.transforms(model)(Image.open(captioned.parent / f"{i}.jpg")) for i in range(5)])
    entries = json.loads(captioned.read_text())
    words = AutoTokenizer.from_pretrained(encoder)([text for one in entries for text in one["captions"]], padding=True)
    with torch.no_grad():
        texts = model.encode_text(torch.tensor(words.input_ids), normalize=True)
        similarity = model.encode_image(images, normalize=True) @ texts.T
    scores = metrics.recalls(similarity, [i for i, one in enumerate(entries) for _ in one["captions"]])
    assert summary["scores"] == pytest.approx(scores)
    assert (summary["macs_saved"] > 0.1) == bool(preset)


def blip(captioned, output, vocabulary, *options, model="blip_retrieval_tiny_evit"):
    file, arguments = vocabulary
    argv = ["eval", "--task", "retrieval", "--model", model, "--vocabulary", file]
    argv += ["--model-args", *arguments, "vision_depth=2", "text_depth=2"]
    return [*argv, "--data", str(captioned), "--output", str(output), "--batch-size", "2", *options]


@pytest.mark.parametrize("model", ["blip_retrieval_tiny", "blip_retrieval_tiny_evit"])
def test_retrieval_with_blip_in_two_stages(model, captioned, vocabulary, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(blip(captioned, output, vocabulary, "--k-test", "3", model=model)) == 0
    summary = json.loads((output / "summary.json").read_text())
    second = summary["matching"]
    assert set(second["scores"]) == set(summary["scores"])
    assert second["k_test"] == 3 and second["pairs"] == sum(row["pairs"] for row in rows(output / "matching_5x9_k3"))
    assert second["macs"] > summary["towers"]["text"][0]  # with cross-attention and the head
    assert (second["macs"] < second["dense_macs"]) == (set(second["kept"]) == {"text"}) == model.endswith("evit")
    out = capsys.readouterr().out
    assert "GMACs of one image" in out and "the nearest 3 judged" in out and "GMACs of a matched pair" in out


def test_the_second_stage_can_be_left_out_or_repeated(captioned, vocabulary, tmp_path):
    for options in (["--limit", "3"], [], ["--k-test", "2"], ["--k-test", "0"]):
        assert cli.main(blip(captioned, tmp_path / "out", vocabulary, *options)) == 0
    assert "matching" not in json.loads((tmp_path / "out" / "summary.json").read_text())
    stages = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert stages == {"matching_3x6_k128", "matching_5x9_k128", "matching_5x9_k2"}


def test_both_stages_resume_where_they_were_stopped(captioned, vocabulary, tmp_path, monkeypatch):
    """Stopped after each batch, one of the images broken: the same rows as in one go."""
    (captioned.parent / "2.jpg").write_bytes(b"broken")
    assert cli.main(blip(captioned, tmp_path / "whole", vocabulary, "--workers", "0")) == 0

    def once(self, loader, log, tick=None, _run=evaluator.Evaluator.run):
        def stop(count):
            tick(count)
            if count:
                raise KeyboardInterrupt

        _run(self, loader, log, stop)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "run", once)
        codes = [cli.main(blip(captioned, tmp_path / "stopped", vocabulary, "--workers", "3")) for _ in range(9)]
    assert codes == [130] * 7 + [0] * 2
    for stage in (".", "matching_4x6_k128"):
        whole, stopped = (
            [{**row, "seconds": 0} for row in rows(tmp_path / folder / stage)] for folder in ("whole", "stopped")
        )
        assert whole == stopped


@on_disk
def test_photographs_with_random_weights_score_by_chance(vocabulary, tmp_path):
    argv = blip(ROOM / "flickr8k" / "dev.json", tmp_path, vocabulary, "--limit", "24", "--k-test", "4")
    assert cli.main(argv) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["records"] == 24 and summary["skipped"] == []
    for scores in (summary["scores"], summary["matching"]["scores"]):
        assert scores["i2t_r1"] < 0.3 and scores["t2i_r1"] < 0.2  # of 24; nothing tells the right ones
