"""Hosts call the projections of their towers, so that adapters around them act, whatever these show of what they wrap."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers as hf
from checks import Case, same
from test_hosts import NAMES, make
from timm.models.eva import EvaAttention
from torch import nn

import vltprune as vp


class Adapter(nn.Module):
    """A linear layer and a product of low rank beside it. It has nothing of what the layer has, except its forward."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def is_read(parent: nn.Module, path: str) -> bool:
    """Whether the library itself reads the weight of a layer, so that the dense model cannot do with an adapter there."""
    name = path.rpartition(".")[2]
    return (
        isinstance(parent, nn.MultiheadAttention)
        or (isinstance(parent, EvaAttention) and name == "qkv" and parent.q_bias is not None)
        or name in ("patch_embedding", "text_projection")  # of SigLIP 2, and of open_clip
        or path.endswith("transformer.resblocks.0.mlp.c_fc")  # by which open_clip knows the dtype of its text
    )


def adapt(model: nn.Module) -> int:
    """An adapter around each linear layer; how many those are."""
    parents = dict(model.named_modules())
    linear = [path for path, module in parents.items() if isinstance(module, nn.Linear)]
    paths = [path for path in linear if not is_read(parents[path.rpartition(".")[0]], path)]
    for path in paths:
        setattr(parents[path.rpartition(".")[0]], path.rpartition(".")[2], Adapter(parents[path]))
    return len(paths)


FAMILIES = ["timm: vit: plain", "timm: eva: rope attention", "open_clip: image: tok", "open_clip: clip"]
FAMILIES += ["open_clip_hf: clip", "transformers: bert: plain", "transformers: modernbert: plain", "transformers: clip"]
FAMILIES += ["transformers: siglip2", "transformers: dinov3: plain", "transformers: blip answers"]
FAMILIES += ["transformers: headed: DistilBertForSequenceClassification", "blip: nlvr", "blip: caption", "blip: vqa"]


def keep_all(case: Case):
    return case.pruned("random", keep="ratio(ratio=1.0)", reducer="fuse")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_adapters_act(name):
    case = make(name)
    plain = case.expected()
    assert adapt(case.model) >= 3
    expected = case.expected()
    with pytest.raises(AssertionError):
        same(expected, plain)
    same(keep_all(case)(*case.inputs), expected)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_adapters_act_in_towers_that_were_pruned_before(name):
    case = make(name)
    pruned, merging = keep_all(case), case.pruned(reducer="fuse")
    plain = vp.count_macs(merging, *case.inputs)
    for tower in pruned.pruning.towers.values():
        adapt(tower.host)
    same(pruned(*case.inputs), case.expected())
    assert vp.count_macs(merging, *case.inputs).dense_total > plain.dense_total


LORA = ["timm: vit: plain", "timm: eva: default", "timm: eva: rope attention", "timm: eva: rope dinov3"]
LORA += ["open_clip: image: tok", "transformers: dinov3: plain", "blip: nlvr"]


@pytest.mark.parametrize("name", LORA)
@torch.no_grad()
def test_lora_of_peft(name):
    """On every linear layer, those too whose weights a library reads itself: there it is without effect in both models."""
    peft = pytest.importorskip("peft")
    case = make(name)
    pruned, plain = keep_all(case), case.expected()
    layers = [path for path, module in case.model.named_modules() if isinstance(module, nn.Linear)]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=layers, init_lora_weights=False), case.model)
    with pytest.raises(AssertionError):
        same(case.expected(), plain)
    same(pruned(*case.inputs), case.expected())
    same(keep_all(case)(*case.inputs), case.expected())


