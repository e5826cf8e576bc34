"""BLIP's answers: what they may look at, how they are ranked, what pruning leaves of image and question."""

from __future__ import annotations

import pytest
import small
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import vltprune as vp
from vltprune.models.generation import BeamSearch, GreedySearch
from vltprune.utils.modes import on_meta


@pytest.fixture
def model():
    return small.build("vqa")


@pytest.fixture
def pruned(model):
    return vp.prune(model, "random", keep="random_ratio(mean=0.5, half_width=0.5)")


def near(got, want):
    assert_close(got, want, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("which", ["model", "pruned"])
def test_padding_never_matters(which, request):
    model = request.getfixturevalue(which)
    pixels, (ids, mask), (answers, answer_mask) = small.images(3), small.words(3), small.words(3, 6)
    logits = model(pixels, ids, mask, answers, answer_mask)
    others = torch.where(mask.bool(), ids, 17), torch.where(answer_mask.bool(), answers, 17)
    seen = answer_mask.bool()
    near(model(pixels, others[0], mask, others[1], answer_mask)[seen], logits[seen])
    scores = model.rank(pixels, ids, mask, answers, answer_mask)[1]
    near(model.rank(pixels, others[0], mask, others[1], answer_mask)[1], scores)
    for i, (end, answer_end) in enumerate(zip(mask.sum(1).tolist(), answer_mask.sum(1).tolist(), strict=True)):
        alone = model(pixels[i : i + 1], ids[i : i + 1, :end], None, answers[i : i + 1, :answer_end])
        near(alone[0], logits[i, :answer_end])


@torch.no_grad()
def test_answers_find_their_questions(model):
    pixels, (ids, mask), (answers, answer_mask) = small.images(3), small.words(3), small.words(4, 6)
    question = torch.tensor([2, 0, 0, 1])
    got = model(pixels, ids, mask, answers, answer_mask, question)
    near(got, model(pixels[question], ids[question], mask[question], answers, answer_mask))

    two_each = model(pixels, ids, mask, torch.cat([answers, answers[:2]]))
    near(two_each, model(pixels, ids, mask, torch.cat([answers, answers[:2]]), None, torch.arange(6) // 2))


@torch.no_grad()
def test_several_questions_are_about_one_image(model):
    pixels, (ids, mask), (answers, _) = small.images(2), small.words(6), small.words(6, 5)
    got = model(pixels, ids, mask, answers)
    near(got, model(pixels.repeat_interleave(3, 0), ids, mask, answers))


@torch.no_grad()
def test_loss_weighs_answers(model):
    pixels, (ids, mask), (answers, answer_mask) = small.images(3), small.words(3), small.words(4, 6)
    question, weight = torch.tensor([0, 0, 1, 2]), torch.tensor([0.3, 0.7, 1.0, 0.5])
    chances = model(pixels, ids, mask, answers, answer_mask, question).log_softmax(-1)
    total = 0.0
    for i, length in enumerate(answer_mask.sum(1).tolist()):
        for t in range(1, length):
            total -= weight[i] * (0.9 * chances[i, t - 1, answers[i, t]] + 0.1 * chances[i, t - 1].mean())
    near(model.loss(pixels, ids, mask, answers, answer_mask, question, weight), total / 3)


@pytest.mark.parametrize("k", [1, 4, 7, 99])
@torch.no_grad()
def test_ranking_is_by_first_word_and_then_in_full(model, k):
    pixels, (ids, mask), (answers, answer_mask) = small.images(3), small.words(3), small.words(7, 6)
    order, scores = model.rank(pixels, ids, mask, answers, answer_mask, k=k, label_smoothing=0.0)
    assert order.shape == scores.shape == (3, min(k, 7))
    for i in range(3):
        each = (pixels[i].expand(7, -1, -1, -1), ids[i].expand(7, -1), mask[i].expand(7, -1))
        chances = model(*each, answers, answer_mask).log_softmax(-1)
        first = chances[torch.arange(7), 0, answers[:, 1]]
        places = [range(1, int(length)) for length in answer_mask.sum(1)]
        whole = torch.stack([sum(chances[a, t - 1, answers[a, t]] for t in places[a]) for a in range(7)])
        chosen = first.topk(min(k, 7)).indices
        near(scores[i], whole[chosen].sort(descending=True).values)
        near(whole[order[i]], scores[i])
        assert set(order[i].tolist()) == set(chosen.tolist())


def test_ranking_decodes_one_question_at_a_time(model, monkeypatch):
    decoded, decode = [], model.decoder.forward
    monkeypatch.setattr(
        model.decoder, "forward", lambda ids, *rest: decoded.append(tuple(ids.shape)) or decode(ids, *rest)
    )
    (ids, mask), (answers, answer_mask) = small.words(3), small.words(7, 6)
    model.rank(small.images(3), ids, mask, answers, answer_mask, k=5)
    length = answers.shape[1]
    assert decoded == [(3, 1), (5, length), (5, length), (5, length)]  # the first words, then each question's best


@pytest.mark.parametrize("strategy", [GreedySearch(), BeamSearch(3)], ids=str)
def test_packed_is_unpacked_and_masked(pruned, strategy, monkeypatch):
    """Ragged image tokens in the encoder, ragged question states in the decoder."""
    pixels, (ids, mask) = small.images(6), small.words(6)
    with torch.no_grad():
        ids[:, 0] = small.ENC
        states = pruned.text(ids, mask, pruned.visual(pixels))
        padded, real = states.unpack()
    assert not real.all()
    assert states.layout.total < mask.sum()

    generated, start = pruned.generate(pixels, ids, mask, strategy), pruned.decoder.start
    junk = torch.where(real[..., None], padded, 100.0)
    monkeypatch.setattr(pruned.decoder, "start", lambda *memory: start(junk, real))
    assert torch.equal(pruned.generate(pixels, ids, mask, strategy), generated)


def test_batch_mates_do_not_matter_to_generation(pruned):
    pixels, (ids, mask) = small.images(6), small.words(6)
    together = pruned.generate(pixels, ids, mask)
    for i in range(6):
        alone = pruned.generate(pixels[i : i + 1], ids[i : i + 1], mask[i : i + 1])
        assert torch.equal(F.pad(alone[0], (0, together.shape[1] - alone.shape[1])), together[i])


def test_both_towers_align(model):
    pruned = vp.prune(model, "madtp", guide="codebook(anchors=12)").train()
    ids, mask = small.words(3)
    with vp.collect() as traces:
        loss = pruned.loss(small.images(3), ids, mask, *small.words(3, 6))
    image, text = traces
    (loss + 0.1 * vp.losses.alignment(image.aligned, text.aligned)).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in idle if "key.bias" not in name]


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_names(size):
    with on_meta():
        model = vp.backbones[f"blip_vqa_{size}"]()
    assert size == "tiny" or model.visual.patch_embed.img_size == (480, 480)
    assert set(vp.create_model("blip_vqa_tiny_madtp").pruning.towers) == {"image", "text"}


def test_refusals(model):
    pixels, (ids, mask), (answers, _) = small.images(3), small.words(3), small.words(4, 6)
    with pytest.raises(ValueError, match="4 sentences cannot be about 3 images"):
        model(pixels, ids, mask, answers)
    with pytest.raises(ValueError, match="2 sentences cannot be about 3 images"):
        model(pixels, ids[:2], mask[:2], answers)
    with pytest.raises(ValueError, match=r"answer_ids must be \[answers, 2 or more\], \[CLS\] first; got \[4, 1\]"):
        model.rank(pixels, ids, mask, answers[:, :1])
