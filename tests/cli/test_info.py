"""`info` and `macs` from end to end."""

from __future__ import annotations

import pytest
import torch

import vltprune as vp
from vltprune.cli import main as cli


def test_info_of_a_pruned_model(capsys):
    assert cli.main(["info", "blip_nlvr_tiny_madtp.p80"]) == 0
    out = capsys.readouterr().out
    for wanted in ("scorer   madtp", "image tower: 6 layers, width 128, 4 heads", "text tower: 4", "prunes", "fewer"):
        assert wanted in out


@pytest.mark.parametrize("task", ["caption", "vqa", "retrieval"])
def test_info_of_the_tasks_of_blip(capsys, task):
    assert cli.main(["info", f"blip_{task}_tiny_madtp"]) == 0
    out = capsys.readouterr().out
    assert "image tower: 6 layers" in out
    assert ("text tower: 4 layers" in out) == (task != "caption")


def test_info_of_a_dense_model_takes_its_arguments(capsys):
    assert cli.main(["info", "vit_tiny_patch16_224", "img_size=64", "depth=2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("vit_tiny_patch16_224: vit_tiny_patch16_224 of timm, ")
    assert "append a preset to prune it, as in vit_tiny_patch16_224_" in out
    assert "2 layers, width 192, 3 heads, a summary token" in out
    assert "pruned" not in out.replace("pruners", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["blip_nlvr_tinny"], "did you mean blip_nlvr_tiny"),
        (["blip_nlvr_tiny_madtp", "patchsize=8"], "did you mean patch_size"),
        (["blip_nlvr_tiny_madtp", "patch_size"], "write name=value"),
        (["blip_nlvr_tiny_madtp", "keep=ratio(rato=0.5)"], "did you mean ratio"),
        (["blip_nlvr_tiny_madtp", "scorer=madpt"], "did you mean madtp"),
        (["resnet18"], "no host runs it"),
        (["blip_nlvr_tiny_madtp.p80", "--pretrained", "nowhere.pth"], "there is no file nowhere.pth"),
    ],
)
def test_info_refusals(arguments, complaint, fails):
    assert complaint in fails("info", *arguments)


def test_macs_agrees_with_the_library(capsys):
    assert cli.main(["macs", "vit_tiny_patch16_224", "--image-size", "64"]) == 0
    out = capsys.readouterr().out
    model = vp.prune(vp.create_model("vit_tiny_patch16_224", img_size=64), "random")
    cost = vp.count_macs(model, torch.randn(1, 3, 64, 64))
    assert f"{cost.dense_total / 1e9:.3f} GMACs" in out
    assert "attention" in out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["blip_nlvr_tiny_evit", "--image-size", "64", "--tokens", "9"], "two images and a sentence"),
        (["blip_tiny"], "(an image and a sentence)"),
        (["blip_caption_tiny_random"], "decoder      dense"),
        (["blip_vqa_tiny"], "(an image, a question and an answer of 5 tokens)"),
        (["clip_vit_s_32_alt_random", "--tokens", "20"], "text tower"),
        (["llava_tiny", "--tokens", "9"], "(a sentence and an image)"),
        (["llava_tiny_random"], "decoder      dense"),
    ],
)
def test_macs_of_composites(arguments, wanted, capsys):
    assert cli.main(["macs", *arguments]) == 0
    assert wanted in capsys.readouterr().out


def test_a_vision_language_model(capsys):
    assert cli.main(["info", "llava_tiny"]) == 0
    out = capsys.readouterr().out
    assert "image tower: 5 layers" in out and "(a sentence and an image)" in out and "decoder      dense" in out


def test_macs_refusals(fails):
    assert "reads no sentence" in fails("macs", "vit_tiny_patch16_224", "--tokens", "4")
    assert "max_positions" in fails("macs", "blip_nlvr_tiny", "--tokens", "99")
    assert "multiple" in fails("macs", "blip_nlvr_tiny", "--image-size", "97")


def _saved_by_transformers(folder, kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 50}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = {
        "text": lambda: transformers.BertModel(transformers.BertConfig(**text)),
        "image": lambda: transformers.ViTModel(transformers.ViTConfig(**vision)),
        "both": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config={**text, "eos_token_id": 49}, vision_config=vision, projection_dim=16)
        ),
    }[kind]()
    vp.prune(model.eval(), "random", keep="ratio(ratio=0.5)").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "instance"), [("text", "a sentence"), ("image", "an image"), ("both", "a sentence and an image")]
)
def test_macs_of_models_of_transformers(kind, instance, tmp_path, capsys):
    folder = str(_saved_by_transformers(tmp_path / "saved", kind))
    assert cli.main(["macs", folder]) == 0
    out = capsys.readouterr().out
    assert "fewer" in out and f"instance ({instance})" in out
    assert cli.main(["info", folder]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}: a ") and "2 layers, width 32, 2 heads" in out


def test_models_of_transformers_read_sentences_of_the_length_asked_for(tmp_path, capsys, fails):
    folder = str(_saved_by_transformers(tmp_path / "text", "text"))
    assert "at most 512 tokens" in fails("macs", folder, "--tokens", "513")
    assert "reads no sentence" in fails(
        "macs", str(_saved_by_transformers(tmp_path / "image", "image")), "--tokens", "4"
    )
