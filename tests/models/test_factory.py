"""Names to models."""

from __future__ import annotations

import doctest

import open_clip
import pytest
import timm
import torch
from small_models import PRESETS

import vltprune as vp
from vltprune.models import catalog, factory, zoo
from vltprune.models.blip import Blip, BlipNlvr
from vltprune.models.catalog import ModelName
from vltprune.utils.modes import on_meta


@pytest.mark.parametrize("name", ["blip_tiny", "blip_nlvr_tiny"])
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_own_backbones(name, preset):
    model = vp.create_model(f"{name}_{preset}" if preset else name)
    assert isinstance(model, BlipNlvr if "nlvr" in name else Blip)
    assert (model.pruning.config == vp.preset(preset)) if preset else not hasattr(model, "pruning")
    assert not model.training


def test_sizes_of_the_published_backbones():
    with on_meta():
        counts = {n: sum(p.numel() for p in vp.backbones[n]().parameters()) for n in ("blip_base", "blip_large")}
    assert counts["blip_base"] == pytest.approx(224e6, rel=0.01)  # ViT-B/16 86 M, BERT with cross-attention 138 M
    assert counts["blip_large"] == pytest.approx(446e6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("blip_nlvr_tiny_madtp.p80", ModelName("vltprune", "blip_nlvr_tiny", "madtp", "p80")),
        ("blip_base", ModelName("vltprune", "blip_base", None, None)),
        ("vit_base_patch16_224_madtp", ModelName("timm", "vit_base_patch16_224", "madtp", None)),
        ("vit_base_patch16_224_evit.augreg", ModelName("timm", "vit_base_patch16_224", "evit", "augreg")),
        ("clip_vit_b_32_madtp.openai", ModelName("open_clip", "clip_vit_b_32", "madtp", "openai")),
        ("ViT-B-32", ModelName("open_clip", "clip_vit_b_32", None, None)),
        ("ViT-B/32", ModelName("open_clip", "clip_vit_b_32", None, None)),
        ("ViT-B-32_madtp.openai", ModelName("open_clip", "clip_vit_b_32", "madtp", "openai")),
        ("RN50_evit", ModelName("open_clip", "clip_rn50", "evit", None)),
        ("vit_medium_patch16_gap_256", ModelName("timm", "vit_medium_patch16_gap_256", None, None)),
    ],
)
def test_names(name, read):
    assert ModelName.parse(name) == read


@pytest.mark.parametrize("preset", vp.presets.names())
@pytest.mark.parametrize("backbone", ["blip_base", "vit_base_patch16_224", "clip_vit_b_32"])
def test_a_preset_is_read_from_the_end_of_a_name(backbone, preset):
    """Also where one preset's name begins with another's."""
    read = ModelName.parse(f"{backbone}_{preset}")
    assert (read.backbone, read.preset) == (backbone, preset)


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
    same = vp.create_model("blip_nlvr_tiny", preset=model.pruning.config)
    assert same.pruning.config == model.pruning.config


