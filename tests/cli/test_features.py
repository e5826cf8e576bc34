"""`features` from end to end, on models of every library."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import vltprune as vp
from vltprune.cli import features as command
from vltprune.cli import main as cli


def test_a_timm_model_to_a_budget(photos, tmp_path, capsys):
    output = tmp_path / "out"
    argv = ["features", "vit_tiny_patch16_224_madtp", str(photos), "--output", str(output), "--reduction", "0.4"]
    argv += ["--guide", "codebook(anchors=8)", "--keep", "ratio", "--batch-size", "2", "--draw", "2"]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert "RANDOM weights" in captured.err
    assert "placing its anchors" in captured.err
    assert re.search(r"calibrated on 3 images: \d\d\.\d % fewer MACs at ratio=0\.\d+ \(", captured.err)
    assert "warning" not in captured.err
    assert "skipped 2 of 5 files" in captured.out
    assert all(f"cannot read {photos / name}" in captured.err for name in ("broken.jpg", "cut.jpg"))

    summary = json.loads((output / "summary.json").read_text())
    assert summary["macs_saved"] == pytest.approx(0.4, abs=0.02)
    assert summary["calibrated_on"] == 3
    found = summary["calibration"]
    assert (found["knob"], found["value"]) == ("ratio", summary["pruning"]["keep"]["ratio"])
    assert 1 - found["macs"] / found["dense_macs"] == pytest.approx(summary["macs_saved"])
    assert list(summary["images"]) == ["a.jpg", "b.png", "c.webp"]
    assert set(summary["unreadable"]) == {"broken.jpg", "cut.jpg"}
    assert all(len(one["tokens"]) == 13 and one["tokens"][0] == 197 for one in summary["images"].values())
    with safe_open(output / "features.safetensors", "pt") as file:
        assert file.get_tensor("features").shape == (3, 192)
        assert json.loads(file.metadata()["files"]) == list(summary["images"])
    assert sorted(path.name for path in (output / "images").iterdir()) == ["a.png", "b.png"]


def test_orientation_is_applied_despite_a_broken_tag_and_damaged_files_are_skipped(photos, tmp_path, capsys):
    """A sound JPEG of Orientation 6 with a text where a number belongs, and a DDS that ends in its header."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x011A, 2, 4, 0x41424344)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    Image.new("RGB", (40, 20), "red").save(photos / "turned.jpg", exif=exif)
    Image.new("RGB", (40, 20)).save(photos / "whole.dds")
    (photos / "d.png").write_bytes((photos / "whole.dds").read_bytes()[:100])
    argv = ["features", "vit_tiny_patch16_224", "--preset", "evit", str(photos), "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "turned.jpg" in summary["images"] and "d.png" in summary["unreadable"]
    assert f"skipped: cannot read {photos / 'd.png'} as an image: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        (["clip_vit_s_32_alt", "--preset", "evit"], 256),
        (["blip_tiny_random", "--keep", "ratio(ratio=0.5)", "--at", "1,3"], 128),
        (["vit_tiny_patch16_224", "--scorer", "random", "--keep", "ratio", "--guide", "none", "--at", "0.5"], 192),
    ],
)
def test_models_of_every_library(arguments, width, photos, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["features", *arguments, str(photos), "--output", str(output), "--limit", "1", "--draw", "0"]) == 0
    assert "1 images" in capsys.readouterr().out
    assert not (output / "images").exists()
    with safe_open(output / "features.safetensors", "pt") as file:
        assert file.get_tensor("features").shape == (1, width)


@pytest.mark.filterwarnings("ignore:saved, but create_model did not build")
def test_gives_the_features_of_the_library(photos, tmp_path):
    """With every token kept, features are the dense model's under the library's own preprocessing."""
    import timm
    from timm.data import create_transform, resolve_data_config

    weights, output = tmp_path / "weights", tmp_path / "out"
    reset = timm.create_model("vit_tiny_patch16_224").eval()
    vp.save(reset, weights)
    argv = ["features", "vit_tiny_patch16_224_random", str(photos), "--keep", "ratio(ratio=1.0)", "--limit", "1"]
    assert cli.main([*argv, "--pretrained", str(weights / "model.safetensors"), "--output", str(output)]) == 0

    image = create_transform(**resolve_data_config({}, model=reset))(Image.open(photos / "a.jpg"))
    reset.reset_classifier(0)
    with torch.no_grad(), safe_open(output / "features.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("features"), reset(image[None]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["vit_tiny_patch16_224_evit", "--preset", "madtp"], "names a preset already"),
        (["vit_tiny_patch16_224", "--preset", "evitt"], "--preset: there is no preset 'evitt'; did you mean evit"),
        (["vit_tiny_patch16_224_evit", "--at", "first"], "--at 'first'"),
        (["vit_tiny_patch16_224_evit", "--at", "40"], "depths 0 .. 11"),
        (["vit_tiny_patch16_224_evit", "--reduction", "1.5"], "between 0 and 1"),
        (["vit_tiny_patch16_224_evit", "--at", "11", "--reduction", "0.9"], "out of reach"),
        (["vit_tiny_patch16_224_evit", "--guide", "none", "--scorer", "madtp"], "reads the alignment guide"),
        (["vit_tiny_patch16_224_evit", "--pretrained", "nowhere.pth"], "there is no file nowhere.pth"),
        (["vit_tiny_patch16_22"], "did you mean"),
    ],
)
def test_features_refusals(arguments, complaint, photos, tmp_path, fails):
    model, *options = arguments
    argv = ["features", model, str(photos), "--output", str(tmp_path / "out"), "--limit", "1", *options]
    assert complaint in fails(*argv)


