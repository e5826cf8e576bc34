"""transformers' towers from without: how they are called, what they answer, what is refused."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest
import torch
import transformers as hf
from cases_transformers import IMAGES, TEXTS, WORDS, make
from checks import same
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers_pairs import sentences, siglip2_patches
from transformers_parts import ENDS, LENGTH, MASK, images, words

import vltprune as vp


def named(case):
    """The inputs of a case by the names that the dense forward gives them."""
    given = inspect.signature(case.model.forward).bind(*case.inputs).arguments
    return {name: value for name, value in given.items() if value is not None}


KEYWORDS = [*TEXTS, *IMAGES, "vit: interpolated", "bert: types and positions", "clip", "siglip2", "vilt: types"]


@pytest.mark.parametrize("name", KEYWORDS)
@torch.no_grad()
def test_keywords_are_positions(name):
    case = make(name)
    pruned = case.pruned()
    with vp.collect() as by_position:
        want = pruned(*case.inputs)
    with vp.collect() as by_name:
        got = pruned(**named(case))
    assert type(got) is type(want) is type(case.model(*case.inputs))
    assert list(got) == list(want)
    same(got, want)
    assert [trace.lengths for trace in by_name] == [trace.lengths for trace in by_position]


@pytest.mark.parametrize(
    "name",
    [
        *TEXTS,
        *IMAGES,
        "bert: no pooler",
        "mpnet: no pooler",
        "vit: no pooler",
        "siglip image: no head",
        "clip",
        "vilt: plain",
        "vilt: no pooler",
    ],
)
@torch.no_grad()
def test_answers_in_the_hosts_classes(name):
    case = make(name)
    pruned = case.pruned(keep="ratio(ratio=1.0)")
    for asked in ({}, {"return_dict": True}, {"return_dict": None}, {"return_dict": False}):
        out, dense = pruned(*case.inputs, **asked), case.model(*case.inputs, **asked)
        assert type(out) is type(dense)
        assert isinstance(out, tuple if asked.get("return_dict") is False else ModelOutput)
        assert len(out) == len(dense)
    if name != "clip":
        case.model.config.return_dict = False
        assert isinstance(pruned(*case.inputs), tuple)


@pytest.mark.parametrize("name", [*TEXTS, *IMAGES, "vilt: plain"])
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "config", "bool_masked_pos"])
def test_what_pruning_cannot_give_is_refused(name, asked):
    case = make(name)
    pruned, more = case.pruned(), {asked: True}
    if asked == "config":
        case.model.config.output_hidden_states, more = True, {}
    with pytest.raises(TypeError, match=rf"does not take {'output_hidden' if asked == 'config' else asked}.*Supported"):
        pruned(*case.inputs, **more)
    pruned(*case.inputs, output_attentions=False, output_hidden_states=False)


@pytest.mark.parametrize("name", WORDS)
def test_a_hidden_summary_is_refused(name):
    case = make(name)
    place = 0 if "text" not in name else ENDS[1] - 1
    mask = MASK.clone()
    mask[1, place] = 0
    with pytest.raises(ValueError, match=f"hides token {place} of sentence 1"):
        case.pruned()(case.inputs[0], mask)


@torch.no_grad()
def test_siglip_pools_its_last_token():
    case = make("siglip text: plain")
    pruned, (ids,) = case.pruned(keep="ratio(ratio=1.0)"), case.inputs
    with pytest.raises(ValueError, match=f"hides token {LENGTH - 1} of sentence 0"):
        pruned(ids, MASK)
    left = MASK.flip(1)
    same(pruned(ids, left).pooler_output, case.model(ids, left).pooler_output)
    assert pruned(ids, left).last_hidden_state[0, ENDS[0] :].eq(0).all()


@pytest.mark.parametrize("mask", [MASK[:, :5], MASK[None], MASK[0]])
def test_masks_of_another_shape_are_refused(mask):
    with pytest.raises(ValueError, match=rf"attention_mask must be \[3, {LENGTH}\]"):
        make("bert: plain").pruned()(words(), mask)


@pytest.mark.parametrize("name", [*WORDS, "clip"])
@pytest.mark.parametrize("bad", ["negative", "too large", "too long", "flat", "empty"])
def test_wrong_ids_are_refused(name, bad):
    pruned = make(name).pruned()
    encode = pruned.get_text_features if name == "clip" else pruned
    if name.startswith("modernbert") and bad == "too long":
        return  # a rotation has no last position
    ids = sentences()
    ids, says = {
        "negative": (ids - 100, r"0 \.\. 59"),
        "too large": (ids + 1, r"0 \.\. 59"),
        "too long": (ids.repeat(1, 3), "input_ids has 36 tokens, the tower has"),
        "flat": (ids[0], r"\[batch, length\]"),
        "empty": (ids[:0], "not empty"),
    }[bad]
    with pytest.raises(ValueError, match=says):
        encode(input_ids=ids)


@torch.no_grad()
def test_roberta_has_fewer_positions_than_rows():
    """Those up to its padding token's are not for words."""
    case = make("roberta: plain")
    ids = torch.randint(3, 50, (1, 19))
    with pytest.raises(ValueError, match="has 19 tokens, the tower has 18 positions"):
        case.pruned()(ids)
    same(case.pruned(keep="ratio(ratio=1.0)")(ids[:, :18]), case.model(ids[:, :18]))


