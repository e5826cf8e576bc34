"""Pipelines of transformers and open_clip's zero-shot classifiers, run on pruned models of local, small configurations."""

from __future__ import annotations

import encoders
import numpy as np
import open_clip
import pytest
import torch
import transformers as hf
from checks import same
from PIL import Image
from test_hosts import make

import vltprune as vp

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 64, "patch_size": 8}
SENTENCES = ["a caption of a dog", "a picture", "a picture of a star of a dog of a caption"]
LABELS = ["dog", "star", "picture of a dog"]
KEEP_ALL = {"keep": "ratio(ratio=1.0)"}


@pytest.fixture
def photos():
    """Three images of different sizes."""
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (60, 50 + 20 * i, 3), np.uint8)) for i in range(3)]


@pytest.fixture
def words(tmp_path):
    """A tokenizer of few words."""
    return hf.AutoTokenizer.from_pretrained(encoders.write(tmp_path))


def processor(kind=hf.ViTImageProcessor):
    size = {"height": 64, "width": 64}
    return kind(size={"shortest_edge": 64}, crop_size=size) if kind is hf.CLIPImageProcessor else kind(size=size)


def answers(task, model, given, *, batch_size=2, call=(), **parts):
    return hf.pipeline(task, model=model, **parts)(given, batch_size=batch_size, **dict(call))


def text_model(name, **sizes):
    config = hf.BertConfig(**{**encoders.SIZES, **sizes}, num_labels=4)
    return getattr(hf, name)(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_texts(name, words):
    task = "feature-extraction" if name == "BertModel" else "text-classification"
    dense = text_model(name, num_hidden_layers=4)
    whole, pruned = vp.prune(dense, "random", **KEEP_ALL), vp.prune(dense, "evit")
    want, got = (answers(task, model, SENTENCES, tokenizer=words, batch_size=1) for model in (dense, whole))
    together = answers(task, pruned, SENTENCES, tokenizer=words, batch_size=3)
    for i, sentence in enumerate(SENTENCES):
        out = pruned(**words(sentence, return_tensors="pt"))
        if name == "BertModel":
            same(torch.tensor(got[i]), torch.tensor(want[i]))
            (tokens,) = out.last_hidden_state
            same(torch.tensor(together[i])[0, : len(tokens)], tokens)
            assert not torch.tensor(together[i])[0, len(tokens) :].any()
        else:
            assert got[i] == {"label": want[i]["label"], "score": pytest.approx(want[i]["score"])}
            assert together[i]["score"] == pytest.approx(float(out.logits.softmax(-1).max()), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("saved", [False, True])
def test_image_classification(saved, photos, tmp_path):
    dense = hf.ViTForImageClassification(hf.ViTConfig(**VISION, id2label=dict(enumerate("abcd")))).eval()
    pruned, images = vp.prune(dense, "evit"), processor()
    if saved:
        pruned.save_pretrained(tmp_path)
        images.save_pretrained(tmp_path)
        pruned, images = vp.load(tmp_path), hf.AutoImageProcessor.from_pretrained(tmp_path)
    task = "image-classification"
    whole = vp.prune(dense, "random", **KEEP_ALL)
    want, got = (answers(task, model, photos, image_processor=images) for model in (dense, whole))
    found = answers(task, pruned, photos, image_processor=images)
    for i, photo in enumerate(photos):
        assert got[i] == [{"label": row["label"], "score": pytest.approx(row["score"])} for row in want[i]]
        shares = pruned(**images(photo, return_tensors="pt")).logits.softmax(-1)[0]
        best = [(pruned.config.id2label[int(label)], float(shares[label])) for label in shares.argsort(descending=True)]
        assert [(row["label"], row["score"]) for row in found[i]] == [(a, pytest.approx(b, rel=1e-4)) for a, b in best]


@torch.no_grad()
def test_image_features(photos):
    dense, images = hf.ViTModel(hf.ViTConfig(**VISION)).eval(), processor()
    whole, pruned = vp.prune(dense, "random", **KEEP_ALL), vp.prune(dense, "evit")
    for pool in (False, True):
        want, got, found = (
            answers("image-feature-extraction", model, photos, image_processor=images, pool=pool)
            for model in (dense, whole, pruned)
        )
        for i, photo in enumerate(photos):
            same(torch.tensor(got[i]), torch.tensor(want[i]))
            out = pruned(**images(photo, return_tensors="pt"))
            same(torch.tensor(found[i]), out.pooler_output if pool else out.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_zero_shot_image_classification(name, photos, words):
    text = {**SIZES, "vocab_size": len(words), "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3}
    if name == "clip":
        dense = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)).eval()
    else:
        dense = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=VISION)).eval()
        words.model_input_names = ["input_ids"]
    images = processor(hf.CLIPImageProcessor if name == "clip" else hf.SiglipImageProcessor)
    parts = {"tokenizer": words, "image_processor": images, "call": {"candidate_labels": LABELS}}
    whole, pruned = vp.prune(dense, "random", **KEEP_ALL), vp.prune(dense, "attention", keep="ratio(ratio=0.5)")
    want, got, found = (
        answers("zero-shot-image-classification", model, photos, **parts) for model in (dense, whole, pruned)
    )
    length = {"padding": True} if name == "clip" else {"padding": "max_length", "max_length": 64}
    prompts = words([f"This is a photo of {label}." for label in LABELS], return_tensors="pt", **length)
    for i, photo in enumerate(photos):
        assert got[i] == [{"label": row["label"], "score": pytest.approx(row["score"], rel=1e-4)} for row in want[i]]
        logits = pruned(**prompts, **images(photo, return_tensors="pt")).logits_per_image[0]
        shares = logits.softmax(-1) if name == "clip" else logits.sigmoid()
        by_label = {row["label"]: row["score"] for row in found[i]}
        assert by_label == {label: pytest.approx(float(s), rel=1e-4) for label, s in zip(LABELS, shares, strict=True)}


@torch.no_grad()
@pytest.mark.parametrize("name", ["open_clip: clip", "open_clip: custom clip", "open_clip_hf: clip"])
def test_open_clip_zero_shot(name):
    case = make(name)
    images, texts = case.inputs
    templates = ["a {}", "one {}", "the {}"]

    def tokenize(sentences):
        return torch.stack([texts[len(one) % len(texts)] for one in sentences])

    def classifier(model, **options):
        return open_clip.build_zero_shot_classifier(model, tokenize, LABELS, templates, **options)

    whole, pruned = case.pruned("random", **KEEP_ALL), case.pruned("evit")
    same(classifier(whole), classifier(case.model))
    weights = classifier(pruned)
    same(classifier(pruned, num_classes_per_batch=1), weights)
    rows = [
        pruned.encode_text(tokenize([t.format(label) for t in templates]), normalize=True).mean(0) for label in LABELS
    ]
    same(weights, torch.nn.functional.normalize(torch.stack(rows), dim=-1).T)
    assert (pruned.encode_image(images, normalize=True) @ weights).shape == (len(images), len(LABELS))
