"""vltprune.query: a text that reaches image towers, and what is refused without one."""

from __future__ import annotations

import threading

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from small_models import asked, images, scrambled, sentences, small, soften
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import vltprune as vp
from vltprune.cli import main as cli
from vltprune.layers import current_query
from vltprune.models.retrieval import BlipRetrieval

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PRESETS = ("trips", "cdpruner")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}


def query_of(model, batch=3, segments=1):
    return torch.randn(batch, segments, model.pruning.guide.query_dim)


class TestContext:
    def test_it_holds_within_the_block_and_in_its_thread(self):
        seen = []
        assert current_query() is None
        with vp.query(torch.ones(2, 5)):
            assert current_query().embedding.shape == (2, 1, 5)
            with vp.query(torch.zeros(2, 3, 5)):
                assert current_query().embedding.shape == (2, 3, 5)
            assert torch.equal(current_query().embedding, torch.ones(2, 1, 5))
            thread = threading.Thread(target=lambda: seen.append(current_query()))
            thread.start()
            thread.join()
        assert current_query() is None and seen == [None]

    def test_it_ends_with_an_error(self):
        with pytest.raises(KeyError), vp.query(torch.ones(2, 5)):
            raise KeyError
        assert current_query() is None

    @pytest.mark.parametrize(
        ("given", "error", "says"),
        [
            (["a dog"], TypeError, r"a tensor of floating-point numbers, not list: encode the texts first"),
            (torch.ones(2, 5).long(), TypeError, r"not torch.int64: encode the texts first, query\(model.encode_text"),
            (torch.ones(5), ValueError, r"\[batch, dim\] or \[batch, segments, dim\], one for each image, not \[5\]"),
            (torch.ones(0, 5), ValueError, r"not \[0, 5\]"),
        ],
    )
    def test_what_is_no_embedding_is_refused(self, given, error, says):
        with pytest.raises(error, match=says), vp.query(given):
            pass


class TestRefusals:
    def test_no_text(self):
        model = vp.prune(small("vit").model, "trips")
        with pytest.raises(
            ValueError, match=r"image tower is pruned by guide='text_query'.* `with vltprune.query\(embedding\):`"
        ):
            model(images(2))

    @pytest.mark.parametrize("preset", PRESETS)
    def test_another_number_of_texts(self, preset):
        model = vp.prune(small("vit").model, preset)
        for texts, hint in ((2, r", such as embedding.repeat_interleave\(3, 0\)"), (4, "instance$"), (9, "instance$")):
            says = rf"the image tower runs 6 instances, and vltprune.query has texts for {texts}: .*{hint}"
            with pytest.raises(ValueError, match=says), vp.query(torch.randn(texts, 32)):
                model(images(6))

    @pytest.mark.parametrize("preset", PRESETS)
    def test_another_width(self, preset):
        model = vp.prune(small("vit").model, preset)
        name = vp.preset(preset).part("guide").name
        says = rf"is 7 wide, and .* takes 32: prune it with guide='{name}\(dim=7\)'"
        with pytest.raises(ValueError, match=says), vp.query(torch.randn(2, 7)):
            model(images(2))

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.parametrize("preset", PRESETS)
    def test_tracing_would_keep_the_text(self, preset):
        model = vp.prune(small("vit").model, preset)
        pixels = images(2)
        refused = pytest.raises(ValueError, match="a trace would keep this example's query")
        with torch.no_grad(), asked(model, pixels), refused:
            torch.jit.trace(model, (pixels,))

    def test_a_text_tower_alone(self):
        with pytest.raises(ValueError, match=r"names the tower 'image'; this model has text"):
            vp.prune(small("text").model, "trips")
        with pytest.raises(
            ValueError, match=r"guide='text_query' compares images with a text, and .* only a text tower"
        ):
            vp.prune(small("text").model, "madtp", guide="text_query")

    def test_a_scorer_without_its_guide(self):
        for guide in (None, "codebook", "text_embedding"):
            with pytest.raises(
                ValueError, match=r"'query_attention' reads .* \(Stat.FROM_QUERY\), .* write guide='text_query'"
            ):
                vp.prune(small("vit").model, "trips", guide=guide)

    def test_a_width_below_one(self):
        with pytest.raises(ValueError, match=r"text_query\(dim=0\) must be 1 or more"):
            vp.prune(small("vit").model, "trips", guide="text_query(dim=0)")

    def test_there_are_no_anchors_to_fit(self):
        model = vp.prune(small("vit").model, "trips")
        with pytest.raises(ValueError, match=r"TextQuery has no anchors to fit, .* vltprune.query gives"):
            vp.fit_guide(model, [images(2)])
        with pytest.raises(ValueError, match=r"guide='text_query' has no anchors to fit"):
            model.pruning.guide.fit(torch.randn(9, 32))

    @pytest.mark.parametrize("command", [["macs"], ["info"]])
    def test_commands_give_none(self, command, capsys):
        assert cli.main([*command, "vit_tiny_patch16_224_trips"]) == 2
        assert "run it inside `with vltprune.query(embedding):`" in capsys.readouterr().err


