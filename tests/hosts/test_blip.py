"""Our BLIP: the text tower by itself, over packed images, and the models of two towers."""

from __future__ import annotations

import checks
import pytest
import torch
from checks import Case, randomise, same

import vltprune as vp
from vltprune.models.blip import Blip, BlipNlvr, BlipVision
from vltprune.models.med import MedEncoder

LENGTH = 12
ENDS = (5, 12, 8)  # tokens of each sentence
TEXT = {"vocab_size": 40, "max_positions": LENGTH, "width": 32, "depth": 3, "heads": 4}
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 48,
    "vision_depth": 3,
    "vision_heads": 4,
    "text_width": 32,
    "text_depth": 3,
    "text_heads": 4,
    "vocab_size": 40,
    "max_positions": LENGTH,
    "merge_from": 1,
}
NAMES = ["vision", "text", "text, memory", "text, pairs", "blip", "nlvr"]
MASK = (torch.arange(LENGTH) < torch.tensor(ENDS)[:, None]).long()


def images(*shape: int):
    return torch.randn(*shape, 3, 32, 32) * torch.tensor([0.5, 1.0, 2.0]).view(3, *[1] * (len(shape) + 2))


def words(sentences: int = 3):
    return torch.randint(1, 40, (sentences, LENGTH))


def text_case(images_per_sentence: int) -> Case:
    k = images_per_sentence
    model = MedEncoder(**TEXT, memory_width=24 if k else None, images=max(k, 1), merge_from=1)
    ids, memory = words(), (torch.randn(3 * k, 9, 24),) if k else ()

    def alone(i):
        return (ids[i : i + 1, : ENDS[i]], MASK[i : i + 1, : ENDS[i]], *(m[i * k : (i + 1) * k] for m in memory))

    def dense(*inputs):
        return model(*inputs) * MASK[..., None]

    return Case(
        randomise(model), (ids, MASK, *memory), {"text": [[0]] * 3}, dense=dense, alone=alone, idle=("key.bias",)
    )


def make(name: str) -> Case:
    if name.startswith("text"):
        return text_case({"text": 0, "text, memory": 1, "text, pairs": 2}[name])
    if name == "vision":
        model = BlipVision(image_size=32, patch_size=8, width=32, depth=3, heads=4)
        return Case(randomise(model), (images(3),), {"image": [[0]] * 3})

    model = randomise(BlipNlvr(**SIZES) if name == "nlvr" else Blip(**SIZES))
    ids, image, text = words(), {"image": [[0]] * (6 if name == "nlvr" else 3)}, {"text": [[0]] * 3}
    pictures = images(3, 2) if name == "nlvr" else images(3)
    return Case(
        model,
        (pictures, ids, MASK),
        image | text,
        alone=lambda i: (pictures[i : i + 1], ids[i : i + 1, : ENDS[i]]),
        idle=("key.bias",),
    )


every = pytest.mark.parametrize("name", NAMES)
with_presets = pytest.mark.parametrize("preset", checks.PRESETS)


@every
@pytest.mark.parametrize("reducer", checks.REDUCERS)
def test_keep_all_is_the_host(name, reducer):
    checks.keep_all_is_the_host(make(name), reducer)


@every
def test_the_dense_model_stays(name):
    checks.the_dense_model_stays(make(name))


@every
@with_presets
def test_batch_mates_do_not_matter(name, preset):
    checks.batch_mates_do_not_matter(make(name), preset)


@every
@pytest.mark.parametrize("preset", ["madtp", "random"])  # one that merges and one that drops
def test_depths_are_sound(name, preset):
    checks.depths_are_sound(make(name), preset)


@every
def test_gradients_reach(name):
    checks.gradients_reach(make(name))


@every
def test_reducing_early_changes_nothing(name):
    checks.reducing_early_changes_nothing(make(name))