def test_needs_a_folder_of_images(photos, tmp_path, fails):
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert "there is no folder" in fails("features", "vit_tiny_patch16_224_evit", str(photos / "a.jpg"), *output)
    assert "has no " in fails("features", "vit_tiny_patch16_224_evit", str(tmp_path / "empty"), *output)
    for name in ("a.jpg", "b.png", "c.webp"):
        (photos / name).unlink()
    assert "none of the 2" in fails("features", "vit_tiny_patch16_224_evit", str(photos), *output)


def features(photos, output, *options, model="vit_tiny_patch16_224_evit"):
    return ["features", model, str(photos), "--output", str(output), *options]


def drawings(output):
    return {path.name for path in (output / "images").iterdir()}


def test_results_are_never_overwritten_unless_asked(photos, tmp_path, fails):
    """And none of a former run stays among the new ones, nor does a file of the user's own go."""
    output = tmp_path / "out"
    assert cli.main(features(photos, output)) == 0
    (output / "images" / "mine.png").write_bytes(b"of the user")
    before = (output / "summary.json").read_bytes()
    complaint = fails(*features(photos, output, "--limit", "1"))
    assert f"{output} holds results already (summary.json, features.safetensors, images)" in complaint
    assert "add --overwrite to replace them, or choose another --output" in complaint
    assert (output / "summary.json").read_bytes() == before and drawings(output) == {
        "a.png",
        "b.png",
        "c.png",
        "mine.png",
    }

    assert cli.main(features(photos, output, "--limit", "1", "--overwrite")) == 0
    assert drawings(output) == {"a.png", "mine.png"}
    summary = json.loads((output / "summary.json").read_text())
    assert [row["drawing"] for row in summary["images"].values()] == ["a.png"]
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_a_run_that_fails_leaves_the_former_results(photos, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert cli.main(features(photos, output)) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def stopped(self, files, *batch, _add=command.Results.add):
        _add(self, files, *batch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command.Results, "add", stopped)
        assert cli.main(features(photos, output, "--overwrite", "--batch-size", "1")) == 130
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["x.jpg", "y.png"], ["x.png", "y.png"]),
        (["x.jpg", "x.png", "x.webp"], ["x.png", "x-2.png", "x-3.png"]),
        (["X.jpg", "x.jpg", "STRASSE.png", "straße.png"], ["X.png", "x-2.png", "STRASSE.png", "straße-2.png"]),
        (["x-2.jpg", "x.jpg", "x.png"], ["x-2.png", "x.png", "x-3.png"]),
        (["é.jpg", "e\u0301.jpg"], ["é.png", "e\u0301-2.png"]),
        (["a.b.jpg"], ["a.b.png"]),
    ],
)
def test_drawings_have_names_of_their_own(files, names):
    found = command.draw_names([Path(file) for file in files])
    assert [found[Path(file)] for file in files] == names


def test_images_of_one_stem_are_all_drawn(tmp_path):
    for name, color in (("x.jpg", "red"), ("x.png", "blue")):
        Image.new("RGB", (64, 64), color).save(tmp_path / name)
    assert cli.main(features(tmp_path, tmp_path / "out")) == 0
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["images"]
    assert {file: row["drawing"] for file, row in rows.items()} == {"x.jpg": "x.png", "x.png": "x-2.png"}
    assert drawings(tmp_path / "out") == {"x.png", "x-2.png"}


def test_the_default_output_has_the_models_name(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--limit", "1", "--draw", "0"]
    assert cli.main(["features", "vit_tiny_patch16_224_evit", str(photos), *options]) == 0
    vp.save(vp.create_model("vit_tiny_patch16_224", img_size=32, depth=2), "runs/mine")
    assert cli.main(["features", "runs/mine", str(photos), *options]) == 0
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == ["mine", "vit_tiny_patch16_224_evit"]


def test_a_dense_model_is_pruned_by_attention(photos, tmp_path):
    """The preset for use without training; it needs no guide, so that nothing is fitted."""
    output = tmp_path / "out"
    assert cli.main(features(photos, output, "--limit", "1", "--draw", "0", model="vit_tiny_patch16_224")) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["pruning"] == vp.preset("attention").to_dict() and "guide_fitted_on" not in summary