def test_without_a_text_cdpruner_looks_at_difference_alone():
    model = vp.prune(small("vit").model, "cdpruner")
    plain = vp.prune(small("vit").model, vp.preset("cdpruner").replace(scorer="equal", guide=None))
    pixels = images(3)
    with vp.collect() as traces:
        assert torch.equal(model(pixels), plain(pixels))
        with asked(model, pixels):
            model(pixels)
    alone, difference, with_text = (trace.output_tokens.position for trace in traces)
    assert torch.equal(alone, difference) and not torch.equal(alone, with_text)
    assert vp.count_macs(model, pixels).total == vp.count_macs(plain, pixels).total


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_image_alone_is_as_in_a_batch_of_eight(preset, segments):
    """Also where an earlier stage left another number of patches of each image."""
    own = vp.preset(preset)
    first = vp.Stage("self_attention", "distortion(error=0.2)", at=0)
    ragged = own.with_stages(
        [first, vp.Stage(own.scorer, "ratio(ratio=0.5)", own.reducer, selector=own.selector, at=2)]
    )
    for config in (own, ragged):
        model, pixels = vp.prune(small("vit").model, config), images(8)
        if preset == "cdpruner":
            torch.nn.init.normal_(model.pruning.guide.maps["image"].weight)
        query = query_of(model, 8, segments)
        with torch.no_grad():
            with vp.query(query), vp.collect() as traces:
                together = model(pixels)
            for i in range(8):
                with vp.query(query[i : i + 1]), vp.collect() as one:
                    assert_close(model(pixels[i : i + 1]), together[i : i + 1], **CLOSE)
                assert one[0].lengths == tuple((lengths[i],) for lengths in traces[0].lengths)
        assert torch.equal(traces[0].query, query)
        if config is ragged:
            assert len(set(traces[0].lengths[-1])) > 1


def test_several_segments_are_several_anchors():
    model, pixels = vp.prune(small("vit").model, "cdpruner"), images(2)
    query = query_of(model, 2, 3)
    with vp.query(query), vp.collect() as traces:
        model(pixels)
    assert traces[0].layers[-1].guidance.affinity.shape[1] == 3


@pytest.mark.parametrize("training", ["soft", "hard", "recomputed"])
def test_gradients_reach_the_projection_and_the_text(training):
    dense = scrambled(VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5))
    dense.set_grad_checkpointing(training == "recomputed")
    model = vp.prune(dense, "trips", guide="text_query(dim=12)", keep="ratio(ratio=0.5)")
    soften(model, 0.0).train(training != "soft")
    if training == "soft":
        model = soften(vp.prune(dense, "trips", guide="text_query(dim=12)", keep="learned(threshold=0.0)"), 0.5)
    query = torch.randn(2, 12, requires_grad=True)
    with vp.query(query):
        out = model(images(2))
    out.square().sum().backward()  # outside of the block, as where blocks are computed again
    for gradient in (query.grad, *(one.grad for one in model.pruning.guide.parameters())):
        assert gradient.isfinite().all() and gradient.any()


def clip(**options):
    vision = {"image_size": 32, "patch_size": 8, "layers": 4, "width": 32, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 40, "layers": 2, "width": 24, "heads": 2}
    return vp.create_model("clip", embed_dim=20, vision_cfg=vision, text_cfg=text, **options)


def hf_clip():
    text = {**SIZES, "vocab_size": 40, "max_position_embeddings": 12}
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=20)
    return transformers.CLIPModel(config).eval()


def hf_blip():
    text = {**SIZES, "vocab_size": 40, "max_position_embeddings": 16, "encoder_hidden_size": 32}
    config = transformers.BlipConfig(text_config=text, vision_config=IMAGE, image_text_hidden_size=20)
    return transformers.BlipForImageTextRetrieval(config).eval()


def own_blip():
    sizes = {
        "vision_width": 32,
        "vision_depth": 4,
        "vision_heads": 2,
        "text_width": 24,
        "text_depth": 2,
        "text_heads": 2,
    }
    return BlipRetrieval(image_size=32, patch_size=8, **sizes, vocab_size=40, max_positions=16, embed_dim=20).eval()


# models whose towers share a space, and the norm and projection that lead there
SHARED = {
    "open_clip": (clip, lambda m, x: m.visual.ln_post(x) @ m.visual.proj),
    "open_clip, own text": (lambda: clip(custom_text=True), lambda m, x: m.visual.ln_post(x) @ m.visual.proj),
    "open_clip, image tower": (lambda: clip().visual, lambda m, x: m.ln_post(x) @ m.proj),
    "transformers": (hf_clip, lambda m, x: m.visual_projection(m.vision_model.post_layernorm(x))),
    "transformers, image tower": (
        lambda: transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**IMAGE, projection_dim=20)
        ).eval(),
        lambda m, x: m.visual_projection(m.vision_model.post_layernorm(x)),
    ),
    "blip": (own_blip, lambda m, x: m.image_projection(m.visual.norm(x))),
    "blip of transformers": (hf_blip, lambda m, x: m.vision_proj(m.vision_model.post_layernorm(x))),
}


