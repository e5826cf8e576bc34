"""open_clip's CLIP by its configuration: what is built, recorded, refused, and how it reads sentences."""

from __future__ import annotations

import encoders
import open_clip
import pytest
import torch
import transformers as hf
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel

import vltprune as vp
from vltprune.evaluation import tasks
from vltprune.evaluation.tasks.base import dense
from vltprune.io.preprocessing import image_size
from vltprune.models.clip import build_tokenizer

VISION = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
TEXT = {"layers": 2, "width": 32, "heads": 4, "context_length": 14, "vocab_size": 60}
OWN = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 64}


@pytest.fixture
def folder(tmp_path):
    return encoders.write(tmp_path / "encoder")


def inputs(model):
    torch.manual_seed(1)
    return torch.randn(2, 3, *image_size(dense(model).visual)), torch.randint(4, 16, (2, 14))


ARCHITECTURES = {
    "own": OWN,
    "custom": {**OWN, "custom_text": True, "init_logit_bias": -10.0, "output_dict": True},
    "oblong": {**OWN, "vision_cfg": {**VISION, "image_size": (32, 48)}},
    "timm": {**OWN, "vision_cfg": TIMM},
    "transformers": None,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("preset", ["", "_evit", "_madtp"])
@torch.no_grad()
def test_round_trip(name, preset, folder, tmp_path):
    model = vp.create_model(f"clip{preset}", **(ARCHITECTURES[name] or encoders.clip(folder)))
    assert (model.pruning.host if preset else model).logit_scale.exp() == pytest.approx(1 / 0.07)
    again = vp.load(vp.save(model, tmp_path / "saved"))
    first, second = model(*inputs(model)), again(*inputs(again))
    pairs = zip(first.values(), second.values(), strict=True) if name == "custom" else zip(first, second, strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert not again.training


def test_towers_are_open_clips(folder):
    model = vp.create_model("clip", **encoders.clip(folder))
    assert type(model) is open_clip.CustomTextCLIP
    assert type(model.visual) is TimmModel and type(model.text) is HFTextEncoder
    assert model.visual.trunk.patch_embed.img_size == (64, 64)  # timm knows it by another
    assert type(vp.create_model("clip", **OWN)) is open_clip.CLIP


def test_a_published_file_is_the_published_model():
    ours = vp.create_model("clip", **open_clip.get_model_config("ViT-S-32-alt"))
    named = vp.create_model("clip_vit_s_32_alt")
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, named)]
    assert shapes[0] == shapes[1] and type(ours) is type(named)
    assert str(vp.transforms(ours).transform) == str(vp.transforms(named).transform)


def test_towers_may_bring_their_own_weights(tmp_path):
    folder = encoders.write(tmp_path / "encoder", weights=True)
    wanted = hf.AutoModel.from_pretrained(folder).state_dict()["embeddings.word_embeddings.weight"]
    own, fresh = (
        vp.create_model("clip", **encoders.clip(folder, hf_model_pretrained=asked)) for asked in (True, False)
    )
    assert torch.equal(own.text.transformer.embeddings.word_embeddings.weight, wanted)
    assert not torch.equal(fresh.text.transformer.embeddings.word_embeddings.weight, wanted)

    (tmp_path / "encoder" / "model.safetensors").unlink()  # a saved model brings them itself
    again = vp.load(vp.save(own, tmp_path / "saved"))
    assert torch.equal(again.text.transformer.embeddings.word_embeddings.weight, wanted)


def test_paths_are_text_on_disk(tmp_path, folder):
    model = vp.create_model("clip", **encoders.clip(tmp_path / "encoder"))
    assert model.recipe.model_args["text_cfg"]["hf_model_name"] == folder


def test_images_are_normalized_as_configured(tmp_path):
    model = vp.create_model("clip", **OWN, preprocess_cfg={"mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"})
    for each in (model, vp.load(vp.save(model, tmp_path))):
        prepare = vp.transforms(each)
        assert prepare.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert "size=32, interpolation=bilinear" in str(prepare.transform)


