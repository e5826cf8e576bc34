"""BLIP's captions: what a caption may look at, what generation remembers, what pruning leaves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import small
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import vltprune as vp
from vltprune.models.generation import BeamSearch, GenerationConfig, GreedySearch, NucleusSampling
from vltprune.utils.modes import on_meta

STRATEGIES = [GreedySearch(), BeamSearch(3), BeamSearch(2, 0.0)]


@pytest.fixture
def model():
    return small.build("caption")


@pytest.fixture
def pruned(model):
    return vp.prune(model, "random", keep="random_ratio(mean=0.5, half_width=0.5)")


@torch.no_grad()
def test_no_word_sees_what_follows(model):
    pixels, (ids, _) = small.images(3), small.words(3)
    before = model(pixels, ids)
    for place in range(1, ids.shape[1]):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % 30 + 3
        after = model(pixels, other)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place], atol=1e-3)


@torch.no_grad()
def test_padding_never_matters(model):
    pixels, (ids, mask) = small.images(3), small.words(3)
    logits, loss = model(pixels, ids, mask), model.loss(pixels, ids, mask)
    other = torch.where(mask.bool(), ids, 17)
    assert_close(model(pixels, other, mask)[mask.bool()], logits[mask.bool()], rtol=0, atol=1e-5)
    assert_close(model.loss(pixels, other, mask), loss)
    for i, length in enumerate(mask.sum(1).tolist()):
        alone = model(pixels[i : i + 1], ids[i : i + 1, :length])
        assert_close(alone[0], logits[i, :length], rtol=0, atol=1e-5)


@torch.no_grad()
def test_loss_is_the_mean_over_what_is_asked(model):
    pixels, (ids, mask) = small.images(3), small.words(3)
    chances = model(pixels, ids, mask).log_softmax(-1)
    costs = []
    for i, length in enumerate(mask.sum(1).tolist()):
        for t in range(len(model.prompt), length):
            costs.append(-0.9 * chances[i, t - 1, ids[i, t]] - 0.1 * chances[i, t - 1].mean())
    assert_close(model.loss(pixels, ids, mask), torch.stack(costs).mean())


@torch.no_grad()
def test_the_first_token_is_the_models_own(model):
    pixels, (ids, mask) = small.images(3), small.words(3)
    other = ids.clone()
    other[:, 0] = 9
    assert torch.equal(model(pixels, ids, mask), model(pixels, other, mask))


@torch.no_grad()
def test_word_by_word_is_all_at_once(model):
    ids = small.words(6)[0]
    cache = model.decoder.start(model.visual(small.images(3)))  # two captions an image
    whole, _ = model.decoder(ids, cache)
    parts = []
    for part in ids.split([4, 1, 1, 3], 1):
        logits, cache = model.decoder(part, cache)
        parts.append(logits)
    assert cache.length == ids.shape[1]
    assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_several_captions_are_one_by_one(model):
    pixels, (ids, mask) = small.images(3), small.words(6)
    together = model(pixels, ids, mask)
    assert_close(model(pixels.repeat_interleave(2, 0), ids, mask), together, rtol=0, atol=1e-5)
    order, ids[:, 0] = torch.tensor([2, 0, 0]), small.BOS
    cache = model.decoder.start(model.visual(pixels)).select_groups(order)
    assert_close(model.decoder(ids, cache)[0], model(pixels[order], ids), rtol=0, atol=1e-5)


@dataclass(frozen=True)
class History:
    """A state that has no cache, only what each row has generated."""

    generated: torch.Tensor

    def reorder(self, rows):
        return History(self.generated[rows])


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_generation_remembers_rightly(model, strategy):
    """What was generated with a cache is what the whole sentence, read at once, says."""
    pixels = small.images(6)
    generated = model.generate(pixels, strategy, min_length=0, max_length=14)
    assert generated[:, :4].tolist() == [[small.BOS, *small.PROMPT]] * 6

    def forgetful(ids, state):
        history = torch.cat([state.generated, ids], 1) if state is not None else ids
        cache = model.decoder.start(model.visual(pixels))
        return model.decoder(history, cache)[0][:, -1], History(history)

    prompt = torch.tensor([model.prompt]).expand(6, -1)
    with torch.no_grad():
        assert torch.equal(strategy(forgetful, None, prompt, GenerationConfig(small.EOS, small.PAD, 0, 14)), generated)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_packed_is_unpacked_and_masked(pruned, strategy):
    pixels, decoder = small.images(6), pruned.decoder
    with torch.no_grad():
        memory = pruned.visual(pixels)
    padded, real = memory.unpack()
    assert not real.all()

    rules = {"min_length": 0, "max_length": 12}
    generated = pruned.generate(pixels, strategy, **rules)
    junk = torch.where(real[..., None], padded, 100.0)
    prompt = torch.tensor([pruned.prompt]).expand(6, -1)
    with torch.no_grad():
        again = decoder.generate(
            prompt, decoder.start(junk, real), strategy, GenerationConfig(small.EOS, small.PAD, **rules)
        )
    assert torch.equal(generated, again)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_batch_mates_do_not_matter(pruned, strategy):
    pixels = small.images(6)
    together = pruned.generate(pixels, strategy, 0, 12)
    for i in range(6):
        alone = pruned.generate(pixels[i : i + 1], strategy, 0, 12)
        assert torch.equal(F.pad(alone[0], (0, together.shape[1] - alone.shape[1])), together[i])


def test_gradients_pass_through_the_pruned_tower(model):
    pruned = vp.prune(model, "madtp", guide="codebook(anchors=12)").train()
    ids, mask = small.words(3)
    pruned.loss(small.images(3), ids, mask).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in idle if "key.bias" not in name]
    assert list(pruned.pruning.towers) == ["image"]


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_names(size):
    with on_meta():
        model = vp.backbones[f"blip_caption_{size}"]()
    assert model.decoder.body.position.num_embeddings >= 20
    if size != "tiny":
        assert model.prompt == (30522, 1037, 3861, 1997)
        assert model.visual.patch_embed.img_size == (384, 384)
    assert vp.create_model("blip_caption_tiny_madtp").pruning.config == vp.preset("madtp")


def test_refusals(model):
    pixels, (ids, mask) = small.images(2), small.words(2)
    with pytest.raises(ValueError, match="3 sentences cannot be about 2 images"):
        model(pixels, small.words(3)[0])
    with pytest.raises(ValueError, match="pad on the right"):
        model(pixels, ids, mask.flip(1) * (torch.arange(9) > 0))
    with pytest.raises(ValueError, match="max_length=17 is past the decoder's max_positions=16"):
        model.generate(pixels, max_length=17)
    with pytest.raises(ValueError, match="18 tokens, the text tower has max_positions=16"):
        model(pixels, torch.ones(2, 18, dtype=torch.int64))


def test_generation_can_be_drawn(model):
    pixels, rules = small.images(3), {"max_length": 14, "repetition_penalty": 1.1}
    one, two, other = (
        model.generate(pixels, NucleusSampling(0.9, torch.Generator().manual_seed(seed)), **rules) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert one.tolist() != other.tolist()
