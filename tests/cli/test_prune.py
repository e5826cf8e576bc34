"""`prune` from end to end: a model of each library, calibrated on each kind of data, saved, and loaded again."""

from __future__ import annotations

import json
import re

import pytest
import torch
from registered import registered

import vltprune as vp
from vltprune.cli import main as cli
from vltprune.evaluation import tasks


def prune(model, data, output, *options, reduction="0.4"):
    return ["prune", str(model), "--reduction", reduction, "--data", str(data), "--output", str(output), *options]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The folder of a small dense ViT."""
    torch.manual_seed(0)
    model = vp.create_model("vit_tiny_patch16_224", img_size=96, depth=4)
    return vp.save(model, tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a small dense CLIP with open_clip's tokenizer."""
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3}
    model = vp.create_model("clip", embed_dim=32, vision_cfg=vision, text_cfg=text)
    return vp.save(model, tmp_path_factory.mktemp("clip"))


def saved(model, *inputs):
    """Per tower, the share of its MACs that a model saves on inputs."""
    return vp.count_macs(model, *inputs).reductions


def images_of(model, folder):
    from vltprune.data.images import load_image

    return torch.stack([vp.transforms(model)(load_image(folder / name)) for name in ("a.jpg", "b.png", "c.webp")])


@pytest.mark.parametrize("options", [[], ["--preset", "madtp", "--guide", "codebook(anchors=4)"], ["--keep", "ratio"]])
def test_an_image_model(options, vit, photos, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(prune(vit, photos, output, *options)) == 0
    captured = capsys.readouterr()
    assert re.search(r"^calibrated on 3 images: [\d.]+ % fewer MACs at \w+=[\d.]+ ", captured.out, re.MULTILINE)
    assert re.search(r"^image +0\.\d{3} +0\.\d{3} +[34]\d\.\d % fewer", captured.out, re.MULTILINE)
    assert f"model = vp.load({str(output)!r})" in captured.out
    assert ("placing its anchors" in captured.err) == ("madtp" in options)
    assert "skipped: cannot read" in captured.err

    model = vp.load(output)
    assert saved(model, images_of(model, photos))["image"] == pytest.approx(0.4, abs=0.02)
    assert model.pruning.guide is None or not model.pruning.guide.is_untrained
    wanted = "distinct_attention" if "madtp" not in options else "madtp"
    assert model.pruning.config.part("scorer").name == wanted
    assert cli.main(["features", str(output), str(photos), "--output", str(tmp_path / "features")]) == 0
    summary = json.loads((tmp_path / "features" / "summary.json").read_text())
    assert summary["macs_saved"] == pytest.approx(0.4, abs=0.02)


def test_two_lines_of_python_do_the_same(vit, photos, tmp_path):
    assert cli.main(prune(vit, photos, tmp_path / "out")) == 0
    dense = vp.load(vit)
    model = vp.prune(dense, "attention", reduction=0.4, data=[images_of(dense, photos)])
    assert vp.load(tmp_path / "out").pruning.config.keep == model.pruning.config.keep


def test_images_alone_prune_the_image_tower_of_two(clip, photos, tmp_path, capsys):
    assert cli.main(prune(clip, photos, tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert "The text tower stays dense" in out and "give --data captions.json --images DIR" in out
    model = vp.load(tmp_path / "out")
    images, texts = images_of(model, photos), torch.randint(1, 1000, (3, 24))
    found = saved(model, images, texts)
    assert found["image"] == pytest.approx(0.4, abs=0.02) and found["text"] == 0


def test_captions_calibrate_both_towers(clip, captioned, tmp_path, capsys):
    entries = [{**entry, "captions": ["one two three " * 7]} for entry in json.loads(captioned.read_text())]
    captioned.write_text(json.dumps(entries))
    assert cli.main(prune(clip, captioned, tmp_path / "out", "--keep", "ratio", reduction="0.3")) == 0
    out = capsys.readouterr().out
    assert "calibrated on 5 records" in out and re.search(r"^text .* fewer", out, re.MULTILINE)
    assert re.search(r"^all .* (29|30)\.\d % fewer", out, re.MULTILINE)
    argv = ["eval", "--task", "retrieval", "--model", str(tmp_path / "out"), "--data", str(captioned)]
    assert cli.main([*argv, "--output", str(tmp_path / "eval")]) == 0
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["reductions"]["image"] > 0.1 and summary["reductions"]["text"] > 0.1


def test_a_target_of_one_tower(clip, captioned, tmp_path):
    assert cli.main(prune(clip, captioned, tmp_path / "out", "--keep", "ratio", reduction="image=0.3")) == 0
    keep = vp.load(tmp_path / "out").pruning.config.keep
    assert keep["text"].args == vp.Part("ratio").args and keep["image"] != keep["text"]


def test_synthetic_pairs_calibrate_the_tiny_model(tmp_path, capsys):
    assert cli.main(prune("blip_nlvr_tiny", "synthetic:train:6", tmp_path / "out", "--pretrained")) == 0
    assert "calibrated on 6 records" in capsys.readouterr().out
    model = vp.load(tmp_path / "out")
    assert set(model.pruning.towers) == {"image", "text"} and all(t.pruners for t in model.pruning.towers.values())
    argv = ["eval", "--task", "nlvr", "--model", str(tmp_path / "out"), "--data", "synthetic:train:6"]
    assert cli.main([*argv, "--output", str(tmp_path / "eval")]) == 0
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["macs_saved"] == pytest.approx(0.4, abs=0.02)


def test_a_task_is_told_whether_to_be_strict(tmp_path):
    class Own(tasks.Nlvr):
        @staticmethod
        def load_records(data, images, strict):
            return tasks.Nlvr.load_records(data, images, strict)

    with registered(tasks.tasks, own=Own):
        assert cli.main(prune("blip_nlvr_tiny_attention", "synthetic:train:8", tmp_path / "out", "--task", "own")) == 0


@pytest.mark.parametrize("task", ["caption", "vqa", "retrieval"])
def test_every_task_of_blip(task, captioned, tmp_path):
    entries = [{"image": f"{i}.jpg", "caption": "a star", "question": "a star", "answer": "a star"} for i in range(3)]
    captioned.write_text(json.dumps(entries))
    folder = vp.save(
        vp.create_model(f"blip_{task}_tiny", vision_depth=2, text_depth=2, image_size=48), tmp_path / "dense"
    )
    assert cli.main(prune(folder, captioned, tmp_path / "out", "--keep", "ratio", reduction="image=0.3")) == 0
    assert vp.load(tmp_path / "out").pruning.towers["image"].pruners


def test_a_pruned_model_keeps_its_pruning_and_is_calibrated_anew(photos, tmp_path, capsys):
    """Also that of a tower that images do not run."""
    model = "blip_nlvr_tiny_madtp.p80"
    assert cli.main(prune(model, photos, tmp_path / "out")) == 0
    assert "The text tower keeps the pruning that it had" in capsys.readouterr().out
    before, after = vp.create_model(model).pruning, vp.load(tmp_path / "out").pruning
    assert after.config.part("scorer") == before.config.part("scorer") and after.towers["text"].pruners
    guides = [one.guide.state_dict() for one in (before, after)]
    assert all(torch.equal(value, guides[1][name]) for name, value in guides[0].items())


def test_a_saved_model_is_never_overwritten_unless_asked(vit, photos, tmp_path, fails):
    output = tmp_path / "out"
    assert cli.main(prune(vit, photos, output)) == 0
    before = (output / "config.json").read_bytes()
    assert "holds results already (config.json, model.safetensors): add --overwrite" in fails(
        *prune(vit, photos, output)
    )
    assert (output / "config.json").read_bytes() == before
    assert cli.main(prune(vit, photos, output, "--overwrite", reduction="0.2")) == 0
    assert (output / "config.json").read_bytes() != before


def test_the_default_output_has_the_models_name(vit, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prune", str(vit), "--reduction", "0.4", "--data", str(photos)]) == 0
    assert vp.load(tmp_path / "pruned" / vit.name).pruning


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--images", "PHOTOS"], "--images goes with annotations"),
        (["--task", "vqa"], "--task goes with annotations"),
        (
            ["--reduction", "image=0.5,text=0.5"],
            "--reduction text=...: a folder of images calibrates the image tower alone",
        ),
        (["--data", "nowhere"], "--data: there is no annotation file nowhere"),
        (["--data", "EMPTY"], "has no "),
        (["--data", "train-{000..009}.tar"], "prune reads no shards"),
        (["--data", "DEV", "--images", "nowhere"], "--images: there is no folder nowhere"),
        (["--preset", "evit"], "names a preset already"),
    ],
)
def test_data_is_checked_before_the_work(options, says, photos, captioned, tmp_path, monkeypatch, fails):
    def work(*_, **__):
        raise AssertionError("a model was built before the arguments were checked")

    monkeypatch.setattr("vltprune.models.resolve.create_model", work)
    (tmp_path / "empty").mkdir()
    named = {"PHOTOS": str(photos), "EMPTY": str(tmp_path / "empty"), "DEV": str(captioned)}
    argv = prune("vit_tiny_patch16_224_evit", photos, tmp_path / "out", *(named.get(one, one) for one in options))
    assert says in fails(*argv)


def test_what_cannot_be_calibrated_is_said(vit, captioned, photos, tmp_path, fails):
    output = tmp_path / "out"
    assert "no task reads annotations for" in fails(*prune(vit, captioned, output))
    assert "use a blip_vqa" in fails(*prune(vit, captioned, output, "--task", "vqa"))
    assert "names the tower 'vision'" in fails(
        *prune("blip_nlvr_tiny", "synthetic:val:2", output, reduction="vision=0.5")
    )
    for name in ("a.jpg", "b.png", "c.webp"):
        (photos / name).unlink()
    assert "none of the 2 images could be read" in fails(*prune(vit, photos, output))
    assert not list(output.iterdir())
