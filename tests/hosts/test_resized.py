"""The baseline of smaller images: what enters, what it computes, and that it can be pruned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import images, scrambled, small
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import vltprune as vp

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.mark.parametrize("kind", [VisionTransformer, Eva])
@pytest.mark.parametrize(("ratio", "side"), [(0.25, 2), (0.5, 3), (1.0, 4), (0.001, 1)])
@torch.no_grad()
def test_fewer_patches_enter(kind, ratio, side):
    model = vp.resized(scrambled(kind(**SIZES)), ratio)
    out, pruned = model(images(3)), vp.prune(model, "random", keep="ratio(ratio=1.0)")
    assert out.shape == (3, 5)
    with vp.collect() as traces:
        assert_close(pruned(images(3)).shape, out.shape)
    assert traces[0].input_tokens.layout.lengths == (1 + side**2,) * 3


@torch.no_grad()
def test_it_computes_on_shrunken_images_with_resampled_positions():
    dense, pixels = scrambled(VisionTransformer(**SIZES)), images(2)
    state = dense.state_dict()
    expected = VisionTransformer(**{**SIZES, "img_size": 16}).eval()
    resampled = resample_abs_pos_embed(state["pos_embed"], [2, 2], [4, 4], num_prefix_tokens=1)
    expected.load_state_dict({**state, "pos_embed": resampled})
    small_pixels = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
    model = vp.resized(dense, 0.25)
    assert_close(model(pixels), expected(small_pixels))
    assert_close(model(small_pixels), expected(small_pixels))
    assert_close(vp.prune(model, "evit", keep="ratio(ratio=1.0)")(pixels), expected(small_pixels), rtol=1e-5, atol=1e-5)
    # the original is as it was
    assert torch.equal(dense.state_dict()["pos_embed"], state["pos_embed"])
    assert dense.patch_embed.strict_img_size


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(TypeError, match="has no set_input_size: resized takes towers of timm"):
        vp.resized(small("blip").model, 0.5)
    with pytest.raises(ValueError, match=r"ratio=0 must lie in \(0, 1\]"):
        vp.resized(scrambled(VisionTransformer(**SIZES)), 0)
