"""Export: what is written computes what the model does, and says what a program needs to serve it."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from small_models import images, scrambled, small
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vltprune as vp
from vltprune.deploy.engines import ENGINES, find_format
from vltprune.deploy.sidecar import labels

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}


@pytest.fixture(scope="module")
def vit():
    """Of one block, because writing takes long for each."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    return scrambled(VisionTransformer(**sizes))


class TwoOutputs(nn.Module):
    """Takes tensors and a number, and returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, first, second=None, factor=1.0):
        sums = self.linear(first) if second is None else self.linear(first) + second
        return {"sums": sums * factor, "none": None, "pair": (first.sum(1), first)}

    def halves(self, first):
        return self.linear(first) / 2


@pytest.mark.parametrize("form", ENGINES)
def test_every_format_takes_any_batch(form, vit, tmp_path):
    file = tmp_path / "new" / f"vit{SUFFIXES[form]}"
    written = vp.export(vit, file, images(3))
    assert written.file == file and written.format == form
    assert written.difference < 1e-5
    assert sorted(one.name for one in written.files) == sorted(one.name for one in file.parent.iterdir())
    others = images(5)
    found = ENGINES[form].run(file, [{"images": others}])[0]
    with torch.no_grad():
        assert torch.allclose(found[0], vit(others), atol=1e-5)
    facts = json.loads(file.with_suffix(".json").read_text())
    assert facts["inputs"] == [{"name": "images", "dtype": "float32", "shape": [None, 3, 32, 32]}]
    assert facts["outputs"] == [{"name": "output", "dtype": "float32", "shape": [None, 5]}]
    assert facts["format"] == form and facts["pruning"] is None
    assert f"wrote {file}" in str(written) and "images: float32 [any, 3, 32, 32]" in str(written)


def test_inputs_may_be_named_and_outputs_are(tmp_path):
    model = TwoOutputs().train()
    named = {"first": torch.randn(2, 4), "second": torch.randn(2, 3), "factor": 2.0}
    written = vp.export(model, tmp_path / "a.pt2", named)
    assert [value.name for value in written.inputs] == ["first", "second"]
    assert [(value.name, value.shape) for value in written.outputs] == [
        ("sums", (None, 3)),
        ("pair.0", (None,)),
        ("pair.1", (None, 4)),
    ]
    assert model.training
    by_position = vp.export(model, tmp_path / "b.pt2", (named["first"], named["second"]))
    assert [value.name for value in by_position.inputs] == ["first", "second"]
    method = vp.export(model, tmp_path / "c.pt2", named["first"], batch=2, method="halves")
    assert [value.shape for value in method.outputs] == [(2, 3)]


def test_a_file_that_disagrees_is_not_written(vit, tmp_path, monkeypatch):
    file = tmp_path / "vit.pt2"
    file.write_text("a former export")
    engine = ENGINES["pt2"]
    right = type(engine).run
    monkeypatch.setattr(type(engine), "run", lambda *args: [[one + 2e-3] for (one,) in right(*args)])
    with pytest.raises(
        vp.ExportError, match=r"differs from the model by \d\.\de-0\d, and 1e-04 is allowed: nothing was"
    ):
        vp.export(vit, file, images(2))
    monkeypatch.setattr(type(engine), "run", lambda *args: [[one * torch.nan] for (one,) in right(*args)])
    with pytest.raises(vp.ExportError, match="differs from the model by nan"):
        vp.export(vit, file, images(2))
    monkeypatch.setattr(type(engine), "run", lambda *args: [[one[:, :1]] for (one,) in right(*args)])
    with pytest.raises(vp.ExportError, match=r"returns output \[2, 1\], and the model \[2, 5\]"):
        vp.export(vit, file, images(2))
    assert [one.name for one in tmp_path.iterdir()] == ["vit.pt2"]
    assert file.read_text() == "a former export"


def test_wrong_requests(vit, tmp_path, monkeypatch):
    x = images(2)
    for path, form, says in (
        ("a.bin", None, r"the suffix '.bin' is not that of a format: write onnx \(.onnx\), openvino \(.xml\)"),
        ("a.onnx", "pt2", "the suffix '.onnx' is not that of a format: write a.pt2"),
        ("a.onnx", "tensorrt", "format='tensorrt' is none: write one of onnx"),
    ):
        with pytest.raises(ValueError, match=says):
            vp.export(vit, tmp_path / path, x, form)
    with pytest.raises(ValueError, match="batch=0 must be 1 or more"):
        vp.export(vit, tmp_path / "a.pt2", x, batch=0)
    with pytest.raises(TypeError, match="method='encode': a VisionTransformer has no such method"):
        vp.export(vit, tmp_path / "a.pt2", x, method="encode")
    with pytest.raises(TypeError, match="inputs hold no tensor"):
        vp.export(vit, tmp_path / "a.pt2", {"x": 3})
    with pytest.raises(TypeError, match="not a function"):
        vp.export(vit, tmp_path / "a.pt2", lambda model: model(x))
    with pytest.raises(TypeError, match="takes 3 inputs, not 4"):
        vp.export(TwoOutputs(), tmp_path / "a.pt2", (x, x, x, x))
    with pytest.raises(ValueError, match=r"same batch as their first dimension, .* first \[2, 4\], second \[3, 3\]"):
        vp.export(TwoOutputs(), tmp_path / "a.pt2", (torch.randn(2, 4), torch.randn(3, 3)))
    with pytest.raises(ValueError, match=r"bfloat16 on cpu: export it .*, model.cpu\(\).float\(\)"):
        vp.export(nn.Linear(3, 3).bfloat16(), tmp_path / "a.pt2", torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"reads the text of vltprune\.query"):
        vp.export(vp.prune(small("vit").model, "trips"), tmp_path / "a.pt2", x)
    with pytest.raises(
        ValueError, match=r"LlavaFor.* has a language model .*: write vltprune\.export\(model\.model\.vision_tower"
    ):
        vp.export(vp.create_model("llava_tiny"), tmp_path / "a.onnx", torch.zeros(1, 3, 96, 96))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx, onnxscript, onnxruntime: pip install 'vltprune\[export\]'"):
        vp.export(vit, tmp_path / "a.onnx", x)
    assert [*tmp_path.iterdir()] == []


def test_a_text_that_may_be_missing_is_not_in_the_file(tmp_path):
    parts = {"keep": "count(count=3)", "selector": "top", "place": "block", "at": 1}
    model, x = vp.prune(small("vit").model, "cdpruner", **parts), images(2)
    with vp.query(torch.randn(2, model.pruning.guide.query_dim)):
        with pytest.raises(ValueError, match=r"export outside of `with vltprune\.query\(\.\.\.\)`"):
            vp.export(model, tmp_path / "a.pt2", x)
        with_text = model(x)
    written = vp.export(model, tmp_path / "a.pt2", x)
    (found,) = torch.export.load(written.file).module()(x)
    assert torch.allclose(found, model(x), atol=1e-5)
    assert not torch.allclose(found, with_text, atol=1e-2)


def test_counts_per_instance_need_batch_1(tmp_path):
    with pytest.raises(ValueError, match=r"batch=4: this model keeps .* vltprune.freeze\(model, batches\).model"):
        vp.export(vp.prune(small("vit").model, "attention"), tmp_path / "a.pt2", images(4), batch=4)


def test_what_cannot_be_traced_says_what_to_do(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(vp.ExportError, match=r"cannot export this Branches: torch\.export cannot take it"):
        vp.export(Branches(), tmp_path / "a.pt2", torch.randn(2, 3))
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_written_says_what_to_do(vit, tmp_path, monkeypatch):
    def fails(*args):
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(type(ENGINES["pt2"]), "write", fails)
    for model, says in (
        (vit, "cannot take it"),
        (vp.prune(vit, "attention"), r"vltprune\.freeze\(model, batches\)\.model"),
    ):
        with pytest.raises(vp.ExportError, match=rf"{says}.*\(no such operator\)"):
            vp.export(model, tmp_path / "a.pt2", images(2))
    assert [*tmp_path.iterdir()] == []


def test_the_description_has_preprocessing_and_labels():
    timm = vp.create_model("test_vit")
    assert dict(vp.transforms(timm).config)["library"] == "timm"
    assert len(labels(timm)) == 1000 and labels(timm)[0].startswith("tench")
    assert labels(vp.prune(timm, "evit")) == labels(timm)
    assert labels(vp.create_model("test_vit", num_classes=3)) is None
    assert labels(small("vit").model) is None

    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    clip = vp.create_model("clip", embed_dim=8, vision_cfg=vision, text_cfg=text)
    for model in (timm, clip, vp.create_model("blip_nlvr_tiny", vision_depth=1, text_depth=1)):
        preprocessing = vp.transforms(model)
        facts = json.loads(json.dumps(dict(preprocessing.config)))
        assert facts["mean"] == pytest.approx(preprocessing.mean.tolist())
        assert facts["std"] == pytest.approx(preprocessing.std.tolist())
        assert facts["interpolation"] == "bicubic"


def test_labels_of_transformers():
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, id2label={0: "cat", 1: "dog"})
    assert labels(transformers.ViTForImageClassification(config)) == ["cat", "dog"]


def test_the_format_follows_from_the_suffix():
    assert [find_format(f"a{suffix}", None) for suffix in SUFFIXES.values()] == [*SUFFIXES]
    assert find_format("A.ONNX", "onnx") == "onnx"
