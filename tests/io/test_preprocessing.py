"""Image preprocessing of the models of every library: the transform of their own package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import vltprune as vp
from vltprune.data import SyntheticPairs, normalize

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))


def test_blip_resizes_the_whole_image_and_normalizes_as_clip():
    prepare = vp.transforms(vp.create_model("blip_base", image_size=32, vision_depth=1, text_depth=1))
    white = prepare(Image.new("RGB", (70, 20), (255, 255, 255)))
    assert white.shape == (3, 32, 32)
    torch.testing.assert_close(white[:, 5, 7], torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-4, rtol=0)
    squeezed = IMAGE.resize((32, 32), Image.Resampling.BICUBIC)
    assert (np.asarray(prepare.to_image(prepare(IMAGE))) == np.asarray(squeezed)).all()


@pytest.mark.parametrize("name", ["blip_nlvr_tiny", "blip_nlvr_tiny_madtp"])
def test_tiny_models_see_what_they_were_trained_on(name):
    pair = SyntheticPairs("test", 1)[0].images
    prepare = vp.transforms(vp.create_model(name))
    images = torch.stack([prepare(Image.fromarray(side)) for side in pair])
    torch.testing.assert_close(images, torch.from_numpy(normalize(pair)), atol=1e-6, rtol=0)


def test_saved_models_remember(tmp_path):
    vp.save(vp.create_model("blip_tiny"), tmp_path)
    assert vp.transforms(vp.load(tmp_path)).mean.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224_evit"])
def test_timm(name):
    from timm.data import create_transform, resolve_data_config

    model = vp.create_model(name)
    dense = model.pruning.host if hasattr(model, "pruning") else model
    own = create_transform(**resolve_data_config({}, model=dense))
    torch.testing.assert_close(vp.transforms(model)(IMAGE), own(IMAGE))


def test_timm_at_another_size():
    assert vp.transforms(vp.create_model("vit_tiny_patch16_224", img_size=64, depth=1))(IMAGE).shape == (3, 64, 64)


@pytest.mark.parametrize("name", ["clip_vit_s_32_alt", "clip_vit_s_32_alt_random"])
def test_open_clip(name):
    import open_clip

    _, _, own = open_clip.create_model_and_transforms("ViT-S-32-alt")
    torch.testing.assert_close(vp.transforms(vp.create_model(name))(IMAGE), own(IMAGE))


def test_a_model_without_images_is_refused():
    with pytest.raises(TypeError, match="MedEncoder does not say"):
        vp.transforms(vp.create_model("blip_tiny").text)
