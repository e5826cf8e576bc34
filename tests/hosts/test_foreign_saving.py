"""Pruned models of timm and open_clip in the hands of these libraries' own functions that save, upload and load."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import open_clip
import pytest
import timm
import timm.models
import timm.utils
import torch
from checks import randomize
from open_clip.push_to_hf_hub import save_for_hf
from timm.data import resolve_model_data_config

import vltprune as vp
from vltprune.cost.budget_control import BudgetControl
from vltprune.io.checkpoint import load_into

TINY = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 4}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PAIR = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2, "vocab_size": 50, "context_length": 8},
}
PRUNING = {
    "without tensors": {"preset": "evit", "keep": "ratio(ratio=0.6)"},
    "a guide": {"preset": "madtp", "guide": "codebook(anchors=6)"},
    "a guide and keepers": {"preset": "madtp", "guide": "codebook(anchors=6)", "keep": "learned"},
}
prunings = pytest.mark.parametrize("parts", PRUNING.values(), ids=PRUNING)


def vit(**arguments):
    return randomize(timm.create_model("vit_tiny_patch16_224", **{**TINY, **arguments}))


def pruned_vit(parts, **arguments):
    return randomize(vp.prune(vit(**arguments), **parts))


def pair(custom=False):
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    model = randomize(kind(**copy.deepcopy(PAIR)))
    open_clip.set_model_preprocess_cfg(model, {"size": 32, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)})
    return model


def same_tensors(again, model):
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@prunings
@pytest.mark.parametrize("safe", [True, False, "both"])
def test_what_timm_saves_for_the_hub_is_loaded_pruned(tmp_path, parts, safe):
    model = pruned_vit(parts)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=safe)
    again = vp.load(tmp_path)
    same_tensors(again, model)
    assert again.pruning.config == model.pruning.config
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert resolve_model_data_config(again) == {**resolve_model_data_config(model), "input_size": (3, 32, 32)}
    same_tensors(vp.load(vp.save(again, tmp_path / "ours")), model)


@prunings
@pytest.mark.parametrize("pretrained", [False, True])
def test_timm_refuses_to_build_a_dense_model_from_it(tmp_path, parts, pretrained):
    timm.models.save_for_hf(pruned_vit(parts), tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'vltprune'"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=pretrained)


def test_what_timm_changes_of_a_pruned_model_and_what_was_calibrated_are_saved(tmp_path):
    model = pruned_vit(PRUNING["without tensors"], global_pool="avg")
    BudgetControl(model).commit(0.4)
    model.reset_classifier(7, global_pool="max")
    model.set_input_size(24)
    timm.models.save_for_hf(model, tmp_path, data_config={"mean": (0.1, 0.2, 0.3)})
    again = vp.load(tmp_path)
    assert torch.equal(again(IMAGES[..., :24, :24]), model(IMAGES[..., :24, :24]))
    assert again.pruning.config.keep.args == {"ratio": 0.4}
    assert resolve_model_data_config(again)["mean"] == (0.1, 0.2, 0.3)


@prunings
def test_what_timm_uploads_is_loaded_pruned(tmp_path, monkeypatch, parts):
    def upload(api, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda *_, repo_id=None, **__: SimpleNamespace(repo_id="o/m")
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", lambda *_, **__: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    model = pruned_vit(parts)
    timm.models.push_to_hf_hub(model, "o/m")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    same_tensors(vp.from_pretrained("hf-hub:o/m"), model)


def test_a_dense_folder_of_timm_is_not_taken_for_a_pruned_one(tmp_path):
    timm.models.save_for_hf(vit(), tmp_path, safe_serialization=True)
    with pytest.raises(vp.CheckpointError, match=r"does not say how it is pruned.*vltprune\.save"):
        vp.load(tmp_path)


def test_weights_that_do_not_fit_timms_config_are_refused(tmp_path):
    timm.models.save_for_hf(pruned_vit(PRUNING["a guide"]), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["model_args"]["vltprune"]["pruning"]["guide"] = "codebook(anchors=5)"
    file.write_text(json.dumps(config))
    with pytest.raises(vp.CheckpointError, match=r"of another shape: pruning\.guide\.anchors"):
        vp.load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(vp.CheckpointError, match="there is no file"):
        vp.load(tmp_path)


@prunings
@pytest.mark.parametrize("average", [False, True])
def test_checkpoints_of_timms_training(tmp_path, parts, average):
    model, other = pruned_vit(parts), pruned_vit(parts)
    saver = timm.utils.CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        args=argparse.Namespace(model="vit_tiny_patch16_224"),
        model_ema=timm.utils.ModelEmaV3(model) if average else None,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, 1.0)
    file = str(tmp_path / "last.pth.tar")
    timm.models.load_checkpoint(other, file)
    same_tensors(other, model)
    for read in (lambda m: timm.models.resume_checkpoint(m, file), lambda m: load_into(m, file)):
        other = pruned_vit(parts)
        read(other)
        same_tensors(other, model)
    if "guide" in parts:  # what pruning adds is not dropped in silence
        for dense in (vit(), vp.prune(vit(), "evit")):
            with pytest.raises(RuntimeError, match=r"Unexpected key.*guide\.anchors"):
                timm.models.load_checkpoint(dense, file)
            with pytest.raises(vp.CheckpointError, match=r"guide\.anchors"):
                load_into(dense, file)


@prunings
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("wrapper", ["", "module.", "module._orig_mod."])
def test_checkpoints_of_open_clips_training(tmp_path, parts, custom, wrapper):
    model = randomize(vp.prune(pair(custom), **parts))
    state = {wrapper + key: value for key, value in model.state_dict().items()}
    file = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "name": "run", "state_dict": state}, file)
    readers = [lambda m: load_into(m, file)]
    if wrapper != "module._orig_mod.":  # open_clip takes one prefix off
        readers.append(lambda m: open_clip.load_checkpoint(m, str(file)))
    for read in readers:
        other = vp.prune(pair(custom), **parts)
        read(other)
        same_tensors(other, model)


@prunings
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_dense_weights_into_a_pruned_pair(tmp_path, parts, custom):
    dense, model = pair(custom), vp.prune(pair(custom), **parts)
    own = {key: value.clone() for key, value in model.state_dict().items() if key not in dense.state_dict()}
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    for read in (
        lambda: open_clip.load_checkpoint(model, str(tmp_path / "dense.pt"), strict=False),
        lambda: load_into(model, tmp_path / "dense.pt"),
    ):
        randomize(model.host)
        read()
        assert all(torch.equal(model.state_dict()[key], value) for key, value in (dense.state_dict() | own).items())


class Tokenizer:
    def save_pretrained(self, folder):
        Path(folder, "tokenizer_config.json").write_text("{}")


@prunings
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_what_open_clip_saves_for_the_hub_holds_the_weights_and_not_the_pruning(tmp_path, parts, custom):
    """As docs/supported.md says: nothing that open_clip writes is the model's to add to."""
    model = randomize(vp.prune(pair(custom), **parts))
    config = {**copy.deepcopy(PAIR), **({"custom_text": True} if custom else {})}
    save_for_hf(model, Tokenizer(), config, tmp_path)
    with pytest.raises(
        vp.CheckpointError, match=r"load_into\(pruned, '.*open_clip_model.*vltprune\.save\(pruned, folder\)"
    ):
        vp.load(tmp_path)
    for file in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        for read in (open_clip.load_checkpoint, load_into):
            other = vp.prune(pair(custom), **parts)
            read(other, str(tmp_path / file))
            same_tensors(other, model)
    if "guide" in parts:
        with pytest.raises(RuntimeError, match=r"Unexpected key.*guide\.anchors"):
            open_clip.create_model(f"local-dir:{tmp_path}")
    else:
        same_tensors(open_clip.create_model(f"local-dir:{tmp_path}").eval(), model.host)
