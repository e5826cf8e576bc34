"""Names to models."""

from __future__ import annotations

import pytest
import timm
import torch

import vltprune as vp
from vltprune.factory import Name
from vltprune.models import zoo
from vltprune.models.blip import Blip, BlipNlvr


@pytest.mark.parametrize("name", ["blip_tiny", "blip_nlvr_tiny"])
@pytest.mark.parametrize("preset", [None, *vp.presets.names()])
def test_own_backbones(name, preset):
    model = vp.create_model(f"{name}_{preset}" if preset else name)
    assert isinstance(model, BlipNlvr if "nlvr" in name else Blip)
    assert (model.pruning.config == vp.preset(preset)) if preset else not hasattr(model, "pruning")
    assert not model.training


def test_sizes_of_the_published_backbones():
    with torch.device("meta"):
        counts = {n: sum(p.numel() for p in vp.backbones[n]().parameters()) for n in ("blip_base", "blip_large")}
    assert counts["blip_base"] == pytest.approx(224e6, rel=0.01)  # ViT-B/16 86 M, BERT with cross-attention 138 M
    assert counts["blip_large"] == pytest.approx(446e6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("blip_nlvr_tiny_madtp.p80", Name("vltprune", "blip_nlvr_tiny", "madtp", "p80")),
        ("blip_base", Name("vltprune", "blip_base", None, None)),
        ("vit_base_patch16_224_madtp", Name("timm", "vit_base_patch16_224", "madtp", None)),
        ("vit_base_patch16_224_evit.augreg", Name("timm", "vit_base_patch16_224", "evit", "augreg")),
        ("clip_vit_b_32_madtp.openai", Name("open_clip", "clip_vit_b_32", "madtp", "openai")),
    ],
)
def test_names(name, read):
    assert Name.read(name) == read


def test_other_libraries():
    vit = vp.create_model("vit_tiny_patch16_224_madtp", num_classes=5)
    assert type(vit.host) is timm.models.vision_transformer.VisionTransformer
    assert vit(torch.randn(1, 3, 224, 224)).shape == (1, 5)
    clip = vp.create_model("clip_vit_s_16_evit", force_image_size=64)
    assert clip.encode_image(torch.randn(2, 3, 64, 64)).shape == (2, 384)


def test_parts_replace_parts():
    model = vp.create_model("blip_nlvr_tiny_madtp", scorer="cls_attention", guide=None, keep="ratio(ratio=0.6)")
    assert model.pruning.config == vp.preset("madtp").replace(
        scorer="cls_attention", guide=None, keep="ratio(ratio=0.6)"
    )
    same = vp.create_model("blip_nlvr_tiny", pruning=model.pruning.config)
    assert same.pruning.config == model.pruning.config


def test_backbone_arguments_reach_it():
    model = vp.create_model("blip_nlvr_tiny_madtp", vision_depth=2, text_depth=3)
    assert [len(t.adapter.blocks(t.host)) for t in model.pruning.towers.values()] == [2, 3]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: vp.create_model("blip_nlvr_bse"), LookupError, "did you mean .*blip_nlvr_base"),
        (lambda: vp.create_model("blip_nlvr_base_madpt"), LookupError, "did you mean .*blip_nlvr_base_madtp"),
        (
            lambda: vp.create_model("vit_tiny_patch16_224_madpt"),
            LookupError,
            "did you mean .*vit_tiny_patch16_224_madtp",
        ),
        (lambda: vp.create_model("clip_vit_b_33"), LookupError, "did you mean .*clip_vit_b_32"),
        (lambda: vp.create_model("blip_nlvr_tiny_madtp", widht=3), TypeError, "no argument 'widht'; did you mean"),
        (lambda: vp.create_model("blip_nlvr_tiny_madtp", keep="ratoi(ratio=1)"), LookupError, "did you mean ratio"),
        (lambda: vp.create_model("blip_nlvr_tiny", keep="ratio"), TypeError, "dense: append a preset or give pruning"),
        (lambda: vp.create_model("blip_tiny_madtp", pruning="evit"), ValueError, "already names the preset 'madtp'"),
        (lambda: vp.create_model("blip_tiny", pretrained=True), LookupError, "no weights come with 'blip_tiny'"),
        (lambda: vp.create_model("clip_vit_b_32", pretrained=True), ValueError, r"append a tag, one of .*\.openai"),
        (lambda: vp.list_models(library="keras"), ValueError, "there is vltprune, timm, open_clip"),
        (lambda: vp.preset("madpt"), LookupError, "did you mean madtp"),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_lists():
    assert vp.list_models("blip_nlvr_*") == ["blip_nlvr_base", "blip_nlvr_large", "blip_nlvr_tiny"]
    assert "vit_small_patch16_224" in vp.list_models("vit_small*", library="timm")
    assert vp.list_models("clip_vit_b_32", library="open_clip") == ["clip_vit_b_32"]
    assert vp.list_models("vit_*", library="vltprune") == []


class TestShippedWeights:
    NAMES = ("blip_nlvr_tiny", "blip_nlvr_tiny_madtp.p70", "blip_nlvr_tiny_madtp.p80")

    @pytest.mark.parametrize("name", NAMES)
    def test_they_load_offline(self, name):
        model = vp.create_model(name, pretrained=True)
        assert zoo.packaged(name) is not None
        if "madtp" in name:
            assert not model.pruning.guide.is_untrained

    def test_vocabulary_and_backbone_agree(self):
        from vltprune.data.words import WordTokenizer

        model = vp.create_model("blip_nlvr_tiny")
        assert model.text.word.num_embeddings == len(WordTokenizer())

    @pytest.mark.parametrize(("name", "least"), list(zip(NAMES, (0.9, 0.91, 0.9), strict=True)))
    def test_they_answer_held_out_questions(self, name, least):
        """A floor that 240 questions can tell from chance and from broken weights; `vltprune demo` measures."""
        from vltprune.evaluate import draw, evaluate

        models = {"it": vp.create_model(name, pretrained=True)}
        if "madtp" not in name:
            models["pruned"] = vp.prune(models["it"], "random")
        assert evaluate(models, draw("test", 240, seed=7))["it"].accuracy >= least
