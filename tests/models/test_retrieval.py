"""BLIP's retrieval: features, matching, and both over pruned images."""

from __future__ import annotations

import pytest
import small
import torch
from torch.testing import assert_close

import vltprune as vp
from vltprune.utils.modes import on_meta


@pytest.fixture
def model():
    return small.build("retrieval")


def near(got, want):
    assert_close(got, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_features_have_length_one_and_padding_no_say(model):
    ids, mask = small.words(3)
    for net in (model, vp.prune(model, "random", keep="ratio(ratio=0.5)")):
        image, text = net.image_features(small.images(3)), net.text_features(ids, mask)
        assert image.shape == text.shape == (3, 24)
        near(image.norm(dim=-1), torch.ones(3))
        near(text.norm(dim=-1), torch.ones(3))
        near(net.text_features(torch.where(mask.bool(), ids, 17), mask), text)


@torch.no_grad()
def test_keep_all_is_the_host_through_every_door(model):
    pixels, (ids, mask) = small.images(3), small.words(6)
    pruned = vp.prune(model, "random", keep="ratio(ratio=1.0)")
    near(pruned.image_features(pixels), model.image_features(pixels))
    near(pruned.text_features(ids, mask), model.text_features(ids, mask))
    near(pruned(pixels, ids, mask), model(pixels, ids, mask))
    near(pruned.match(pruned.visual(pixels), ids, mask), model(pixels, ids, mask))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_one_memory_serves_features_and_matching(model, kind):
    net = model if kind == "dense" else vp.prune(model, "random", keep="random_ratio(mean=0.5, half_width=0.5)")
    pixels, (ids, mask) = small.images(3), small.words(6)
    memory = net.visual(pixels)
    assert isinstance(memory, vp.PackedTokens) == (kind == "pruned")
    near(net.project_image_tokens(memory), net.image_features(pixels))
    near(net.match(memory, ids, mask), net(pixels, ids, mask))


@torch.no_grad()
def test_matching_reads_enc_first_and_features_do_not(model):
    pixels, (ids, mask) = small.images(3), small.words(3)
    asked = ids.clone()
    asked[:, 0] = small.ENC
    assert torch.equal(model(pixels, ids, mask), model(pixels, asked, mask))
    assert not torch.allclose(model.text_features(ids, mask), model.text_features(asked, mask), atol=1e-3)


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_names(size):
    with on_meta():
        model = vp.backbones[f"blip_retrieval_{size}"]()
    assert model.text_projection.out_features == 256
    assert set(vp.create_model("blip_retrieval_tiny_madtp").pruning.towers) == {"image", "text"}
