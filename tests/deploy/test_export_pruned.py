"""Export of pruned models: fixed counts for any batch, counts per instance at batch 1, ties decided as in PyTorch."""

from __future__ import annotations

import functools

import open_clip
import pytest
import torch
import transformers
from small_models import PRESETS, images, scrambled, sentences
from timm.models.vision_transformer import VisionTransformer
from torch.export import Dim

import vltprune as vp
from vltprune.deploy import graph
from vltprune.deploy.engines import ENGINES

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@functools.cache
def dense(name):
    """A small random model and an example of what is exported of it: inputs for a batch, and the method."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if name == "vit":
            sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
            return scrambled(VisionTransformer(**sizes))
        if name == "bert":
            return scrambled(transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=40)))
        if name == "clip":
            vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
            text = {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
            return scrambled(open_clip.CLIP(8, vision, text))
        return scrambled(vp.create_model("blip_retrieval_tiny", vision_depth=2, text_depth=2))


def texts(batch):
    """Token ids [batch, 12] of equal length, whose end has the highest one."""
    ids = torch.randint(1, 38, (batch, 12))
    ids[:, -1] = 39
    return ids


# what is exported of each model: its method, and an example of so many instances
CALLS = {
    "vit": (None, images),
    "bert": (None, texts),
    "clip image": ("encode_image", images),
    "blip image": ("image_features", lambda batch: torch.randn(batch, 3, 96, 96)),
    "blip text": ("text_features", texts),
}


def pruned(name, preset, **parts):
    """The pruned model, its guide placed, in evaluation mode."""
    draw = CALLS[name][1]
    model = vp.prune(dense(name.split()[0]), preset, **parts)
    if model.pruning.guide is not None:
        model.pruning.guide.anchors.data.normal_(generator=torch.Generator().manual_seed(0))
    return model.eval(), draw


def program(model, method, example, any_batch):
    with torch.no_grad():
        return graph.trace(graph.Call(model, example, method), (example,), any_batch).module()


def frozen(model, name, draw):
    method = CALLS[name][0]
    return vp.freeze(model, [lambda m: getattr(m, method or "forward")(draw(4))]).model


def differs(module, model, method, inputs):
    with torch.no_grad():
        wanted = graph.Call(model, inputs, method)(inputs)
        return max(float((a - b).abs().max()) for a, b in zip(module(inputs), wanted, strict=True))


@pytest.mark.parametrize(("name", "preset"), [("vit", "tome"), ("clip image", "evit"), ("bert", "evit")])
def test_fixed_counts_take_any_batch(name, preset):
    model, draw = pruned(name, preset)
    module = program(model, CALLS[name][0], draw(3), any_batch=True)
    for batch in (1, 5):
        assert differs(module, model, CALLS[name][0], draw(batch)) < 1e-5


def test_counts_per_instance_are_one_graph(tmp_path):
    """Where nothing is fused and where almost everything is."""
    keep = "threshold(temperature=0.001, power=4.0)"  # all stay where the one anchor's token scores lowest
    model, draw = pruned("vit", "madtp", guide="codebook(anchors=1)", keep=keep, at=0)
    inputs = draw(24)
    written = vp.export(model, tmp_path / "vit.onnx", inputs)
    assert written.inputs[0].shape == (1, 3, 32, 32)
    with torch.no_grad(), vp.collect() as traces:
        wanted = model(inputs)
    found = ENGINES["onnx"].run(written.file, [{"images": one[None]} for one in inputs])
    assert torch.allclose(torch.cat([one for (one,) in found]), wanted, atol=1e-4)
    counts = {*traces[0].lengths[0]}
    assert 17 in counts and min(counts) <= 4


def test_texts_of_their_own_lengths_are_exported_at_batch_1(tmp_path):
    model, _ = pruned("bert", "evit")
    ids, mask = sentences(3)
    written = vp.export(model, tmp_path / "a.pt2", {"input_ids": ids, "attention_mask": mask}, batch=1)
    assert [value.shape for value in written.inputs] == [(1, 12), (1, 12)]
    with pytest.raises(vp.ExportError, match="write batch=1"):
        vp.export(model, tmp_path / "b.pt2", {"input_ids": ids, "attention_mask": mask})


class Operators(torch.nn.Module):
    """What the exporter lacks, and additions of numbers that its optimizer takes for zero."""

    def forward(self, x):
        small = (x * 0 + 1e-8) * 1e8 - 1e-9
        ordered, largest = x.sort(dim=1, descending=True, stable=True), (x * 3).long().cummax(1)
        return small, ordered.indices, x.argsort(dim=1, stable=True), largest.values, largest.indices, *x.cummax(0)


@pytest.mark.parametrize("form", ["openvino"])  # by way of ONNX
def test_ties_are_decided_as_in_torch(form, tmp_path):
    x, others = (torch.randint(-4, 4, (batch, 17)).float() for batch in (3, 5))
    exported = torch.export.export(Operators(), (x,), dynamic_shapes=(({0: Dim("batch")}),))
    engine = ENGINES[form]
    file = tmp_path / f"a{engine.suffix}"
    engine.write(exported, file, ["x"], [*"abcdefg"])
    for found, wanted in zip(engine.run(file, [{"x": others}])[0], Operators()(others), strict=True):
        assert torch.equal(found.to(wanted.dtype), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("ats", "pooling", "scissor", "trips")])
def test_every_preset_with_fixed_counts_takes_any_batch(name, preset):
    model, draw = pruned(name, preset)
    model = frozen(model, name, draw) if graph.is_adaptive(model) else model
    test = program(model, CALLS[name][0], draw(3), any_batch=True)
    for batch in (1, 4):
        assert differs(test, model, CALLS[name][0], draw(batch)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["madtp", "attention", "ltp", "asvit", "flowcut", "avit", "dymu", "algm"])
def test_every_adaptive_preset_is_one_graph(preset):
    model, draw = pruned("vit", preset)
    module = program(model, None, draw(1), any_batch=False)
    for scale in (0.1, 1.0, 3.0):
        assert differs(module, model, None, scale * draw(1)) < 1e-5