def test_backbone_arguments_reach_it():
    model = vp.create_model("blip_nlvr_tiny_madtp", vision_depth=2, text_depth=3)
    assert [len(t.adapter.blocks(t.host)) for t in model.pruning.towers.values()] == [2, 3]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: vp.create_model("blip_nlvr_bse"), LookupError, "did you mean .*blip_nlvr_base"),
        (lambda: vp.create_model("blip_nlvr_base_madpt"), LookupError, "did you mean blip_nlvr_base_madtp"),
        (
            lambda: vp.create_model("vit_tiny_patch16_224_madpt"),
            LookupError,
            "did you mean vit_tiny_patch16_224_madtp",
        ),
        (lambda: vp.create_model("clip_vit_b_33"), LookupError, "did you mean .*clip_vit_b_32"),
        (lambda: vp.create_model("blip_nlvr_tiny_madtp", widht=3), TypeError, "no argument 'widht'; did you mean"),
        (lambda: vp.create_model("blip_nlvr_tiny_madtp", keep="ratoi(ratio=1)"), LookupError, "did you mean ratio"),
        (
            lambda: vp.create_model("blip_nlvr_tiny", keep="ratio"),
            TypeError,
            "dense: append a preset to the name, or give preset=",
        ),
        (lambda: vp.create_model("blip_tiny_madtp", preset="evit"), ValueError, "already names the preset 'madtp'"),
        (lambda: vp.create_model("blip_tiny", pretrained=True), LookupError, "no weights come with 'blip_tiny'"),
        (lambda: vp.create_model("clip_vit_b_32", pretrained=True), ValueError, r"append a tag, one of .*\.openai"),
        (lambda: vp.create_model("ViT-B-33"), LookupError, "did you mean .*ViT-B-32"),
        (lambda: vp.create_model("some/folder"), LookupError, r"vltprune.load\(folder\), and .*from_pretrained"),
        (lambda: vp.create_model("hf-hub:org/name"), LookupError, "from_pretrained"),
        (lambda: vp.create_model(3), TypeError, "a model's name is text"),
        (lambda: vp.create_model("ViT-B-32_madpt"), LookupError, "did you mean ViT-B-32_madtp"),
        (
            lambda: vp.create_model("vit_tiny_patch16_224_xyzzy"),
            LookupError,
            r"'vit_tiny_patch16_224' is one, and the presets that may follow it are (\w+, )*evit(, \w+)+",
        ),
        (
            lambda: vp.create_model("timm/vit_tiny_patch16_224.augreg"),
            LookupError,
            "write 'vit_tiny_patch16_224.augreg'",
        ),
        (lambda: vp.create_model("blip_tiny", preset="madpt"), LookupError, "no preset 'madpt'; did you mean madtp"),
        (lambda: vp.create_model("blip_tiny", preset=3), TypeError, r"preset=3: .* a preset, (\w+, )+or a PruneConfig"),
        (lambda: vp.create_model("blip_tiny_evit", preset="evit"), ValueError, "or name the model 'blip_tiny'"),
        (lambda: vp.create_model("vit_tiny_patch16_224", imgsize=96), TypeError, "imgsize=96.*did you mean img_size"),
        (lambda: vp.create_model("ViT-B-32", force_size=96), TypeError, "did you mean force_image_size"),
        (lambda: vp.create_model("vit_tiny_patch16_224_evit", scorrer="random"), TypeError, "did you mean scorer"),
        (
            lambda: vp.create_model("blip_tiny_evit", reduction=0.5),
            TypeError,
            "prune.model, preset, reduction=0.5, data",
        ),
        (lambda: vp.create_model("clip", embed_dim=3), TypeError, "needs vision_cfg, text_cfg: write create_model"),
        (lambda: vp.list_pretrained(library="keras"), ValueError, "write one of vltprune, timm, open_clip"),
        (lambda: vp.create_model("blip_nlvr_tiny", pretrained=1), TypeError, "pretrained=1: write True, False"),
        (lambda: vp.create_model("blip_nlvr_tiny", pretrained="nowhere"), vp.CheckpointError, "no file nowhere"),
        (
            lambda: vp.create_model("blip_nlvr_tiny", pretrained="hf-hub:a/b"),
            ValueError,
            r"from_pretrained\('hf-hub:a/b",
        ),
        (lambda: vp.list_models(library="keras"), ValueError, "write one of vltprune, timm, open_clip"),
        (lambda: vp.preset("madpt"), LookupError, "did you mean madtp"),
    ],
)
def test_refusals(call, error, says):
    with pytest.raises(error, match=says):
        call()


