"""Salesforce's files: told by their keys, read whole or not at all."""

from __future__ import annotations

import re

import pytest
import small
import torch
import torch.nn.functional as F

import vltprune as vp
from vltprune.io.checkpoint import load_into
from vltprune.models.convert import from_blip
from vltprune.utils.modes import on_meta

TASKS = ("caption", "vqa", "retrieval")
THEIRS = (  # ours, Salesforce's
    (r"^visual\.", "visual_encoder."),
    (r"^decoder\.body\.", "text_decoder.bert."),
    (r"^decoder\.transform\.", "text_decoder.cls.predictions.transform.dense."),
    (r"^decoder\.norm\.", "text_decoder.cls.predictions.transform.LayerNorm."),
    (r"^decoder\.bias$", "text_decoder.cls.predictions.bias"),
    (r"^text\.", "text_encoder."),
    (r"^head\.", "itm_head."),
    (r"^image_projection\.", "vision_proj."),
    (r"^text_projection\.", "text_proj."),
    (r"^temperature$", "temp"),
    (r"\.word\.", ".embeddings.word_embeddings."),
    (r"\.position\.", ".embeddings.position_embeddings."),
    (r"\.embedding_norm\.", ".embeddings.LayerNorm."),
    (r"\.layers\.(\d+)\.norm\.", r".encoder.layer.\1.output.LayerNorm."),
    (r"\.layers\.(\d+)\.fc1\.", r".encoder.layer.\1.intermediate.dense."),
    (r"\.layers\.(\d+)\.fc2\.", r".encoder.layer.\1.output.dense."),
    (r"\.layers\.(\d+)\.attention_norm\.", r".encoder.layer.\1.attention.output.LayerNorm."),
    (r"\.layers\.(\d+)\.attention\.output\.", r".encoder.layer.\1.attention.output.dense."),
    (r"\.layers\.(\d+)\.attention\.(query|key|value)\.", r".encoder.layer.\1.attention.self.\2."),
    (r"\.layers\.(\d+)\.cross\.norm\.", r".encoder.layer.\1.crossattention.output.LayerNorm."),
    (r"\.layers\.(\d+)\.cross\.streams\.0\.output\.", r".encoder.layer.\1.crossattention.output.dense."),
    (r"\.layers\.(\d+)\.cross\.streams\.0\.", r".encoder.layer.\1.crossattention.self."),
)


def salesforce(model):
    """The model's state under Salesforce's names, with all that their files hold besides."""
    state = {}
    for ours, value in model.state_dict().items():
        key = ours
        for pattern, replacement in THEIRS:
            key = re.sub(pattern, replacement, key)
        state[key] = value.clone()
    for text in ("text_encoder.", "text_decoder.bert."):
        if any(key.startswith(text) for key in state):
            state[text + "embeddings.position_ids"] = torch.arange(16)[None]
    if hasattr(model, "decoder"):
        predictions = "text_decoder.cls.predictions."
        state[predictions + "decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"].clone()
        state[predictions + "decoder.bias"] = state[predictions + "bias"].clone()
    else:
        copied = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")
        state |= {k.replace(".", "_m.", 1): v.clone() for k, v in state.items() if k.startswith(copied)}
        state |= {"image_queue": torch.randn(24, 8), "text_queue": torch.randn(24, 8), "idx_queue": torch.zeros(1, 8)}
        state["ptr_queue"] = torch.zeros(1, dtype=torch.int64)
    return state


