"""Lists of models and weights: what they hold, and that pruning takes every model listed and no other."""

from __future__ import annotations

import warnings

import open_clip
import pytest
import timm

import vltprune as vp
from vltprune.models.catalog import _TIMM_MODULES, ModelName, open_clip_name
from vltprune.utils.modes import on_meta


def test_lists():
    assert vp.list_models("blip_nlvr_*") == ["blip_nlvr_base", "blip_nlvr_large", "blip_nlvr_tiny"]
    assert "vit_small_patch16_224" in vp.list_models("vit_small*", library="timm")
    assert vp.list_models("clip_vit_b_32", library="open_clip") == ["clip_vit_b_32"]
    assert vp.list_models("ViT-B-32") == ["clip_vit_b_32"]
    assert vp.list_models("vit_*", library="vltprune") == []
    listed = vp.list_models()
    assert len(listed) == len(set(listed))
    assert {"deit3_small_patch16_224", "vitamin_small_224", "clip_vitamin_s", "clip_mobileclip_b"} <= set(listed)
    for other in ("clip_rn", "coca", "convnext", "_xp_", "18x2", "distilled", "swin", "mobileclip_s", "nllb", "relpos"):
        assert not [name for name in listed if other in name]


def test_lists_match_patterns_of_either_case():
    assert vp.list_models("BLIP_NLVR_*") == vp.list_models("blip_nlvr_*")
    assert vp.list_models("vit-b-32") == ["clip_vit_b_32"]


def test_no_model_has_a_name_that_ends_in_a_preset():
    endings = tuple(f"_{preset}" for preset in vp.presets.names())
    assert [name for name in vp.list_models() if name.endswith(endings)] == []


def test_lists_of_weights():
    assert vp.list_pretrained("blip_nlvr_*") == [
        "blip_nlvr_base.nlvr2",
        "blip_nlvr_tiny",
        "blip_nlvr_tiny_madtp.p70",
        "blip_nlvr_tiny_madtp.p80",
    ]
    assert vp.list_pretrained("vit_tiny_patch16_224") == [
        "vit_tiny_patch16_224.augreg_in21k",
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    ]
    assert "clip_vit_b_32.openai" in vp.list_pretrained("ViT-B-32", library="open_clip")
    assert (
        vp.list_pretrained("ViT-B-32.openai") == vp.list_pretrained("clip_vit_b_32.openai") == ["clip_vit_b_32.openai"]
    )
    models = set(vp.list_models())
    for name in vp.list_pretrained():
        read = ModelName.parse(name)
        assert read.backbone in models
        read.check_tag()


def prunes(dense):
    """Whether pruning takes a model that lies on the meta device."""
    try:
        vp.prune(dense, "random")
    except (TypeError, ValueError):
        return False
    return True


def timm_on_meta(name):
    with on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name)


def clip_on_meta(name):
    """The model, but for its text tower where that is an encoder of transformers, whose config is not at hand."""
    config = open_clip.get_model_config(open_clip_name(name))
    if config["text_cfg"].pop("hf_model_name", None):
        config["text_cfg"] = {"vocab_size": 9}
    multimodal, custom = config.get("multimodal_cfg"), config.pop("custom_text", False)
    kind = open_clip.CoCa if multimodal else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with on_meta():
        return kind(**config)


OTHER_TEXT = ("mt5", "nllb")  # encoders of transformers that no host runs
_OTHER_BLOCKS = ("xp_224", "vit_small_patch16_18x2_224", "dlittle", "dwee", "dpwee", "pwee", "deit_tiny_distilled")
_OTHER_TYPES = ("relpos_small", "resnet18", "naflexvit_base")
_PRUNED = (
    "vit_tiny_patch16_224",
    "test_vit3",
    "deit3_small",
    "vitamin_small",
    "tiny_r_s16_p8_224",
    "eva02_tiny",
    "dinov3",
)
TIMM = [next(name for name in timm.list_models() if part in name) for part in _OTHER_BLOCKS + _OTHER_TYPES + _PRUNED]
_CLIPS = (
    "vit_s_32_alt rn50 coca_vit_b_32 convnext_tiny mobileclip_s1 mobileclip_b vitamin_s pe_core_t roberta nllb relpos"
)
CLIP = ["clip_" + name.lower().replace("-", "_") for name in open_clip.list_models()]


@pytest.mark.parametrize("name", TIMM)
def test_what_is_listed_of_timm_is_what_can_be_pruned(name):
    assert prunes(timm_on_meta(name)) == (name in vp.list_models(library="timm"))


@pytest.mark.parametrize("name", [next(name for name in CLIP if part in name) for part in _CLIPS.split()])
def test_what_is_listed_of_open_clip_is_what_can_be_pruned(name):
    listed = name in vp.list_models(library="open_clip")
    assert prunes(clip_on_meta(name)) == (listed or any(text in name for text in OTHER_TEXT))


@pytest.mark.parametrize("name", vp.backbones.names())
def test_every_backbone_of_ours_can_be_pruned(name):
    with on_meta():
        dense = vp.backbones[name]()
    assert prunes(dense) and name in vp.list_models()


@pytest.mark.slow
def test_every_name_of_timm_and_open_clip():
    """All names of the modules that are listed, the first and last of every other module, and all of open_clip's."""
    listed = set(vp.list_models())
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        for name in names if module in _TIMM_MODULES else names[:: max(len(names) - 1, 1)]:
            assert prunes(timm_on_meta(name)) == (name in listed), name
    for name in CLIP:
        assert prunes(clip_on_meta(name)) == (name in listed or any(text in name for text in OTHER_TEXT)), name
