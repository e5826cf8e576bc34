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
from vltprune.core.tokens import PackedTokens
from vltprune.deploy import graph
from vltprune.deploy.engines import ENGINES
from vltprune.layers import BlockSpec
from vltprune.layers.algorithms import choosing
from vltprune.layers.keepers.base import RandomRatio
from vltprune.layers.scorers.base import hash_integers

SUFFIXES = [engine.suffix for engine in ENGINES.values()]
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
    "clip text": ("encode_text", texts),
    "blip image": ("image_features", lambda batch: torch.randn(batch, 3, 96, 96)),
    "blip text": ("text_features", texts),
}
# whose texts end where their ids say, and are exported at batch 1
ONE_BY_ONE = ("clip text",)
# that cannot be exported, because they need the text of `vltprune.query`, or be frozen: they keep fewer tokens than counts say
NEVER_FIXED = ("ats", "pooling", "scissor", "trips")


def pruned(name, preset, **parts):
    """The pruned model, its guide placed, in evaluation mode."""
    draw = CALLS[name][1]
    model = vp.prune(dense(name.split()[0]), preset, **parts)
    if hasattr(model.pruning.guide, "anchors"):
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


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_counts_per_instance_are_one_graph(form, tmp_path):
    """Where nothing is fused and where almost everything is."""
    keep = "threshold(temperature=0.001, power=4.0)"  # all stay where the one anchor's token scores lowest
    model, draw = pruned("vit", "madtp", guide="codebook(anchors=1)", keep=keep, at=0)
    inputs = draw(24)
    written = vp.export(model, tmp_path / f"vit{ENGINES[form].suffix}", inputs)
    assert written.inputs[0].shape == (1, 3, 32, 32)
    with torch.no_grad(), vp.collect() as traces:
        wanted = model(inputs)
    found = ENGINES[form].run(written.file, [{"images": one[None]} for one in inputs])
    assert torch.allclose(torch.cat([one for (one,) in found]), wanted, atol=1e-4)
    counts = {*traces[0].lengths[0]}
    assert 17 in counts and min(counts) <= 4


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_texts_of_their_own_lengths_are_exported_at_batch_1(suffix, tmp_path):
    """Where two layers in a row prune: the length behind the second depends on that behind the first."""
    model, _ = pruned("bert", "madtp", keep="ratio(0.5)")
    ids, mask = sentences(3)
    written = vp.export(model, tmp_path / f"a{suffix}", {"input_ids": ids, "attention_mask": mask}, batch=1)
    assert [value.shape for value in written.inputs] == [(1, 12), (1, 12)]
    with pytest.raises(vp.ExportError, match="write batch=1"):
        vp.export(model, tmp_path / f"b{suffix}", {"input_ids": ids, "attention_mask": mask})


class Operators(torch.nn.Module):
    """What the exporter lacks, or writes so that ONNX Runtime computes something else."""

    def forward(self, x):
        ordered, largest = x.sort(dim=1, descending=True, stable=True), (x * 3).long().cummax(1)
        ascending = x.sort(dim=1, stable=True).values
        return {
            "order": ordered.indices,
            "ascending order": x.argsort(dim=1, stable=True),
            "largest": largest.values,
            "place of the largest": largest.indices,
            "largest of the batch": x.cummax(0).values,
            "place in the batch": x.cummax(0).indices,
            "insertion": torch.searchsorted(ascending, x / 3),
            "insertion to the right": torch.searchsorted(ascending, x, right=True),
            "truth": torch.where(x > 1, x > 2, x < -1),
            "a small number": (x * 0 + 1e-8) * 1e8 - 1e-9,
            "logarithm": torch.nn.functional.logsigmoid(50 * x),
            "sum of exponentials": torch.logaddexp(100 * x, 50 * x - 99),
            "shift": x.long() >> 1,
            "lower bits of a hash": hash_integers((99 * x).long(), 3) & 0xFFFF,
            "upper bits of a hash": hash_integers((99 * x).long(), 3) >> 16,
        }


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_operators_compute_what_they_do_in_torch(form, tmp_path):
    """Ties too."""
    x, others = (torch.randint(-4, 4, (batch, 17)).float() for batch in (3, 5))
    exported = torch.export.export(Operators(), (x,), dynamic_shapes=(({0: Dim("batch")}),))
    engine, wanted = ENGINES[form], Operators()(others)
    file = tmp_path / f"a{engine.suffix}"
    engine.write(exported, file, ["x"], [*wanted])
    for found, (name, one) in zip(engine.run(file, [{"x": others}])[0], wanted.items(), strict=True):
        assert torch.allclose(found.to(one.dtype), one, atol=1e-7, rtol=1e-6), name