@every
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
    model, ids, pictures = randomise(model(**SIZES)), words(), images(3)
    pruned = vp.prune(model, "random", keep="ratio(ratio=1.0)")
    same(pruned.image_features(pictures), model.image_features(pictures))
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
    model = randomise(kind(**SIZES))
    pictures = images(3, 2).flatten(0, 1) if kind is BlipNlvr else images(3)
    ids, mask = words(3 * k), MASK.repeat(k, 1)
    pruned = vp.prune(model, "madtp", guide="codebook(anchors=12)", at={"image": None})

    memory = pruned.visual(pictures)
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
    model = randomise(kind(**SIZES))
    pictures = images(3, 2)[:2] if kind is BlipNlvr else images(3)[:2]
    ids, mask = words(6), MASK.repeat(2, 1)
    pruned = Case(model, (), {}).pruned(preset)
    (together,), lengths = checks.run(pruned, (pictures, ids, mask))
    each = len(lengths["image"][0]) // 2
    for i in range(6):
        group = i // 3
        (alone,), own = checks.run(pruned, (pictures[group : group + 1], ids[i : i + 1], mask[i : i + 1]))
        same(alone[0], together[i])
        assert [depth[i] for depth in lengths["text"]] == [depth[0] for depth in own["text"]]
        assert [d[group * each : (group + 1) * each] for d in lengths["image"]] == list(own["image"])


@pytest.mark.parametrize("kind", [Blip, BlipNlvr])
@torch.no_grad()
def test_image_tokens_stay_packed(kind):
    model = randomise(kind(**SIZES))
    pruned = Case(model, (), {}).pruned("random", keep="random_ratio(mean=0.5, spread=0.5)")
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
    model = randomise(kind(**SIZES))
    pruned = Case(model, (), {}).pruned()
    inputs = (images(3, 2) if kind is BlipNlvr else images(3), words())
    assert torch.equal(pruned(*inputs), pruned(*inputs, torch.ones(3, LENGTH)))
    assert not torch.allclose(pruned(*inputs), pruned(*inputs, MASK), atol=1e-3)


@pytest.mark.parametrize("name", ["text", "text, memory", "text, pairs"])
@pytest.mark.parametrize("preset", checks.PRESETS)
@torch.no_grad()
def test_what_stands_behind_the_end_never_matters(name, preset):
    case = make(name)
    ids, *rest = case.inputs
    other = torch.where(MASK.bool(), ids, torch.randint(1, 40, ids.shape))
    assert not torch.equal(ids, other)
    pruned = case.pruned(preset)
    assert torch.equal(pruned(ids, *rest), pruned(other, *rest))


@pytest.mark.parametrize("kind", [Blip, BlipNlvr])
def test_one_guide_serves_both_towers(kind):
    model = randomise(kind(**SIZES))
    pruned = Case(model, (), {}).pruned()
    assert pruned.visual.guide is pruned.text.guide is pruned.pruning.guide
    own = {id(parameter) for parameter in pruned.pruning.guide.parameters()}
    assert {id(p) for p in pruned.parameters()} == {id(p) for p in model.parameters()} | own
    with vp.collect() as traces:
        pruned(images(3, 2) if kind is BlipNlvr else images(3), words(), MASK)
    image, text = (trace.aligned for trace in traces)
    vp.losses.alignment(image, text, images=kind.images_per_sentence).backward()
    assert pruned.pruning.guide.anchors.grad.any()


@pytest.mark.parametrize("name", ["text", "text, memory", "blip", "nlvr"])
def test_dropout_is_the_hosts(name):
    """All of it, so that chance has no say; and in training only."""
    case = make(name)
    for module in case.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1.0
    checks.keep_all_is_the_host(case, "drop")
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
    pictures = case.inputs[0]
    for model in (case.model, case.pruned()):
        with pytest.raises(ValueError, match=f"{sentences} sentences cannot be about"):
            model(pictures, words(sentences))


def test_towers_and_depths_that_are_not_there():
    case = make("nlvr")
    with pytest.raises(ValueError, match=r"'audio'.*image, text"):
        case.pruned(at={"audio": None})
    with pytest.raises(ValueError, match=r"text tower has depths 0 \.\. 2"):
        case.pruned(at={"text": (3,)})
    with pytest.raises(TypeError, match="pruned already"):
        vp.prune(case.pruned(), "random")


def test_a_subclass_is_not_guessed_at():
    class Mine(Blip):
        pass

    with pytest.raises(TypeError, match="Mine"):
        vp.prune(Mine(**SIZES), "random")
