"""Models that `finish` made for inference: equal results, an untouched original, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_models import small
from timm.layers.patch_embed import PatchEmbed
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import vltprune as vp
from vltprune.deploy.prepacked import Activation, PatchLinear, PrepackedLinear

EXACT = {"rtol": 1e-5, "atol": 1e-5}


def pruned(name="vit", preset="madtp"):
    """A pruned small model; its guide has few anchors."""
    parts = {"guide": "codebook(anchors=5)"} if preset == "madtp" else {}
    return vp.prune(small(name).model, preset, **parts)


def tensors(out):
    """The tensors of an output, in their order."""
    if isinstance(out, torch.Tensor):
        return [out]
    entries = [out.x] if isinstance(out, vp.PackedTokens) else list(out.values()) if hasattr(out, "keys") else out
    return [one for entry in entries if entry is not None for one in tensors(entry)]


@torch.no_grad()
def same(one, other, inputs):
    """Whether both return the same, within rounding."""
    for a, b in zip(tensors(one(*inputs)), tensors(other(*inputs)), strict=True):
        assert_close(a, b, **EXACT)


CASES = [("vit", preset) for preset in (None, "madtp", "evit", "tome", "dynamicvit")]
CASES += [("blip", preset) for preset in (None, "madtp", "dynamicvit")]
CASES += [("nlvr", "madtp"), ("text", "evit"), ("vilt", "madtp")]


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_a_finished_model_returns_the_same(name, preset):
    model = small(name).model if preset is None else pruned(name, preset)
    for batch, keep_weights in ((1, True), (3, False)):
        finished = vp.finish(model, keep_weights=keep_weights)
        assert type(finished) is type(model) and finished is not model
        assert finished.finished.prepacked and finished.finished.fused and not finished.finished.left
        torch.manual_seed(batch)
        inputs = small(name).draw(batch)
        # by which ViLT shuffles patches
        torch.manual_seed(7)
        expected = [one.clone() for one in tensors(model(*inputs))]
        torch.manual_seed(7)
        for a, b in zip(tensors(finished(*inputs)), expected, strict=True):
            assert_close(a, b.detach(), **EXACT)
            assert not a.requires_grad


@pytest.mark.parametrize("name", ["vit", "blip"])
@torch.no_grad()
def test_the_original_stays_bit_for_bit(name):
    model, inputs = pruned(name), small(name).draw(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(key, id(module), type(module), module.training) for key, module in model.named_modules()]
    modules += [(key, id(module), type(module), module.training) for key, module in model.host.named_modules()]
    out = [one.clone() for one in tensors(model(*inputs))]
    config = model.pruning.config

    finished = vp.finish(model)
    vp.calibrate(finished, [inputs], 0.3, tolerance=0.2)
    vp.fit_guide(finished, [inputs])
    finished(*inputs)

    after = [(key, id(module), type(module), module.training) for key, module in model.named_modules()]
    after += [(key, id(module), type(module), module.training) for key, module in model.host.named_modules()]
    assert after == modules and model.pruning.config == config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(*inputs)), out, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "finished")


@torch.no_grad()
def test_what_is_not_replaced_is_shared():
    model = pruned()
    finished = vp.finish(model)
    own, others = dict(finished.host.named_parameters()), dict(model.host.named_parameters())
    assert own and all(value.data_ptr() == others[key].data_ptr() for key, value in own.items())
    assert finished.host.blocks[0].attn.qkv.weight.data_ptr() == model.host.blocks[0].attn.qkv.weight.data_ptr()


@torch.no_grad()
def test_a_pruned_model_stays_one():
    """Its pruning and MACs; and reduction stays before the output projection."""
    for name in ("vit", "blip"):
        model, inputs = pruned(name), small(name).draw(3)
        finished = vp.finish(model)
        assert vp.is_pruned(finished) and finished.pruning.config == model.pruning.config
        assert finished.pruning.host is finished.host is not model.host
        assert finished.pruning.guide is not model.pruning.guide
        costs = [vp.count_macs(one, *inputs) for one in (finished, model)]
        assert costs[0].total == costs[1].total and costs[0].dense_total == costs[1].dense_total
        with vp.collect() as traces:
            model(*inputs)
            finished(*inputs)
        half = len(traces) // 2
        for before, after in zip(traces[:half], traces[half:], strict=True):
            assert [layer.lengths for layer in before.layers] == [layer.lengths for layer in after.layers]
            assert [layer.reduced_early for layer in before.layers] == [layer.reduced_early for layer in after.layers]
    assert any(layer.reduced_early for trace in traces[half:] for layer in trace.layers)


def test_the_record_says_what_was_done():
    finished = vp.finish(small("vit").model)
    record = finished.finished
    assert "blocks.0.mlp.fc1" in record.fused and "blocks.0.mlp.fc1" in record.prepacked
    assert "patch_embed.proj" in record.prepacked and "head" in record.prepacked
    assert record.bytes == sum(
        one.weight.nbytes for one in small("vit").model.modules() if hasattr(one, "in_features")
    ) + (small("vit").model.patch_embed.proj.weight.nbytes)
    assert str(record).startswith(
        "18 layers prepacked, 4 of them with their activation: 0.2 MB of reordered weights beside"
    )
    assert "in place of" in str(vp.finish(small("vit").model, keep_weights=False).finished)
    assert "activation='gelu'" in repr(finished)


REFUSED = {
    "train": (lambda model: model.train(), RuntimeError, "train the model that it was made from"),
    "state_dict": (lambda model: model.state_dict(), RuntimeError, "save the model that it was made from"),
    "of a part": (lambda model: model.host.norm.state_dict(), RuntimeError, "save the model that it was made from"),
    "load_state_dict": (lambda model: model.load_state_dict({}), RuntimeError, "load them into the model"),
    "half": (lambda model: model.half(), RuntimeError, "stays in single precision on the CPU"),
    "to": (lambda model: model.to("meta"), RuntimeError, "stays in single precision on the CPU"),
    "pickle": (pickle.dumps, TypeError, "save the model that it was made from"),
    "torch.save": (lambda model: torch.save(model, io.BytesIO()), TypeError, "save the model that it was made from"),
    "finish": (vp.finish, TypeError, "finished for inference already"),
    "finish a part": (lambda model: vp.finish(nn.Sequential(model)), TypeError, "finished for inference already"),
    "prune": (lambda model: vp.prune(vp.finish(model.host), "evit"), TypeError, "finished for inference already"),
    "export": (
        lambda model: vp.export(model, "a.onnx", torch.randn(2, 3, 32, 32)),
        TypeError,
        "export the model that it",
    ),
    "export a part": (lambda model: vp.export(model.host, "a.pt2", torch.randn(2, 3, 32, 32)), TypeError, "export the"),
    "freeze": (lambda model: vp.freeze(model, [small("vit").draw(2)]), TypeError, r"vltprune\.finish\(frozen\.model\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_changes_or_saves_weights_is_refused(what):
    act, error, text = REFUSED[what]
    with pytest.raises(error, match=text):
        act(vp.finish(pruned()))


def test_pruning_a_finished_model_is_refused():
    with pytest.raises(TypeError, match="prune the model that it was made from"):
        vp.prune(vp.finish(small("vit").model), "evit")


def test_saving_a_finished_model_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="save the model that it was made from"):
        vp.save(vp.finish(vp.create_model("blip_nlvr_tiny_evit")), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_gradients_are_refused():
    finished, (images,) = vp.finish(small("vit").model), small("vit").draw(2)
    assert not any(parameter.requires_grad for parameter in finished.parameters())
    with pytest.raises(RuntimeError, match="has no gradients"):
        finished(images.requires_grad_())
    with torch.no_grad():
        finished(images)


def test_a_model_in_training_is_finished_in_evaluation_mode():
    model = pruned().train()
    finished = vp.finish(model)
    assert model.training and not finished.training and not finished.host.training
    model.eval()
    same(finished, model, small("vit").draw(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_that_was_refused_leaves_evaluation_mode(dtype):
    model, (inputs,) = copy.deepcopy(pruned()).to(dtype), small("vit").draw(2)
    finished = vp.finish(model)
    for one in (finished, copy.deepcopy(finished)):
        for part in (one, one.host, one.host.blocks[0], one.pruners):
            with pytest.raises(RuntimeError, match="for inference alone"):
                part.train()
            assert part.eval() is part
        assert not any(module.training for root in (one, one.host) for module in root.modules())
        same(one, model, (inputs.to(dtype),))


def test_copies():
    model, inputs = pruned("blip"), small("blip").draw(2)
    copied = copy.deepcopy(vp.finish(model))
    same(copied, model, inputs)
    with pytest.raises(RuntimeError, match="save the model"):
        copied.state_dict()


def test_adapters_and_wrappers_are_refused():
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(small("vit").model)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False), model)
    with pytest.raises(TypeError, match=r"merge the adapters first, model = model.merge_and_unload\(\)"):
        vp.finish(model)
    with pytest.raises(TypeError, match="merge the adapters first"):
        vp.finish(vp.prune(model, "evit"))
    with pytest.raises(TypeError, match=r"finish that one, vltprune.unwrapped\(model\)"):
        vp.finish(nn.DataParallel(small("vit").model))


class Odd(nn.Module):
    """Linear layers that are more than a plain product."""

    def __init__(self):
        super().__init__()
        self.hooked, self.normed, self.tied, self.tied_to = (nn.Linear(8, 8) for _ in range(4))
        self.wide, self.plain = nn.Linear(8, 8).double(), nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, out: 2 * out)
        parametrizations.weight_norm(self.normed)
        self.tied_to.weight = self.tied.weight

    def forward(self, x):
        x = self.tied_to(self.tied(self.normed(self.hooked(x))))
        return self.plain(self.wide(x.double()).float())


def test_layers_that_are_no_plain_product_stay():
    model = Odd().eval()
    finished = vp.finish(model)
    reasons = {"hooked": "hooks", "normed": "of another class", "tied": "tied weight", "tied_to": "tied weight"}
    assert finished.finished.left == reasons | {"wide": "float64 on cpu"}
    assert finished.finished.prepacked == ("plain",)
    assert finished.tied.weight is finished.tied_to.weight
    same(finished, model, (torch.randn(5, 8),))
    assert "left as they are: 1 (hooks)" in str(finished.finished)


def test_half_precision_stays():
    model = copy.deepcopy(small("vit").model).bfloat16()
    finished = vp.finish(model)
    assert not finished.finished.prepacked and set(finished.finished.left.values()) == {"bfloat16 on cpu"}
    images = small("vit").draw(2)[0].bfloat16()
    with torch.no_grad():
        assert torch.equal(finished(images), model(images))
    with pytest.raises(RuntimeError, match="save the model"):
        finished.state_dict()


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_without_the_operators_layers_stay(broken, monkeypatch):
    def other(*args):
        raise RuntimeError("unknown arguments")

    if broken == "missing":
        monkeypatch.setattr("torch.ops.mkldnn._reorder_linear_weight", other)
    else:
        monkeypatch.setattr("vltprune.deploy.prepacked.PrepackedLinear.forward", lambda self, x: x)
    model = pruned()
    finished = vp.finish(model)
    assert not finished.finished.prepacked
    assert "oneDNN" in str(finished.finished)
    monkeypatch.undo()
    same(finished, model, small("vit").draw(2))


@given(rows=st.sampled_from([0, 1, 3, 4, 7, 197, 512, 513]), bias=st.booleans(), keep=st.booleans(), data=st.data())
@torch.no_grad()
def test_a_prepacked_layer_is_the_layer(rows, bias, keep, data):
    wide, out = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    behind = data.draw(st.sampled_from([None, nn.GELU(), nn.GELU("tanh"), nn.ReLU()]))
    linear = nn.Linear(wide, out, bias=bias)
    activation = None if behind is None else Activation.from_module(behind)
    layer = PrepackedLinear(linear.weight, linear.bias, activation, keep)
    x = data.draw(st.sampled_from([torch.randn(rows, wide), torch.randn(wide, rows).mT, torch.randn(2, rows, wide)]))
    expected = linear(x) if behind is None else behind(linear(x))
    assert_close(layer(x), expected, **EXACT)


@given(
    size=st.tuples(st.integers(4, 13), st.integers(4, 13)), patch=st.sampled_from([(4, 4), (2, 3)]), bias=st.booleans()
)
@torch.no_grad()
def test_a_patch_layer_is_the_convolution(size, patch, bias):
    conv = nn.Conv2d(3, 5, patch, patch, bias=bias)
    images = torch.randn(2, 3, *size)
    assert_close(PatchLinear(conv)(images), conv(images), **EXACT)
    assert torch.equal(PatchLinear(conv).weight, conv.weight)


@torch.no_grad()
def test_convolutions_of_patches_that_overlap_stay():
    embed = PatchEmbed(32, 8, 3, 16, strict_img_size=False)
    embed.proj = nn.Conv2d(3, 16, 8, 4, padding=2)
    finished = vp.finish(embed)
    assert finished.finished.prepacked == ()
    same(finished, embed, (torch.randn(2, 3, 32, 32),))


def test_activations_that_are_used_twice_or_hooked_stay():
    shared = nn.GELU()
    model = nn.Sequential(nn.Linear(8, 8), shared, nn.Linear(8, 8), shared)
    assert not vp.finish(model).finished.fused
    same(vp.finish(model), model, (torch.randn(5, 8),))
    hooked = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU())
    hooked[1].register_forward_hook(lambda module, args, out: out + 1)
    assert not vp.finish(hooked).finished.fused
    same(vp.finish(hooked), hooked, (torch.randn(5, 8),))


@torch.no_grad()
def test_autocast_and_compiling_use_the_plain_weights():
    model, (images,) = small("vit").model, small("vit").draw(2)
    finished = vp.finish(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(finished.blocks[0].mlp.fc2(torch.ones(5, 128)), model.blocks[0].mlp.fc2(torch.ones(5, 128)))
    compiled = torch.compile(finished, backend="eager", fullgraph=True)
    same(compiled, model, (images,))
    bare = vp.finish(model, keep_weights=False)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="keep_weights=True"):
        bare(images)


@torch.no_grad()
def test_a_guide_is_folded_once_and_again_when_it_is_fitted():
    (images,) = small("vit").draw(4)
    finished = vp.finish(pruned())
    guide = finished.pruning.guide
    first, again = (guide.bind("image").relate.keywords["anchors"] for _ in range(2))
    assert first is again
    vp.fit_guide(finished, [images])
    fitted = guide.bind("image").relate.keywords["anchors"]
    assert_close(fitted, guide.anchors @ guide.maps["image"].weight)
    with pytest.raises(AssertionError):
        assert_close(fitted, first)


def test_relu_of_other_modules_is_known_by_its_type_alone():
    assert Activation.from_module(nn.ReLU()) == Activation("relu")
    assert Activation.from_module(nn.SiLU()) is None
    x = torch.randn(5)
    assert torch.equal(Activation("gelu", "tanh")(x), F.gelu(x, approximate="tanh"))
