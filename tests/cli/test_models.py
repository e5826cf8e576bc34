"""The model argument of every command: a name, a saved folder, the hub; with a preset, with weights, with parts."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch

import vltprune as vp
from vltprune.cli import main as cli

SMALL = {"img_size": 32, "depth": 4}
KEEP = vp.Part("ratio", {"ratio": 0.31})


def evit(**parts):
    return vp.create_model("vit_tiny_patch16_224_evit", keep=KEEP, **parts, **SMALL)


@pytest.fixture
def calibrated(tmp_path):
    """A folder with a ViT whose ratio is not the preset's."""
    return str(vp.save(evit(), tmp_path / "calibrated"))


@pytest.fixture
def whole(tmp_path):
    """The same at the size that its name has, so that no arguments are needed besides the name."""
    model = vp.create_model("vit_tiny_patch16_224_evit", keep=KEEP, depth=12)
    return str(vp.save(model, tmp_path / "whole"))


@pytest.fixture
def hub(monkeypatch, calibrated):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: {"org/vit": calibrated}[name])
    return "hf-hub:org/vit"


def features(photos, tmp_path, *argv):
    output = tmp_path / "out"
    options = ["--output", str(output), "--overwrite", "--limit", "1", "--draw", "0"]
    assert cli.main(["features", argv[0], str(photos), *argv[1:], *options]) == 0
    return json.loads((output / "summary.json").read_text())


@pytest.mark.parametrize("options", [[], ["--preset", "evit"], ["--batch-size", "2"]])
def test_features_prunes_a_folder_as_saved(options, calibrated, photos, tmp_path):
    assert features(photos, tmp_path, calibrated, *options)["pruning"]["keep"] == KEEP.to_dict()


def test_features_takes_a_repository_of_the_hub(hub, photos, tmp_path):
    assert features(photos, tmp_path, hub)["pruning"]["keep"] == KEEP.to_dict()


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_tiny_patch16_224", []), ("vit_tiny_patch16_224", ["--preset", "evit"]), ("vit_tiny_patch16_224_evit", [])],
)
def test_features_keeps_the_calibration_of_the_weights(name, options, whole, photos, tmp_path):
    summary = features(photos, tmp_path, name, *options, "--pretrained", whole)
    assert summary["pruning"]["keep"] == KEEP.to_dict()
    replaced = features(
        photos, tmp_path, name, *options, "--pretrained", whole, "--keep", "count(count=9)", "--at", "-1"
    )
    assert (replaced["pruning"]["keep"], replaced["pruning"]["at"]) == ({"name": "count", "count": 9}, [-1])


def test_features_replaces_parts_of_a_folder(calibrated, photos, tmp_path):
    summary = features(photos, tmp_path, calibrated, "--keep", "count(count=3)")
    assert summary["pruning"]["keep"] == {"name": "count", "count": 3}


GUIDE = ["--guide", "codebook(anchors=4)"]


@pytest.mark.parametrize("options", [[], ["--preset", "random"], [*GUIDE, "--preset", "madtp", "--keep", "ratio"]])
def test_features_gives_a_dense_folder_a_preset(options, photos, tmp_path):
    folder = vp.save(vp.create_model("vit_tiny_patch16_224", **SMALL), tmp_path / "dense")
    summary = features(photos, tmp_path, str(folder), *options)
    wanted = options[options.index("--preset") + 1] if options else "distinct_attention"
    assert summary["pruning"]["scorer"]["name"] == wanted


@pytest.mark.parametrize("preset", ["madtp", "random"])
def test_a_contradicting_preset_is_refused(preset, calibrated, whole, photos, tmp_path, fails):
    output = ["--output", str(tmp_path / "out")]
    for argv in (
        [calibrated, str(photos), "--preset", preset],
        ["vit_tiny_patch16_224", str(photos), "--preset", preset, "--pretrained", whole],
        [f"vit_tiny_patch16_224_{preset}", str(photos), "--pretrained", whole],
    ):
        assert f"the preset '{preset}' has scorer='{preset}'" in fails("features", *argv, *output)
    assert "names a preset already" in fails(
        "features", "vit_tiny_patch16_224_evit", str(photos), "--preset", preset, *output
    )


@pytest.mark.parametrize("command", ["info", "macs"])
def test_info_and_macs_take_every_kind(command, calibrated, whole, hub, capsys):
    costs = []
    for argv in ([calibrated], [hub], ["vit_tiny_patch16_224_evit", "--pretrained", whole]):
        assert cli.main([command, *argv]) == 0
        captured = capsys.readouterr()
        assert "RANDOM" not in captured.err
        costs.append(next(line for line in captured.out.splitlines() if line.startswith("all")))
        assert command == "macs" or "keep     ratio(ratio=0.31)" in captured.out
    assert costs[0] == costs[1] != costs[2]
    if command == "info":
        assert cli.main(["info", calibrated, "keep=ratio(ratio=0.9)"]) == 0
        assert "ratio(ratio=0.9)" in capsys.readouterr().out


@pytest.mark.filterwarnings("default:.* was saved pruned")
def test_a_pruning_that_is_left_out_is_reported(whole, capsys):
    assert cli.main(["info", "vit_tiny_patch16_224", "--pretrained", whole]) == 0
    captured = capsys.readouterr()
    assert "the pruning is left out" in captured.err and "dense: append a preset" in captured.out