class TestTags:
    """A tag means its weights, and one that there is not is an error, whatever is asked of it."""

    @pytest.mark.parametrize("pretrained", [None, True, False])
    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("blip_nlvr_tiny_madtp.p90", r"blip_nlvr_tiny_madtp has \.p70, \.p80"),
            ("blip_nlvr_tiny.p80", "nobody has published any"),
            ("blip_base.capfill", r"blip_base has \.capfilt, \.129m, \.14m"),
            ("blip_tiny_evit.coco", "nobody has published any"),
            ("blip_base.", r"blip_base has \.capfilt"),
            ("vit_tiny_patch16_224.augreg", r"has .*\.augreg_in21k"),
            ("vit_tiny_patch16_224_evit.openai", r"has .*\.augreg_in21k"),
            ("clip_vit_b_32.openay", r"clip_vit_b_32 has \.openai"),
            ("ViT-B-32_madtp.p80", r"vltprune.list_pretrained\('clip_vit_b_32'\) gives the"),
            ("clip.openai", "nobody has published any"),
        ],
    )
    def test_unknown_tags(self, name, says, pretrained):
        with pytest.raises(
            LookupError, match=rf"there are no weights '.*{says}.*; pretrained=PATH loads a checkpoint of your own"
        ):
            vp.create_model(name, pretrained=pretrained)

    def test_a_tag_loads_its_weights(self):
        asked, true = (vp.create_model("blip_nlvr_tiny_madtp.p80", **how) for how in ({}, {"pretrained": True}))
        assert state(asked).keys() == state(true).keys()
        assert all(torch.equal(value, state(true)[key]) for key, value in state(asked).items())
        assert not asked.pruning.guide.is_untrained
        random = vp.create_model("blip_nlvr_tiny_madtp.p80", pretrained=False)
        assert random.pruning.guide.is_untrained

    @pytest.mark.parametrize(
        ("name", "tag"),
        [("vit_tiny_patch16_224_evit", "augreg_in21k"), ("ViT-B-32_evit", "openai"), ("RN50", "openai")],
    )
    def test_a_tag_is_asked_of_its_library(self, name, tag, monkeypatch):
        asked = []

        def build(name, pretrained, **_):
            asked.append((name, pretrained))
            raise ZeroDivisionError

        monkeypatch.setattr(timm, "create_model", build)
        monkeypatch.setattr(open_clip, "create_model", build)
        for how in (None, True, False):
            with pytest.raises(ZeroDivisionError):
                vp.create_model(f"{name}.{tag}", pretrained=how)
        if name.startswith("vit"):
            assert asked == [(f"vit_tiny_patch16_224.{tag}", pretrained) for pretrained in (True, True, False)]
        else:
            assert asked == [(name.removesuffix("_evit"), pretrained) for pretrained in (tag, tag, None)]

    @pytest.mark.parametrize(
        ("name", "tag", "whole"),
        [
            ("clip_vit_b_32", "openai", "clip_vit_b_32.openai"),
            ("ViT-B-32_evit", "laion2b-s34b-b79k", "clip_vit_b_32_evit.laion2b_s34b_b79k"),
            ("vit_tiny_patch16_224", "augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"),
            ("blip_nlvr_tiny_madtp", "p80", "blip_nlvr_tiny_madtp.p80"),
        ],
    )
    def test_a_tag_given_apart_is_told_where_it_belongs(self, name, tag, whole):
        with pytest.raises(ValueError, match=rf"is a tag: it belongs to the name, '{whole}'"):
            vp.create_model(name, pretrained=tag)

    def test_names_without_a_tag(self):
        with pytest.raises(ValueError, match=r"append a tag, one of \.p70, \.p80"):
            vp.create_model("blip_nlvr_tiny_madtp", pretrained=True)
        with pytest.raises(LookupError, match="no weights come with 'vit_giant_patch14_224"):
            vp.create_model("vit_giant_patch14_224", pretrained=True)
        dense, pruned = (vp.create_model(f"blip_nlvr_tiny{end}", pretrained=True) for end in ("", "_evit"))
        assert all(torch.equal(value, dense.state_dict()[key]) for key, value in pruned.host.state_dict().items())

    def test_what_is_saved_of_a_tagged_model_asks_for_no_download(self, tmp_path, monkeypatch):
        model = vp.create_model("vit_tiny_patch16_224_evit.augreg_in21k", pretrained=False, img_size=32, depth=4)
        again = vp.load(vp.save(model, tmp_path))
        assert all(torch.equal(value, state(model)[key]) for key, value in state(again).items())


