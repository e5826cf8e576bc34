"""`export` from end to end, and what it refuses before it builds a model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import vltprune as vp
from vltprune.cli import main as cli


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The folder of a small dense ViT."""
    torch.manual_seed(0)
    model = vp.create_model("vit_tiny_patch16_224", img_size=96, depth=1)
    return str(vp.save(model, tmp_path_factory.mktemp("vit")))


def test_a_model_is_written_with_its_description(vit, tmp_path, capsys):
    file = tmp_path / "new" / "vit.pt2"
    assert cli.main(["export", vit, "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert f"wrote {file}" in out and "images: float32 [any, 3, 96, 96]" in out
    assert "torch.export.load is within" in out
    facts = json.loads(file.with_suffix(".json").read_text())
    assert facts["backbone"] == "vit_tiny_patch16_224" and facts["preprocessing"]["input_size"] == [3, 96, 96]
    images = torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(file).module()(images)[0], vp.load(vit)(images), atol=1e-5)


def test_images_fix_the_counts(vit, photos, tmp_path, capsys):
    model = vp.prune(vp.load(vit), "attention", at=0)
    folder, file = str(vp.save(model, tmp_path / "pruned")), str(tmp_path / "a.pt2")
    assert cli.main(["export", folder, "--data", str(photos), "--quantile", "1.0", "--output", file]) == 0
    out = capsys.readouterr().out
    assert "changed for" in out and "images: float32 [any, 3, 96, 96]" in out
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["pruning"]["keep"]["name"] == "counts"


def test_nothing_is_overwritten_unasked(vit, tmp_path, fails, monkeypatch):
    (tmp_path / "vit.json").write_text("{}")
    arguments = ["export", vit, "--output", str(tmp_path / "vit.pt2"), "--batch", "2"]
    assert "holds results already (vit.json): add --overwrite" in fails(*arguments)
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert json.loads((tmp_path / "vit.json").read_text())["inputs"][0]["shape"] == [2, 3, 96, 96]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "tensorrt"], "invalid choice: 'tensorrt'"),
        (["--output", "a.bin"], "the suffix '.bin' is not that of a format: write onnx (.onnx)"),
        (["--format", "pt2", "--output", "a.onnx"], "write a.pt2"),
        (["--batch", "0"], "'0' is no whole number above 0"),
        (["--quantile", "1.5", "--data", "{photos}"], "'1.5' is no quantile"),
        (["--quantile", "0.5"], "--quantile 0.5 is over the images of --data DIR"),
        (["--data", "nowhere"], "there is no folder 'nowhere'"),
        (["--output", "{photos}/notes.txt/a.pt2"], "cannot write to the folder"),
    ],
)
def test_wrong_arguments_build_no_model(arguments, says, photos, monkeypatch, fails):
    def work(*args, **kwargs):
        raise AssertionError("a model was built before the arguments were checked")

    monkeypatch.chdir(photos.parent)
    monkeypatch.setattr(nn.Module, "__init__", work)
    assert says in fails("export", "vit_tiny_patch16_224", *[one.format(photos=photos) for one in arguments])


def test_what_a_model_does_not_have_is_refused(vit, photos, tmp_path, fails):
    output = ["--output", str(tmp_path / "a.pt2")]
    assert "is one tower: leave --tower out" in fails("export", vit, "--tower", "image", *output)
    assert "--data fixes counts per instance" in fails("export", vit, "--data", str(photos), *output)
    assert "has image, text" in fails("export", "blip_nlvr_tiny", "--tower", "audio", *output)


def test_of_a_vision_language_model_the_image_tower_is_written(tmp_path, fails, capsys):
    output = ["--output", str(tmp_path / "a.pt2")]
    for arguments in ([], ["--tower", "language"]):
        message = fails("export", "llava_tiny", *arguments, *output)
        assert (
            "which is exported dense and with batch=1 alone: write vltprune.export(model.model.vision_tower, path, images)"
            in message
        )
        assert "--tower image" in message
    assert cli.main(["export", "llava_tiny_random", "--tower", "image", *output]) == 0
    assert "pixel_values: float32 [any, 3, 96, 96]" in capsys.readouterr().out
