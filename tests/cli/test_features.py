"""`prune` from end to end, on models of every library."""

from __future__ import annotations

import json
import re
import struct

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import vltprune as vp
from vltprune.cli import main as cli


def test_prune_a_timm_model_to_a_budget(photos, tmp_path, capsys):
    output = tmp_path / "out"
    argv = ["prune", "vit_tiny_patch16_224_madtp", str(photos), "--output", str(output), "--reduction", "0.4"]
    argv += ["--guide", "codebook(anchors=8)", "--keep", "ratio", "--batch-size", "2", "--pictures", "2"]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert "RANDOM weights" in captured.err
    assert "placing its anchors" in captured.err
    assert re.search(r"calibrated on 3 pictures: ratio=0\.\d+: [\d.]+ GMACs, \d\d\.\d% fewer than dense", captured.err)
    assert "warning" not in captured.err
    assert "skipped 2 of 5 files" in captured.out
    assert all(f"cannot read {photos / name}" in captured.err for name in ("broken.jpg", "cut.jpg"))

    summary = json.loads((output / "summary.json").read_text())
    assert summary["macs_saved"] == pytest.approx(0.4, abs=0.02)
    assert summary["calibrated_on"] == 3
    found = summary["calibration"]
    assert (found["knob"], found["value"]) == ("ratio", summary["pruning"]["keep"]["ratio"])
    assert 1 - found["macs"] / found["dense_macs"] == pytest.approx(summary["macs_saved"])
    assert list(summary["pictures"]) == ["a.jpg", "b.png", "c.webp"]
    assert set(summary["unreadable"]) == {"broken.jpg", "cut.jpg"}
    assert all(len(one["tokens"]) == 13 and one["tokens"][0] == 197 for one in summary["pictures"].values())
    with safe_open(output / "features.safetensors", "pt") as file:
        assert file.get_tensor("features").shape == (3, 192)
        assert json.loads(file.metadata()["files"]) == list(summary["pictures"])
    assert sorted(path.name for path in (output / "pictures").iterdir()) == ["a.jpg.png", "b.png.png"]


def test_prune_turns_a_photograph_beside_a_broken_tag_and_goes_past_damage(photos, tmp_path, capsys):
    """A sound JPEG of Orientation 6 with a text where a number belongs, and a DDS that ends in its header."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x011A, 2, 4, 0x41424344)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    Image.new("RGB", (40, 20), "red").save(photos / "turned.jpg", exif=exif)
    Image.new("RGB", (40, 20)).save(photos / "whole.dds")
    (photos / "d.png").write_bytes((photos / "whole.dds").read_bytes()[:100])
    argv = ["prune", "vit_tiny_patch16_224", "--preset", "evit", str(photos), "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "turned.jpg" in summary["pictures"] and "d.png" in summary["unreadable"]
    assert f"skipped: cannot read {photos / 'd.png'} as a picture: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        (["clip_vit_s_32_alt", "--preset", "evit"], 256),
        (["blip_tiny_random", "--keep", "ratio(ratio=0.5)", "--at", "1,3"], 128),
        (["vit_tiny_patch16_224", "--scorer", "random", "--keep", "ratio", "--guide", "none", "--at", "0.5"], 192),
    ],
)
def test_prune_models_of_every_library(arguments, width, photos, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["prune", *arguments, str(photos), "--output", str(output), "--limit", "1", "--pictures", "0"]) == 0
    assert "1 pictures" in capsys.readouterr().out
    assert not (output / "pictures").exists()
    with safe_open(output / "features.safetensors", "pt") as file:
        assert file.get_tensor("features").shape == (1, width)


def test_prune_gives_the_features_of_the_library(photos, tmp_path):
    """With every token kept, features are the dense model's under the library's own preprocessing."""
    import timm
    from timm.data import create_transform, resolve_data_config

    weights, output = tmp_path / "weights", tmp_path / "out"
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    vp.save(dense, weights)
    reset = timm.create_model("vit_tiny_patch16_224").eval()
    vp.save(reset, weights)
    argv = ["prune", "vit_tiny_patch16_224_random", str(photos), "--keep", "ratio(ratio=1.0)", "--limit", "1"]
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
def test_prune_refusals(arguments, complaint, photos, tmp_path, fails):
    model, *options = arguments
    argv = ["prune", model, str(photos), "--output", str(tmp_path / "out"), "--limit", "1", *options]
    assert complaint in fails(*argv)


def test_prune_needs_a_folder_of_pictures(photos, tmp_path, fails):
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert "there is no folder" in fails("prune", "vit_tiny_patch16_224_evit", str(photos / "a.jpg"), *output)
    assert "has no pictures" in fails("prune", "vit_tiny_patch16_224_evit", str(tmp_path / "empty"), *output)
    for name in ("a.jpg", "b.png", "c.webp"):
        (photos / name).unlink()
    assert "none of the 2" in fails("prune", "vit_tiny_patch16_224_evit", str(photos), *output)