class RandomCounts(torch.nn.Module):
    """How many tokens of each instance [batch, 16, 8] `random_ratio` keeps."""

    def __init__(self):
        super().__init__()
        self.keeper = RandomRatio(BlockSpec("image", 0, 1, 8, 2, has_summary=False), mean=0.5, half_width=0.5)

    def forward(self, x):
        tokens = PackedTokens.pack(x)
        return {"counts": self.keeper(tokens.x[:, 0], tokens, None)}


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_random_ratios_are_drawn_as_in_torch(form, tmp_path):
    x, engine = torch.randn(8, 16, 8), ENGINES[form]
    wanted, file = RandomCounts()(x)["counts"], tmp_path / f"a{ENGINES[form].suffix}"
    assert len(wanted.unique()) > 3
    engine.write(torch.export.export(RandomCounts(), (x,)), file, ["x"], ["counts"])
    assert engine.run(file, [{"x": x}])[0][0].tolist() == wanted.tolist()


class Deduplicates(torch.nn.Module):
    """Which 3 of the tokens [1, n, 3] that a mask [1, n] has `deduplicate` keeps."""

    def forward(self, x, mask):
        x = x[mask][None]
        torch._check(x.shape[1] >= 2)
        counts, candidates = torch.tensor([3]), torch.ones_like(x[..., 0], dtype=torch.bool)
        return {"keep": choosing.deduplicate(x, candidates, counts, x[..., 0])}


def test_tokens_of_any_number_are_compared_round_after_round():
    x, masks = torch.randn(1, 6, 3), [torch.arange(6)[None] < length for length in (5, 6, 4, 3)]
    exported = torch.export.export(Deduplicates(), (x, masks[0])).module()
    for mask in masks:
        keep = exported(x, mask)["keep"]
        assert keep.sum() == 3 and torch.equal(keep, Deduplicates()(x, mask)["keep"])


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in NEVER_FIXED])
@pytest.mark.parametrize("name", CALLS)
def test_every_preset_with_fixed_counts_runs_everywhere(name, preset, tmp_path):
    """As torch.export's program, in ONNX Runtime and in OpenVINO, with any batch."""
    (method, _), (model, draw) = CALLS[name], pruned(name, preset)
    model = frozen(model, name, draw) if graph.is_adaptive(model) else model
    one_by_one = name in ONE_BY_ONE
    with torch.no_grad():
        call = graph.Call(model, draw(1 if one_by_one else 3), method)
        batches = [draw(1), draw(1 if one_by_one else 4)]
        wanted = [call.outputs(batch) for batch in batches]
        # anew for each format: the ONNX exporter takes a program whose sizes depend on data only once
        trace = functools.partial(graph.trace, call, call.tensors, any_batch=not one_by_one)
        found = {"pt2": [trace().module()(batch) for batch in batches]}
    for form in ("onnx", "openvino"):
        engine, file = ENGINES[form], tmp_path / f"a{ENGINES[form].suffix}"
        engine.write(trace(), file, call.names, [*wanted[0]])
        found[form] = engine.run(file, [{call.names[0]: batch} for batch in batches])
    for form, outputs in found.items():
        for several, expected in zip(outputs, wanted, strict=True):
            for one, other in zip(several, expected.values(), strict=True):
                assert torch.allclose(one, other, atol=1e-5 if form == "pt2" else 1e-4), form


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "trips"])
def test_every_adaptive_preset_is_one_graph(preset, form, tmp_path):
    model, draw = pruned("vit", preset)
    inputs = torch.cat([0.1 * draw(1), draw(1), 3 * draw(1)])
    if not graph.is_adaptive(model):
        pytest.skip("its counts are fixed: the test above exports it for any batch")
    assert vp.export(model, tmp_path / f"a{ENGINES[form].suffix}", inputs).batches > len(inputs)