@pytest.mark.parametrize("name", SHARED)
@torch.no_grad()
def test_projections_begin_as_those_of_the_model(name):
    """CDPruner's relevance is that of the model's own embeddings, without training; and TRIPS' text takes the way back."""
    build, embed = SHARED[name]
    dense = scrambled(build())
    x, query = torch.randn(7, 32), torch.randn(1, 20)
    guide = vp.prune(dense, "cdpruner").pruning.guide
    assert guide.query_dim == 20
    with vp.query(query):
        affinity = guide(vp.PackedTokens.pack(x[None]), "image").affinity[:, 0]
    assert_close(affinity, F.cosine_similarity(embed(dense, x), query), **CLOSE)

    layer = vp.prune(dense, "trips").pruning.guide.maps["image"]
    through = embed(dense, torch.eye(32)) - embed(dense, torch.zeros(32, 32))
    ones = vp.prune(dense, "cdpruner").pruning.guide.maps["image"].weight
    assert torch.equal(layer.weight, ones.mT) and not layer.bias.any() and through.shape == (32, 20)


def test_elsewhere_the_width_is_that_of_the_text_tower_or_of_the_tower():
    assert vp.prune(small("blip").model, "trips").pruning.guide.query_dim == 32
    assert vp.prune(clip().visual, "trips", guide="text_query(dim=5)").pruning.guide.query_dim == 5
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGE)).eval()
    layer = vp.prune(siglip, "trips").pruning.guide.maps["image"]
    assert torch.equal(layer.weight, torch.eye(32))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_dual_encoder_encodes_the_text_first(preset, tmp_path):
    dense = scrambled(clip())
    inside = {"place": "block", "at": {"image": (1, 2)}} if preset == "cdpruner" else {}
    model = vp.prune(dense, preset, keep="ratio(ratio=0.3)", **inside)
    pixels, ids = images(3), torch.randint(1, 40, (3, 8))
    with torch.no_grad():
        text = model.encode_text(ids)
        with vp.query(text):
            features = model.encode_image(pixels)
            both = model(pixels, ids)
        if preset == "trips":  # whose text tower is as it was
            assert_close(text, dense.encode_text(ids), **CLOSE)
        with vp.query(-text):
            assert not torch.equal(model.encode_image(pixels), features)
        assert_close(both[0], F.normalize(features, dim=-1), **CLOSE)
        again = vp.load(vp.save(model, tmp_path / "saved"))
        with vp.query(text):
            assert torch.equal(again.encode_image(pixels), features)


def test_calibration_and_measurement_within_a_query():
    model, pixels = vp.prune(small("vit").model, "trips", at={"image": (0, 1)}), images(4)
    with asked(model, pixels):
        found = vp.calibrate(model, [pixels], 0.3, tolerance=0.1)
        assert vp.measure(model, [pixels]).reduction == pytest.approx(found.reduction)
    assert found.reduction == pytest.approx(0.3, abs=0.08)


HOSTS = {
    "rotary": lambda: Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5, use_rot_pos_emb=True
    ),
    "registers": lambda: timm.create_model(
        "vit_tiny_patch16_dinov3_qkvb", img_size=32, patch_size=8, depth=3, embed_dim=36
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**IMAGE)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE)),
    "open_clip": lambda: open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=3, heads=2, mlp_ratio=4, output_dim=8
    ),
}


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_a_text_passes_the_projections_of_every_kind_of_block(name):
    """It is a token without a place in the image."""
    dense = HOSTS[name]().eval()
    model, pixels = vp.prune(dense, "trips"), images(2)
    outs = []
    for sign in (1, -1):
        with vp.query(sign * torch.ones(2, model.pruning.guide.query_dim)), vp.collect() as traces:
            out = model(pixels)
            outs.append(getattr(out, "last_hidden_state", out))
        assert traces[0].lengths[-1][0] < traces[0].lengths[0][0]
        assert outs[-1].isfinite().all()


def test_a_text_tower_that_is_not_pruned_reads_no_text():
    model, inputs = vp.prune(small("blip").model, "trips"), (images(2), *sentences(4))
    with asked(model, inputs[0]), vp.collect() as traces:
        assert model(*inputs).shape[0] == 4
    image, text = traces
    assert image.query.shape == (2, 1, 32) and text.query is None
    with pytest.raises(LookupError, match="the text tower has no guide"):
        text.aligned  # noqa: B018