def state(model):
    return {**model.host.state_dict(), **model.state_dict()}


def save_evit(folder, ratio=0.31, **parts):
    model = vp.create_model("vit_tiny_patch16_224_evit", **SMALL, keep=f"ratio(ratio={ratio})", **parts)
    return vp.save(model, folder)


class TestSavedPruning:
    """What a model was saved with, calibration included, on each way that a folder comes in."""

    def test_a_preset_of_the_same_parts_keeps_it(self, tmp_path):
        folder = save_evit(tmp_path, at=(1, 2))
        for how in ({"name": "vit_tiny_patch16_224_evit"}, {"name": "vit_tiny_patch16_224", "preset": "evit"}):
            config = vp.create_model(**how, pretrained=folder, **SMALL).pruning.config
            assert (config.keep, config.at) == (vp.Part("ratio", {"ratio": 0.31}), (1, 2))
            replaced = vp.create_model(**how, pretrained=folder, **SMALL, keep="count(count=3)", at=-1).pruning.config
            assert (replaced.keep, replaced.at) == (vp.Part("count", {"count": 3}), (-1,))

    @pytest.mark.parametrize("how", [{"name": "vit_tiny_patch16_224_random"}, {"preset": "random"}])
    def test_a_preset_of_other_parts_is_refused(self, how, tmp_path):
        folder = save_evit(tmp_path)
        says = "was saved with scorer='mean_cls_attention', and the preset 'random' has scorer='random'"
        with pytest.raises(ValueError, match=says):
            vp.create_model(**{"name": "vit_tiny_patch16_224", **how}, pretrained=folder, **SMALL)

    def test_a_whole_config_is_what_it_says(self, tmp_path):
        config = vp.preset("random").replace(at=0)
        model = vp.create_model("vit_tiny_patch16_224", preset=config, pretrained=save_evit(tmp_path), **SMALL)
        assert model.pruning.config == config

    def test_a_dense_name_is_dense(self, tmp_path):
        model = vp.create_model("vit_tiny_patch16_224", pretrained=save_evit(tmp_path), **SMALL)
        assert not hasattr(model, "pruning")


SMALL = {"img_size": 32, "depth": 4}


@pytest.mark.parametrize("module", [catalog, factory], ids=lambda module: module.__name__)
def test_examples_run(module):
    torch.manual_seed(0)
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


@pytest.fixture(scope="module")
def questions():
    """Inputs and labels, batch by batch, that no shipped model was trained on."""
    from vltprune.demo.measure import generate_batches

    model, batches = vp.create_model("blip_nlvr_tiny"), generate_batches("test", 120, seed=7)
    return [(batch.inputs_for(model), torch.from_numpy(batch.labels)) for batch in batches]


class TestShippedWeights:
    NAMES = ("blip_nlvr_tiny", "blip_nlvr_tiny_madtp.p70", "blip_nlvr_tiny_madtp.p80")

    @pytest.mark.parametrize("name", NAMES)
    def test_they_load_offline(self, name):
        model = vp.create_model(name, pretrained=True)
        assert zoo.packaged(name) is not None
        if "madtp" in name:
            assert not model.pruning.guide.is_untrained

    def test_vocabulary_and_backbone_agree(self):
        from vltprune.data.word_tokenizer import WordTokenizer

        model = vp.create_model("blip_nlvr_tiny")
        assert model.text.word.num_embeddings == len(WordTokenizer())

    @pytest.mark.parametrize(("name", "least"), list(zip(NAMES, (0.9, 0.91, 0.9), strict=True)))
    @torch.no_grad()
    def test_they_answer_held_out_questions(self, name, least, questions):
        """A floor that 120 questions can tell from chance and from broken weights; `vltprune demo` measures."""
        model = vp.create_model(name, pretrained=True)
        right = [model(*inputs).argmax(-1) == labels for inputs, labels in questions]
        assert torch.cat(right).float().mean() >= least