@pytest.mark.parametrize(
    "name", ["vit: plain", "vit: wide", "dinov2: plain", "clip image: plain", "siglip image: plain"]
)
@pytest.mark.parametrize("bad", ["size", "channels", "empty", "nan"])
def test_wrong_images_are_refused(name, bad):
    case = make(name)
    (pixels,) = case.inputs
    broken = {
        "size": pixels[..., :24],
        "channels": pixels[:, :2],
        "empty": pixels[:0],
        "nan": torch.full_like(pixels, float("nan")),
    }[bad]
    if bad == "size" and name.startswith("dinov2"):
        case.pruned()(broken)  # which interpolates its positions whatever the size
        return
    with pytest.raises(ValueError, match="pixel_values"):
        case.pruned()(pixel_values=broken)


def test_a_mask_a_kind_of_block_is_refused():
    pruned = make("modernbert: plain").pruned()
    with pytest.raises(TypeError, match=r"takes one attention_mask \[batch, length\]"):
        pruned(words(), {"full_attention": None, "sliding_attention": None})


def test_patches_that_are_images_are_refused():
    _, mask, shapes = siglip2_patches()
    with pytest.raises(ValueError, match=r"patches \[batch, patches, 48\].*image processor"):
        make("siglip2 image: plain").pruned()(images(), mask, shapes)


@torch.no_grad()
def test_siglip2_without_a_mask():
    case = make("siglip2 image: plain")
    patches, shapes = torch.randn(2, 16, 48), torch.tensor([[4, 4], [2, 8]])
    same(case.pruned(keep="ratio(ratio=1.0)")(patches, None, shapes), case.model(patches, None, shapes))


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
@torch.no_grad()
def test_features_are_the_hosts(name):
    case = make(name)
    image = {key: value for key, value in named(case).items() if key != "input_ids"}
    for keep, equal in (("ratio(ratio=1.0)", True), ("ratio(ratio=0.3)", False)):
        pruned = case.pruned(keep=keep)
        for features, dense, inputs in (
            (pruned.get_image_features, case.model.get_image_features, image),
            (pruned.get_text_features, case.model.get_text_features, {"input_ids": case.inputs[0]}),
        ):
            got, want = features(**inputs).pooler_output, dense(**inputs).pooler_output
            assert torch.allclose(got, want, atol=1e-4) == equal
        out = pruned(**named(case), return_loss=True)
        assert out.loss.isfinite()
        assert type(out) is type(case.model(**named(case)))
        same(out.vision_model_output.pooler_output, pruned.get_image_features(**image).pooler_output)


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
REFUSED = {
    "AlbertModel": lambda: hf.AlbertModel(hf.AlbertConfig(**SMALL, vocab_size=60)),
    "classifier_pooling is 'mean'": lambda: with_mean(),
    "decodes": lambda: hf.BertModel(hf.BertConfig(**SMALL, vocab_size=60, is_decoder=True)),
    "Dinov2Backbone": lambda: hf.Dinov2Backbone(hf.Dinov2Config(**SMALL, image_size=32, patch_size=8)),
    "'mine'": lambda: with_kernel("mine"),
    "Mine": lambda: with_attention(),
}


def with_kernel(name):
    model = make("bert: plain").model
    model.config._attn_implementation_internal = name
    return model


def with_mean():
    model = make("headed: ModernBertForSequenceClassification").model
    model.config.classifier_pooling = "mean"
    return model


def with_attention():
    class Mine(nn.Module):
        pass

    model = make("vit: plain").model
    model.layers[1].attention = Mine()
    return model


@pytest.mark.parametrize("says", REFUSED)
def test_refused_by_name(says):
    with pytest.raises((TypeError, ValueError), match=says) as refusal:
        vp.prune(REFUSED[says](), "random")
    assert "upported" in str(refusal.value) or "build it with" in str(refusal.value)


def test_an_older_library_is_refused(monkeypatch):
    room = importlib.import_module("vltprune.hosts.transformers")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.48.0")  # `hf` may be another module object
    with pytest.raises(ImportError, match=r"4\.48\.0 cannot be pruned, those of 5\.24 and later"):
        importlib.reload(room)