@pytest.fixture
def published(folder, monkeypatch):
    """An architecture that open_clip itself knows, whose text tower is an encoder of transformers."""
    text = {**encoders.clip(folder)["text_cfg"], "context_length": 12}
    small = {"embed_dim": 24, "vision_cfg": dict(VISION), "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-BERT", small)
    return "clip_tiny_bert"


def test_names_of_open_clip_with_an_encoder_of_transformers(published, tmp_path):
    """The folder has no weights: none are asked for."""
    model = vp.create_model(f"{published}_madtp")
    assert set(model.pruning.towers) == {"image", "text"}
    again = vp.load(vp.save(model, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again.encode_text(inputs(model)[1]), model.encode_text(inputs(model)[1]))
    assert tasks.Retrieval.from_model(model).encode(["a dog"])[0].shape == (1, 12)
    shorter = vp.create_model(published, force_context_length=7)
    assert tasks.Retrieval.from_model(shorter).encode(["a dog"])[0].shape == (1, 7)


def test_retrieval_reads_sentences_as_the_encoder_does(folder, tmp_path):
    model = vp.load(vp.save(vp.create_model("clip_evit", **encoders.clip(folder)), tmp_path / "saved"))
    (ids,) = tasks.Retrieval.from_model(model).encode(["A picture of a dog", "dog " * 30])
    assert ids.tolist() == [[2, 4, 7, 6, 4, 8, 3, 0, 0, 0, 0, 0], [2, *[8] * 10, 3]]
    (ids,) = tasks.Retrieval.from_model(vp.create_model("clip", **OWN)).encode(["a dog"])
    assert ids.shape == (1, 14)


def test_sentences_that_cannot_be_read(folder, tmp_path):
    model = vp.create_model("clip", **encoders.clip(folder, hf_tokenizer_name=None))
    with pytest.raises(ValueError, match=r"does not say how sentences become its ids: .* with hf_tokenizer_name"):
        tasks.Retrieval.from_model(model)
    with pytest.raises(ValueError, match=r"no tokenizer of transformers at hf_tokenizer_name='.*nowhere'"):
        build_tokenizer({"hf_tokenizer_name": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"embed_dim": None}, TypeError, r"'clip' needs embed_dim: write create_model\('clip', embed_dim="),
        ({"multimodal_cfg": {}}, TypeError, "clip takes no argument 'multimodal_cfg'"),
        ({"vision_cfg": "ViT-B-32"}, TypeError, "vision_cfg must be a dict.*got 'ViT-B-32'"),
        ({"vision_cfg": {**VISION, "widht": 3}}, TypeError, "vision_cfg takes no argument 'widht'; did you mean width"),
        ({"text_cfg": {**TEXT, "hf_name": "x"}}, TypeError, "text_cfg takes no argument 'hf_name'"),
        ({"preprocess_cfg": {"means": 0}}, TypeError, "preprocess_cfg takes no argument 'means'; did you mean mean"),
        ({"init_logit_scale": torch.ones(())}, TypeError, "init_logit_scale cannot be saved"),
        ({"pretrained": True}, ValueError, "no weights of its own: give pretrained=PATH, or .*hf_model_pretrained"),
    ],
)
def test_refusals(change, error, says):
    arguments = {key: value for key, value in {**OWN, **change}.items() if value is not None}
    with pytest.raises(error, match=says):
        vp.create_model("clip", **arguments)


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (
            "bert",
            {"hf_pooler_type": "mena_pooler"},
            "hf_pooler_type='mena_pooler' is not supported: write one of mean_pooler, max_pooler",
        ),
        ("bert", {"hf_proj_type": "conv"}, "hf_proj_type='conv' is not supported: write one of linear, mlp"),
        ("bert", {"hf_model_name": "nowhere/at/all"}, "hf_model_name='nowhere/at/all' is no folder with a config.json"),
        ("distilbert", {}, "is of type 'distilbert', and open_clip builds roberta, xlm-roberta"),
    ],
)
def test_encoders_that_are_refused(kind, text, says, tmp_path):
    folder = encoders.write(tmp_path / "encoder", kind)
    with pytest.raises(ValueError, match=says):
        vp.create_model("clip", **encoders.clip(folder, **text))