def write(state, folder):
    torch.save({"model": state, "epoch": 3, "config": {"image_size": 32}}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


@pytest.mark.parametrize("task", TASKS)
def test_every_weight_arrives(task, tmp_path):
    model = small.build(task)
    again = small.build(task, write(salesforce(model), tmp_path))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("task", TASKS)
def test_the_reference_brings_its_anchors(task, tmp_path):
    sizes = {
        **small.SIZES,
        **small.OWN[task],
        "vision_width": 32,
    }  # the reference has one width, and no map of each tower
    state = salesforce(small.build(task, **sizes)) | {"space_dict": torch.randn(12, 32)}
    file = write(state, tmp_path)
    pruned = vp.create_model(f"blip_{task}_tiny_madtp", pretrained=file, guide="codebook(anchors=12)", **sizes)
    assert torch.equal(pruned.pruning.guide.anchors, state["space_dict"])
    assert not pruned.pruning.guide.is_untrained


@pytest.mark.parametrize("legacy", [False, True])
def test_the_reference_brings_its_temperature(legacy, tmp_path):
    sizes = {**small.SIZES, **small.OWN["vqa"], "vision_width": 32}
    state = salesforce(small.build("vqa", **sizes)) | {"space_dict": torch.randn(12, 32)}
    file = tmp_path / "checkpoint_best.pth"
    torch.save({"model": state, "epoch": 3, "temperature": 4.5}, file, _use_new_zipfile_serialization=not legacy)
    arguments = {"pretrained": file, "guide": "codebook(anchors=12)", **sizes}

    def temperature(name, **parts):
        return vp.create_model(name, **arguments, **parts).pruning.config.part("keep").args.get("temperature")

    assert temperature("blip_vqa_tiny_madtp") == 4.5
    assert temperature("blip_vqa_tiny_madtp", keep="threshold(temperature=2.0)") == 2.0
    assert temperature("blip_vqa_tiny_evit") is None
    torch.save({"model": state, "temperature": 0}, file)  # how the reference says that it does not prune
    assert temperature("blip_vqa_tiny_madtp") == 1.0  # the preset's own


def test_positions_are_interpolated_to_larger_images(tmp_path):
    model = small.build("caption")
    file = write(salesforce(model), tmp_path)
    larger = small.build("caption", file, image_size=48)
    old, new = model.visual.pos_embed, larger.visual.pos_embed
    assert new.shape == (1, 1 + 6 * 6, 48)
    assert torch.equal(new[:, 0], old[:, 0])
    grid = old[:, 1:].view(1, 4, 4, 48).permute(0, 3, 1, 2)
    want = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(new[:, 1:].view(1, 6, 6, 48).permute(0, 3, 1, 2), want)
    assert larger.generate(torch.randn(1, 3, 48, 48), max_length=9).shape[1] <= 9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_decoder.surplus": torch.zeros(1)}, r"1 not in the model: host\.text_decoder\.surplus"),
        (
            {"visual_encoder_x.norm.weight": torch.zeros(48)},
            r"1 not in the model: host\.visual_encoder_x\.norm\.weight",
        ),
        (
            {"text_decoder.bert.encoder.layer.0.odd.weight": torch.zeros(1)},
            r"not in the model: host\.text_decoder\.bert",
        ),
        (
            {"text_decoder.cls.predictions.decoder.weight": torch.zeros(42, 32)},
            r"1 not in the model: host\.text_decoder\.cls\.predictions\.decoder\.weight",
        ),
        ({"visual_encoder.pos_embed": torch.zeros(1, 16, 48)}, r"1 of another shape: host\.visual\.pos_embed"),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(change, says, tmp_path):
    model = small.build("caption")
    file = write(salesforce(small.build("caption")) | change, tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(vp.CheckpointError, match=says):
        load_into(model, file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_file_of_another_task_is_refused(tmp_path):
    file = write(salesforce(small.build("caption")), tmp_path)
    with pytest.raises(vp.CheckpointError, match=r"missing: host\.text\.word\.weight"):
        small.build("vqa", file)
    state = salesforce(small.build("retrieval"))
    del state["temp"]
    with pytest.raises(vp.CheckpointError, match=r"1 missing: host\.temperature"):
        small.build("retrieval", write(state, tmp_path))


@pytest.mark.parametrize(
    ("task", "size", "kind"),
    [
        ("caption", "base", "BlipForConditionalGeneration"),
        ("caption", "large", "BlipForConditionalGeneration"),
        ("retrieval", "base", "BlipForImageTextRetrieval"),
        ("retrieval", "large", "BlipForImageTextRetrieval"),
        ("vqa", "base", "BlipForQuestionAnswering"),
    ],
)
def test_published_sizes_have_the_published_keys_and_shapes(task, size, kind):
    """transformers' classes at the sizes of the published models; image sizes are those of the model, or interpolated."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision, text = (vision, {"encoder_hidden_size": 1024}) if size == "large" else ({}, {})
    with on_meta():
        theirs = getattr(transformers, kind)(transformers.BlipConfig(vision_config=vision, text_config=text))
        ours = vp.backbones[f"blip_{task}_{size}"]().state_dict()
    nothing = {key: torch.zeros(()).expand(value.shape) for key, value in theirs.state_dict().items()}
    dense, _ = from_blip(nothing, ours)
    assert {key: value.shape for key, value in dense.items()} == {key: value.shape for key, value in ours.items()}


@pytest.mark.parametrize("task", TASKS)
def test_own_files_round_trip(task, tmp_path):
    model = vp.create_model(f"blip_{task}_tiny_madtp", guide="codebook(anchors=6)", **small.SIZES, **small.OWN[task])
    again = vp.load(vp.save(model, tmp_path))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert again.pruning.config == model.pruning.config
    if task == "caption":
        assert again.prompt == model.prompt


def pretraining():
    """A checkpoint of pretraining, which holds every task's parts, and the models that they were written from."""
    caption, retrieval = small.build("caption"), small.build("retrieval")
    return salesforce(caption) | salesforce(retrieval), caption, retrieval


def test_pretraining_serves_every_task(tmp_path):
    state, caption, retrieval = pretraining()
    file = write(state, tmp_path)
    parts = {"caption": caption.decoder, "retrieval": retrieval}
    for task, source in parts.items():
        model = small.build(task, file)
        loaded = model.decoder if task == "caption" else model
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in source.state_dict().items())
    features = vp.create_model("blip_tiny", pretrained=file, **small.SIZES)
    assert all(torch.equal(value, features.text.state_dict()[k]) for k, value in retrieval.text.state_dict().items())


def test_pretraining_too_is_read_whole_or_not_at_all(tmp_path):
    file = write(pretraining()[0] | {"surplus": torch.zeros(1), "text_encoder.odd": torch.zeros(1)}, tmp_path)
    with pytest.raises(vp.CheckpointError, match=r"2 not in the model: host\.surplus, host\.text_encoder\.odd"):
        small.build("caption", file)
