"""Quantized towers: int8 by torch and by torchao, before pruning and after it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from checks import same, tensors
from test_adapters import FAMILIES
from test_hosts import make
from torch import nn

import vltprune as vp

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, that their own functions are deprecated


def by_torch(model: nn.Module) -> nn.Module:
    """A copy whose linear layers multiply in int8, activations quantized as they come."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def by_torchao(model: nn.Module) -> nn.Module:
    """A copy whose linear layers keep their weights in int8."""
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def by_torchao_dynamically(model: nn.Module) -> nn.Module:
    """A copy whose linear layers multiply in int8, activations quantized row by row as they come."""
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(model)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def near(got, want):
    """Equal within 5 % of the largest number: rounding may move an activation to its next level of 8 bits."""
    for one, other in zip(tensors(got), tensors(want), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 0.05 * other.abs().max()


ALL = (by_torch, by_torchao, by_torchao_dynamically)
# whose embeddings ask a weight for its dtype: quantized by torch, transformers fails
UNRUN = [("transformers: siglip2", by_torch)]


# every third takes all three
PAIRS = [
    *itertools.product(FAMILIES, (by_torch, by_torchao)),
    *((name, by_torchao_dynamically) for name in FAMILIES[::3]),
]


@pytest.mark.parametrize(("name", "quantize"), [pair for pair in PAIRS if pair not in UNRUN])
@torch.no_grad()
def test_a_quantized_host(name, quantize):
    case = make(name)
    inputs = case.one(1)  # without padding, which is part of what torch takes the range of activations from
    dense = quantize(case.model)
    pruned = vp.prune(dense, case.config("random", keep="ratio(ratio=1.0)"))
    if not (name == "open_clip: clip" and quantize is by_torch):  # where open_clip fails for the same reason, and alone
        close = near if quantize is by_torchao_dynamically else same
        close(pruned(*inputs), dense(*inputs))
    got = vp.count_macs(vp.prune(dense, case.config(reducer="fuse")), *inputs)
    want = vp.count_macs(case.pruned(reducer="fuse"), *inputs)
    assert got.dense_total == pytest.approx(want.dense_total, rel=1e-9)


@pytest.mark.parametrize("quantize", ALL)
@pytest.mark.parametrize("name", ["timm: eva: rope attention", "blip: caption"])
@torch.no_grad()
def test_what_is_quantized_cannot_be_saved(name, quantize, tmp_path):
    """Nothing is written then; the pruning alone of a tower can be, for it is not quantized."""
    pruned = quantize(make(name).pruned("random"))
    folder = tmp_path / "quantized"
    with pytest.raises(TypeError, match=r"quantized.*Save the model before it is quantized"):
        vp.save(pruned, folder)
    assert not folder.exists()
    if isinstance(pruned, vp.PrunedEncoder):
        vp.save(pruned, folder, only="pruning")


@pytest.mark.parametrize("quantize", ALL)
@pytest.mark.parametrize("name", ["timm: eva: rope attention", "open_clip_hf: clip", "blip: nlvr", "blip: caption"])
@torch.no_grad()
def test_a_quantized_pruned_model(name, quantize, tmp_path):
    """The guide's maps are quantized, too."""
    case = make(name)
    pruned = case.pruned()
    plain, macs = pruned(*case.inputs), vp.count_macs(pruned, *case.inputs)
    small = quantize(pruned)
    out = small(*case.inputs)
    assert all(a.dim() == b.dim() and a.isfinite().all() for a, b in zip(tensors(out), tensors(plain), strict=True))
    cost = vp.count_macs(small, *case.inputs)
    assert cost.dense_total == pytest.approx(macs.dense_total, rel=1e-9)
    assert cost.total == pytest.approx(macs.total, rel=0.1)  # other tokens may stay

    with pytest.raises(TypeError, match=r"quantized.*Save the model before it is quantized"):
        vp.save(small, tmp_path / "quantized", only="pruning")
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize("quantize", ALL)
@pytest.mark.parametrize("name", ["timm: vit: plain", "transformers: bert: plain"])
@torch.no_grad()
def test_quantizing_before_pruning_and_after_it(name, quantize):
    """One is the other. Outputs point where those in full precision do, when the same tokens stay."""
    case = make(name)
    config = case.config("random", keep="ratio(ratio=0.6)", reducer="fuse")
    plain = vp.prune(case.model, config)
    before, after = vp.prune(quantize(case.model), config), quantize(plain)
    same(after(*case.inputs), before(*case.inputs))
    for got, want in zip(tensors(after(*case.inputs)), tensors(plain(*case.inputs)), strict=True):
        assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.99
    want, *got = (vp.measure(model, [case.inputs]) for model in (plain, before, after))
    assert got[0].macs == got[1].macs and got[0].dense_macs == pytest.approx(want.dense_macs, rel=1e-9)
    # tokens are fused behind a quantized output projection, which is not known to be affine
    assert want.macs <= got[0].macs < 1.05 * want.macs


@torch.no_grad()
def test_the_shipped_model_is_quantized():
    pruned = vp.create_model("blip_nlvr_tiny_madtp.p80", pretrained=True)
    small = by_torch(pruned)
    ids, mask = torch.randint(1, 50, (2, 10)), torch.ones(2, 10, dtype=torch.int64)
    inputs = (torch.randn(2, 2, 3, 96, 96), ids, mask)
    assert (small(*inputs) - pruned(*inputs)).abs().max() < 1
    assert vp.count_macs(small, *inputs).dense_total == vp.count_macs(pruned, *inputs).dense_total
