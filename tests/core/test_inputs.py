"""What users send: legal but degenerate input works, bad input is refused by name."""

from __future__ import annotations

import pytest
import timm
import torch
from small_models import PRESETS, asked

import vltprune as vp

GUIDE = "codebook(anchors=6)"
IDS = torch.tensor([[1, 20, 21, 2]])
IMAGES = torch.randn(1, 2, 3, 96, 96)


def nlvr(**parts):
    return vp.create_model("blip_nlvr_tiny_madtp", guide=GUIDE, vision_depth=3, text_depth=3, **parts)


def lengths(model, *inputs):
    with torch.no_grad(), asked(model, inputs[0]), vp.collect() as traces:
        out = model(*inputs)
    assert out.isfinite().all()
    return [trace.lengths for trace in traces]


class TestDegenerate:
    def test_one_patch(self):
        for reducer in ("fuse", "drop"):
            model = nlvr(image_size=8, reducer=reducer)
            image, _ = lengths(model, torch.randn(1, 2, 3, 8, 8), IDS)
            assert set(image) == {(2, 2)}

    @pytest.mark.parametrize("preset", PRESETS)
    def test_one_word_and_none(self, preset):
        model = vp.create_model(f"blip_nlvr_tiny_{preset}")
        lengths(model, IMAGES, IDS[:, :2])
        lengths(model, IMAGES, IDS[:, :1])

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
    def test_all_patches_equal(self, preset, value):
        lengths(vp.create_model(f"blip_nlvr_tiny_{preset}"), torch.full((1, 2, 3, 96, 96), value), IDS)

    @pytest.mark.parametrize("seed", range(8))
    def test_equal_tokens_without_positions_are_a_tie_that_prunes_nothing(self, seed):
        """Whichever weights, and so whichever rounding, which differs between processors."""
        torch.manual_seed(seed)
        model = nlvr()
        with torch.no_grad():
            model.visual.host.pos_embed.zero_()
        image, _ = lengths(model, torch.ones(1, 2, 3, 96, 96), IDS)
        assert image[0] == (145, 145)

    @pytest.mark.parametrize("temperature", [1e-6, 1e6])
    @pytest.mark.parametrize("attend", ["softmax", "sparsemax"])
    def test_extreme_temperatures(self, temperature, attend):
        model = vp.create_model(
            "blip_nlvr_tiny_madtp",
            guide=f"codebook(anchors=6, attend={attend!r})",
            keep=f"threshold(temperature={temperature})",
        )
        lengths(model, IMAGES, IDS)

    @pytest.mark.parametrize("reducer", ["fuse", "drop"])
    @pytest.mark.parametrize("ratio", [0.0, 1.0])
    def test_extreme_ratios(self, ratio, reducer):
        image, text = lengths(nlvr(keep=f"ratio(ratio={ratio})", reducer=reducer), IMAGES, IDS)
        left = {"fuse": 2, "drop": 1}[reducer] if ratio == 0 else 145
        assert set(image) == {(left, left)}
        assert set(text) == {(min(left, 4),)}

    @pytest.mark.parametrize("pool", ["avg", "map", "max", ""])
    def test_a_tower_without_class_token_keeps_its_last_token(self, pool):
        tower = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, class_token=False, global_pool=pool
        )
        assert lengths(vp.prune(tower.eval(), "random", keep="ratio(ratio=0.0)"), torch.randn(2, 3, 32, 32)) == [
            ((1, 1),) * 3
        ]

    @pytest.mark.parametrize("scale", [1e-20, 1e4])
    def test_tiny_and_huge_anchors(self, scale):
        model = nlvr()
        with torch.no_grad():
            model.pruning.guide.anchors.mul_(scale)
        lengths(model, IMAGES, IDS)


class TestRefused:
    @pytest.mark.parametrize("pruned", [True, False])
    @pytest.mark.parametrize(
        ("images", "ids", "says"),
        [
            (torch.randn(1, 3, 96, 96), IDS, r"images must be \[batch, 2, 3, height, width\]"),
            (torch.randn(1, 2, 3, 64, 96), IDS, r"images must be \[batch, 3, 96, 96\], got \[2, 3, 64, 96\]: resize"),
            (torch.randn(1, 2, 1, 96, 96), IDS, r"images must be \[batch, 3, 96, 96\]"),
            (torch.randn(0, 2, 3, 96, 96), IDS, "empty batch"),
            (torch.full((1, 2, 3, 96, 96), float("nan")), IDS, r"images\[0\] holds NaN or infinity"),
            (torch.cat([IMAGES, IMAGES / 0]), torch.cat([IDS, IDS]), r"images\[2\] holds NaN or infinity"),
            (IMAGES, torch.ones(1, 33, dtype=torch.int64), "33 tokens, the text tower has max_positions=32: shorten"),
            (IMAGES, torch.ones(1, 0, dtype=torch.int64), "input_ids must be .* not empty"),
            (IMAGES, torch.tensor([[1, 57]]), r"must lie in 0 \.\. 56"),
            (torch.cat([IMAGES, IMAGES]), torch.cat([IDS, IDS, IDS]), "3 sentences cannot be about 4 images"),
        ],
    )
    def test_inputs(self, pruned, images, ids, says):
        model = nlvr() if pruned else vp.create_model("blip_nlvr_tiny")
        with pytest.raises(ValueError, match=says):
            model(images, ids)

    def test_a_mask_that_hides_the_first_token(self):
        with pytest.raises(ValueError, match="pad on the right"):
            nlvr()(IMAGES, IDS, torch.tensor([[0, 1, 1, 1]]))

    def test_images_of_a_timm_tower(self):
        model = vp.create_model("vit_tiny_patch16_224_madtp")
        for images in (torch.randn(1, 3, 200, 224), torch.randn(1, 4, 224, 224), torch.randn(0, 3, 224, 224)):
            with pytest.raises(ValueError, match="images"):
                model(images)

    @pytest.mark.parametrize(
        ("sizes", "says"),
        [
            ({"image_size": 100}, "image_size 100 does not split into patches of 8"),
            ({"text_width": 130}, "width 130 does not split into 4 heads"),
        ],
    )
    def test_sizes(self, sizes, says):
        with pytest.raises(ValueError, match=says):
            vp.create_model("blip_nlvr_tiny", **sizes)

    def test_parts_that_a_tower_cannot_serve(self):
        with pytest.raises(
            ValueError, match=r"scorer='madtp' reads the attention of a summary token .* image tower has none"
        ):
            vp.create_model("vit_base_patch16_siglip_224_madtp")
        with pytest.raises(ValueError, match="keep='threshold' reads the alignment guide, and guide=None"):
            vp.preset("madtp").replace(guide=None, scorer="cls_attention", keep="threshold")
        with pytest.raises(ValueError, match=r"codebook\(project=False\) cannot serve towers of width"):
            vp.create_model("blip_nlvr_tiny_madtp", text_width=64, guide="codebook(project=False)")

    @pytest.mark.parametrize(
        "part",
        [
            "threshold(temperature=0)",
            "threshold(knob='group')",
            "ratio(ratio=1.5)",
            "count(count=-1)",
            "random_ratio(mean=2)",
        ],
    )
    def test_arguments_out_of_range(self, part):
        with pytest.raises(ValueError, match=part.partition("(")[0]):
            nlvr(keep=part)

    def test_a_guide_out_of_range(self):
        for guide in ("codebook(anchors=0)", "codebook(attend='hardmax')"):
            with pytest.raises(ValueError, match="codebook"):
                vp.create_model("blip_nlvr_tiny_madtp", guide=guide)