@pytest.mark.parametrize("kind", ["folder", "hub", "weights"])
def test_eval_and_predict_take_every_kind(kind, pair, tmp_path, monkeypatch, capsys):
    pruned = vp.create_model("blip_nlvr_tiny_evit", keep=KEEP)
    folder = str(vp.save(pruned, tmp_path / "pruned"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: {"o/p": folder}[name])
    model = {"folder": [folder], "hub": ["hf-hub:o/p"], "weights": ["blip_nlvr_tiny_evit", "--pretrained", folder]}[
        kind
    ]
    argv = ["eval", "--task", "nlvr", "--data", "synthetic:test", "--limit", "2", "--output", str(tmp_path / "eval")]
    assert cli.main([*argv, "--model", *model]) == 0
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert cli.main(["predict", *pair, "a circle", "--output", str(tmp_path), "--model", *model]) == 0
    captured = capsys.readouterr()
    assert "RANDOM" not in captured.err
    first = [round(tokens) for tokens in summary["kept"]["image"]][1]
    assert f"-> 145 {first}" not in captured.out and 1 - summary["macs"] / summary["dense_macs"] > 0.4


@pytest.mark.parametrize("how", [{"model": "FOLDER"}, {"model": "hf-hub:o/d"}, {"pretrained": "FOLDER"}])
def test_compress_takes_every_kind(how, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'vltprune[train]'")
    from vltprune.training import CompressConfig
    from vltprune.training.models import load_dense_model

    dense = vp.create_model("blip_nlvr_tiny")
    folder = str(vp.save(dense, tmp_path / "dense"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: {"o/d": folder}[name])
    config = {"task": "nlvr", "model": "blip_nlvr_tiny", "data": "synthetic:train:4", "val": "synthetic:val:4"}
    config |= {key: value.replace("FOLDER", folder) for key, value in how.items()}
    found = load_dense_model(CompressConfig(**config)).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in dense.state_dict().items())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["info", "no/such/folder"], "there is no folder no/such/folder, and no model has that name"),
        (["macs", "./nowhere"], "a repository of the hub is written hf-hub:org/name"),
        (["info", "blip_nlvr_tiny_madtp.p90"], "blip_nlvr_tiny_madtp has .p70, .p80"),
        (["macs", "blip_nlvr_tiny_madtp.p90"], "blip_nlvr_tiny_madtp has .p70, .p80"),
        (
            ["info", "clip_vit_b_32", "--pretrained", "openai"],
            "is a tag: it belongs to the name, 'clip_vit_b_32.openai'",
        ),
        (["info", "vit_tiny_patch16_224", "--pretrained", "nowhere.pth"], "there is no file nowhere.pth"),
        (["info", "clip_vit_b_32", "--pretrained"], "append a tag, one of .openai"),
        (["info", "FOLDER", "img_size=64"], "img_size=: the folder FOLDER says itself what its model is"),
        (["info", "FOLDER", "--pretrained"], "--pretrained: the folder FOLDER says itself"),
        (["macs", "FOLDER", "--image-size", "64"], "--image-size 64: the folder FOLDER says itself"),
        (
            ["eval", "--task", "nlvr", "--data", "synthetic:test", "--model", "blip_nlvr_tiny.p80"],
            "there are no weights 'blip_nlvr_tiny.p80'",
        ),
        (
            ["eval", "--task", "nlvr", "--data", "synthetic:test", "--model", "FOLDER", "--model-args", "a=1"],
            "a=: the folder",
        ),
    ],
)
def test_refusals(argv, says, calibrated, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert says.replace("FOLDER", calibrated) in fails(*(one.replace("FOLDER", calibrated) for one in argv))


@pytest.mark.parametrize("command", ["info", "macs", "eval", "predict", "features", "compress"])
def test_every_command_refuses_a_tag_that_there_is_not(command, pair, photos, tmp_path, fails):
    model = "blip_nlvr_tiny_madtp.p90" if command != "features" else "vit_tiny_patch16_224.p90"
    output = ["--output", str(tmp_path / "out")]
    task = ["--task", "nlvr", "--model", model, "--data", "synthetic:test"]
    argv = {
        "eval": [*task, *output],
        "compress": [*task, "--val", "synthetic:val", *output],
        "predict": [*pair, "a circle", "--model", model, *output],
        "features": [model, str(photos), *output],
    }
    assert f"there are no weights {model!r}" in fails(command, *argv.get(command, [model]))


def test_commands_and_python_agree_about_weights(capsys):
    """Random without a tag, and said to be; a tag's own with it."""
    for model, random in (("blip_nlvr_tiny_madtp", True), ("blip_nlvr_tiny_madtp.p80", False)):
        assert cli.main(["info", model]) == 0
        assert ("RANDOM weights here" in capsys.readouterr().err) == random
        assert vp.create_model(model).pruning.guide.is_untrained == random
    assert cli.main(["info", "blip_nlvr_tiny_madtp"]) == 0
    assert "append a tag, such as .p70" in capsys.readouterr().err


def test_both_spellings(capsys):
    outs = []
    for name in ("clip_vit_s_32_alt_random", "ViT-S-32-alt_random"):
        torch.manual_seed(0)
        assert cli.main(["macs", name]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]


def test_list_of_weights(capsys, fails):
    assert cli.main(["list", "--tags", "ViT-B-32"]) == 0
    assert "clip_vit_b_32.openai" in capsys.readouterr().out.split()
    assert cli.main(["list", "--tags", "nlvr"]) == 0
    assert {"blip_nlvr_base.nlvr2", "blip_nlvr_tiny_madtp.p80"} <= set(capsys.readouterr().out.split())
    assert cli.main(["list", "--tags", "vit_tiny*", "--library", "timm"]) == 0
    assert "vit_tiny_patch16_224.augreg_in21k" in capsys.readouterr().out.split()
    assert "no weights of them" in fails("list", "--tags", "blip_vqa_tiny")
    assert "resnet18" in fails("list", "resnet18") and "cannot" in fails("list", "coca")