@torch.no_grad()
def test_injected_adapters_are_saved_once_they_are_merged(tmp_path):
    peft = pytest.importorskip("peft")
    case = make("timm: vit: plain")
    pruned = case.pruned()
    layers = [
        path for path, module in pruned.named_modules() if isinstance(module, nn.Linear) and "pruners" not in path
    ]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=layers, init_lora_weights=False), pruned)
    want = pruned(*case.inputs)
    with pytest.raises(
        ValueError, match=r"of adapters that were injected, merge\(\) each and put its get_base_layer\(\)"
    ):
        vp.save(pruned, tmp_path / "model")
    assert not (tmp_path / "model").exists()

    for path, module in [*pruned.named_modules()]:
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.merge()
            parent, _, name = path.rpartition(".")
            setattr(pruned.get_submodule(parent), name, module.get_base_layer())
    with pytest.warns(vp.UnknownHostWarning):
        vp.save(pruned, tmp_path / "model")
    same(vp.load(tmp_path / "model", host=make("timm: vit: plain").model)(*case.inputs), want)


def test_lora_around_torchs_attention_is_refused():
    peft = pytest.importorskip("peft")
    case = make("open_clip: image: tok")
    pruned = keep_all(case)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["attn"], init_lora_weights=False), case.model)
    with pytest.raises(TypeError, match="adapter would have no effect"):
        pruned(*case.inputs)
    with pytest.raises(TypeError, match="MultiheadAttention"):
        keep_all(case)


@torch.no_grad()
def test_a_nonlinear_adapter_sees_what_the_projection_would_see():
    """Tokens are averaged before an output projection only where that is certain to be affine."""

    class Squash(Adapter):
        def forward(self, x):
            return super().forward(x).tanh()

    for name, path in (("timm: vit: plain", "attn.proj"), ("transformers: vit: plain", "attention.o_proj")):
        case = make(name)
        blocks = case.model.blocks if name.startswith("timm") else case.model.layers
        for block in blocks:
            parent, _, own = path.partition(".")
            setattr(getattr(block, parent), own, Squash(getattr(getattr(block, parent), own)))
        with vp.collect() as traces:
            case.pruned(reducer="fuse")(*case.inputs)
        assert not any(step.reduced_early for step in traces[0].layers)


def pair():
    layers = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**layers, "image_size": 32, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def named_vit():
    return vp.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2)


PEFT = {
    "timm, by create_model": (named_vit, ["qkv"]),
    "timm": (lambda: make("timm: vit: plain").model, ["qkv"]),
    "transformers": (pair, ["q_proj", "v_proj"]),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, that peft reads what it renamed
@pytest.mark.parametrize(("build", "layers"), PEFT.values(), ids=PEFT)
@pytest.mark.parametrize("parts", [{"preset": "evit"}, {"preset": "madtp", "guide": "codebook(anchors=5)"}], ids=str)
def test_a_pruned_model_in_peft_learns_and_is_saved_when_merged(tmp_path, build, layers, parts):
    peft = pytest.importorskip("peft")
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(4, 40, (2, 8))
    ids[:, -1] = 3

    def run(model):
        return model(input_ids=ids, pixel_values=images).logits_per_image if build is pair else model(images)

    def wrapped(model):
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=layers, init_lora_weights=False))

    model = vp.prune(build(), **parts)
    if "guide" in parts:
        model.pruning.guide.birth.fill_(0)  # as if it were trained
    adapted = wrapped(model)
    run(adapted.train()).sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    with torch.no_grad():
        want = run(adapted.eval())

    saves = [lambda: vp.save(adapted, tmp_path / "m"), lambda: vp.save(model, tmp_path / "m")]
    if build is pair:
        saves.append(lambda: model.save_pretrained(tmp_path / "m"))
    for save in saves:
        with pytest.raises(ValueError, match=r"of peft.*merge_and_unload\(\)"):
            save()
    assert not (tmp_path / "m").exists()

    adapted.save_pretrained(tmp_path / "adapters")
    merged = adapted.merge_and_unload()
    assert vp.unwrapped(merged).pruning == model.pruning
    is_known = hasattr(model.pruning.host, "recipe")
    with contextlib.nullcontext() if is_known else pytest.warns(vp.UnknownHostWarning):
        vp.save(merged, tmp_path / "m")
    again = vp.load(tmp_path / "m", host=build())
    with torch.no_grad():
        same(run(merged), want)
        same(run(again), want)
