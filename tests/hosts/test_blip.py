"""Our BLIP: the text tower by itself, over packed images, and the models of two towers."""

from __future__ import annotations

import checks
import pytest
import torch
from cases_blip import LENGTH, MASK, NAMES, SIZES, images, make, words
from checks import Case, randomize, same

import vltprune as vp
from vltprune.models.blip import Blip, BlipNlvr


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_large_batches(name):
    case = make(name)
    inputs = tuple(x.repeat(20, *[1] * (x.dim() - 1)) for x in case.inputs)
    got = case.pruned(keep="ratio(ratio=1.0)")(*inputs)
    want = case.model(*inputs)
    same(got, want * MASK.repeat(20, 1)[..., None] if name.startswith("text") else want)


@pytest.mark.parametrize("model", [Blip, BlipNlvr])
@torch.no_grad()
def test_other_doors(model):
    model, ids, pixels = randomize(model(**SIZES)), words(), images(3)
    pruned = vp.prune(model, "random", keep="ratio(ratio=1.0)")
    same(pruned.image_features(pixels), model.image_features(pixels))
    same(pruned.text_features(ids, MASK), model.text_features(ids, MASK))
    same(pruned.text_features(ids), model.text_features(ids))


def by_hand(text, ids, mask, memory, memory_mask, k):
    """The dense layers over padded memory: memory [groups * images, m, width], memory_mask [groups * images, m]."""
    x, own = text.embed(ids), mask.bool()[:, None, None]
    views = memory.unflatten(0, (-1, text.images)).repeat_interleave(k, 0).unbind(1)
    seen = memory_mask.unflatten(0, (-1, text.images)).repeat_interleave(k, 0)[:, :, None, None].unbind(1)
    for layer in text.layers:
        x = layer.attention_norm(x + layer.attention(x, x, own))
        streams = zip(layer.cross.streams, views, seen, strict=True)
        outputs = [stream(x, view, visible) for stream, view, visible in streams]
        x = layer.feed_forward(layer.cross.norm(x + layer.cross.combine(outputs)))
    return x


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", [Blip, BlipNlvr])
@torch.no_grad()
def test_ragged_memory_is_padded_memory_with_a_mask(kind, k):
    model = randomize(kind(**SIZES))
    pixels = images(3, 2).flatten(0, 1) if kind is BlipNlvr else images(3)
    ids, mask = words(3 * k), MASK.repeat(k, 1)
    pruned = vp.prune(model, "madtp", guide="codebook(anchors=12)", at={"image": None})

    memory = pruned.visual(pixels)
    padded, real = memory.unpack()
    assert real is not None
    assert not real.all()
    want = by_hand(model.text, ids, mask, padded, real, k)
    same(pruned.text(ids, mask, memory), want * mask[..., None])
    whole = torch.ones_like(real)
    assert not torch.allclose(by_hand(model.text, ids, mask, padded, whole, k)[:, 0], want[:, 0], atol=1e-3)


@pytest.mark.parametrize("preset", checks.PRESETS)
@pytest.mark.parametrize("kind", [Blip, BlipNlvr])
@torch.no_grad()
def test_several_sentences_are_one_by_one(kind, preset):
    model = randomize(kind(**SIZES))
    pixels = images(3, 2)[:2] if kind is BlipNlvr else images(3)[:2]
    ids, mask = words(6), MASK.repeat(2, 1)
    pruned = Case(model, (), {}).pruned(preset)
    (together,), lengths = checks.run(pruned, (pixels, ids, mask))
    each = len(lengths["image"][0]) // 2
    for i in range(6):
        group = i // 3
        (alone,), own = checks.run(pruned, (pixels[group : group + 1], ids[i : i + 1], mask[i : i + 1]))
        same(alone[0], together[i])
        assert [depth[i] for depth in lengths["text"]] == [depth[0] for depth in own["text"]]
        assert [d[group * each : (group + 1) * each] for d in lengths["image"]] == list(own["image"])


@pytest.mark.parametrize("kind", [Blip, BlipNlvr])
@torch.no_grad()
def test_image_tokens_stay_packed(kind):
    model = randomize(kind(**SIZES))
    pruned = Case(model, (), {}).pruned("random", keep="random_ratio(mean=0.5, half_width=0.5)")
    with vp.collect() as traces:
        memory = pruned.visual(images(3))
    assert isinstance(memory, vp.PackedTokens)
    assert memory.layout.lengths == traces[0].lengths[-1]
    assert len(set(memory.layout.lengths)) > 1
    assert memory.x.shape == (sum(memory.layout.lengths), 48)
    assert memory.summary.sum() == 3

    with vp.collect() as traces:
        pruned(images(3, 2) if kind is BlipNlvr else images(3), words(), MASK)
    image, text = traces
    assert text.inputs[2].x.shape[0] == sum(image.lengths[-1])  # what the text tower was given


@pytest.mark.parametrize("kind", [Blip, BlipNlvr])
@torch.no_grad()
def test_no_mask_is_a_full_mask(kind):
    model = randomize(kind(**SIZES))
    pruned = Case(model, (), {}).pruned()
    inputs = (images(3, 2) if kind is BlipNlvr else images(3), words())
    assert torch.equal(pruned(*inputs), pruned(*inputs, torch.ones(3, LENGTH)))
    assert not torch.allclose(pruned(*inputs), pruned(*inputs, MASK), atol=1e-3)


@pytest.mark.parametrize("name", ["text", "text, memory", "text, pairs"])
@pytest.mark.parametrize("preset", checks.PRESETS)
@torch.no_grad()
def test_tokens_after_the_end_never_matter(name, preset):
    case = make(name)
    ids, *rest = case.inputs
    other = torch.where(MASK.bool(), ids, torch.randint(1, 40, ids.shape))
    assert not torch.equal(ids, other)
    pruned = case.pruned(preset)
    assert torch.equal(pruned(ids, *rest), pruned(other, *rest))


@pytest.mark.parametrize("name", ["text", "text, memory", "blip", "nlvr"])
def test_dropout_is_the_hosts(name):
    """All of it, so that chance has no say; and in training only."""
    case = make(name)
    for module in case.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1.0
    checks.keep_all_is_the_host(case)
    pruned = case.pruned(keep="ratio(ratio=1.0)")
    assert not torch.allclose(pruned.train()(*case.inputs), pruned.eval()(*case.inputs), atol=1e-2)


@pytest.mark.parametrize("name", ["text", "blip", "nlvr"])
def test_a_hidden_first_token_is_refused(name):
    case = make(name)
    mask = MASK.clone()
    mask[1, 0] = 0
    with pytest.raises(ValueError, match="hides the first token"):
        case.pruned()(*(mask if x is MASK else x for x in case.inputs))


@pytest.mark.parametrize("sentences", [2, 4, 5])
@pytest.mark.parametrize("name", ["blip", "nlvr"])
def test_sentences_that_do_not_fit_their_images_are_refused(name, sentences):
    case = make(name)
    pixels = case.inputs[0]
    for model in (case.model, case.pruned()):
        with pytest.raises(ValueError, match=f"{sentences} sentences cannot be about"):
            model(pixels, words(sentences))


def test_a_subclass_is_not_guessed_at():
    class Mine(Blip):
        pass

    with pytest.raises(TypeError, match="Mine"):
        vp.prune(Mine(**SIZES), "random")
