"""Training for retrieval: the EMA model, its queues, the two losses, and all of it on two ranks."""

from __future__ import annotations

import pytest
import small
import torch
import torch.nn.functional as F
from ranks import on_two_ranks
from small_models import soften
from torch.testing import assert_close

import vltprune as vp
from vltprune.models import momentum
from vltprune.models.momentum import MomentumDistillation

IDS = torch.tensor([7, 7, 3, 5])


@pytest.fixture
def model():
    return small.build("retrieval")


def batch():
    return (small.images(4), *small.words(4), IDS)


@torch.no_grad()
def test_the_ema_model_follows(model):
    distillation = MomentumDistillation(model, queue_size=8, momentum=0.9)
    before = distillation.ema_model.head.weight.clone()
    assert torch.equal(before, model.head.weight)
    model.head.weight.add_(1.0)
    distillation.update_ema(model)
    assert_close(distillation.ema_model.head.weight, before + 0.1)
    assert not [p for p in distillation.parameters() if p.requires_grad]


@torch.no_grad()
def test_queues_hold_the_latest(model):
    distillation = MomentumDistillation(model, queue_size=5)
    rows = torch.arange(9.0)[:, None].expand(-1, 24)
    for start in (0, 3, 6):
        part = rows[start : start + 3]
        distillation.enqueue(part, -part, part[:, 0].long())
    assert sorted(distillation.id_queue.tolist()) == [4, 5, 6, 7, 8]
    assert torch.equal(distillation.image_queue[:, 0], distillation.id_queue.float())
    assert torch.equal(distillation.text_queue, -distillation.image_queue)
    with pytest.raises(ValueError, match="queue_size=5 cannot hold the 9 pairs"):
        distillation.enqueue(rows, rows, rows[:, 0].long())


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@torch.no_grad()
def test_contrast_is_the_papers(model, alpha):
    """ALBEF's eq. 1 to 3 and 6 by hand: over the batch and the queue, pairs of one image being positives of each other."""
    distillation, earlier, now = MomentumDistillation(model, queue_size=16, momentum=0.5), batch(), batch()
    distillation(model, *earlier)
    stored = distillation.image_queue[:4].clone(), distillation.text_queue[:4].clone()
    model.image_projection.weight.mul_(1.5)
    contrast, _ = distillation(model, *now, alpha=alpha)

    pixels, ids, mask, _ = now
    t, others = model.temperature, torch.cat([IDS, IDS])
    total = 0.0
    for own, ema_own, ema_other, queue in (
        (
            model.image_features(pixels),
            distillation.ema_model.image_features(pixels),
            distillation.ema_model.text_features(ids, mask),
            stored[1],
        ),
        (
            model.text_features(ids, mask),
            distillation.ema_model.text_features(ids, mask),
            distillation.ema_model.image_features(pixels),
            stored[0],
        ),
    ):
        compared = torch.cat([ema_other, queue])
        for i in range(4):
            truth = torch.tensor([float(IDS[i] == other) for other in others])
            target = alpha * (ema_own[i] @ compared.T / t).softmax(0) + (1 - alpha) * truth / truth.sum()
            total -= (target * (own[i] @ compared.T / t).log_softmax(0)).sum() / 4
    assert_close(contrast, total / 2)


@torch.no_grad()
def test_negatives_are_never_of_the_same_image_and_mostly_hard():
    image, text = F.normalize(torch.randn(4, 24), dim=1), F.normalize(torch.randn(4, 24), dim=1)
    drawn = [momentum._hard_negatives(image, text, IDS, torch.tensor(0.07)) for _ in range(2000)]
    for which, similarity in enumerate((image @ text.T, text @ image.T)):
        chosen = torch.stack([pair[which] for pair in drawn])
        assert (IDS[chosen] != IDS).all()
        for i in range(4):
            chance = (similarity[i] / 0.07).masked_fill(IDS[i] == IDS, -torch.inf).softmax(0)
            assert_close(torch.bincount(chosen[:, i], minlength=4) / 2000, chance, atol=0.04, rtol=0)
    with pytest.raises(ValueError, match="pairs of one image only"):
        momentum._hard_negatives(image, text, torch.ones(4), torch.tensor(0.07))


@torch.no_grad()
def test_matching_asks_for_pairs_and_negatives(model):
    pixels, ids, mask, _ = batch()
    texts, others = torch.tensor([2, 3, 0, 1]), torch.tensor([3, 2, 1, 0])
    got = momentum._matching_loss(model, model.visual(pixels), ids, mask, texts, others)
    logits = torch.cat(
        [model(pixels, ids, mask), model(pixels, ids[texts], mask[texts]), model(pixels[others], ids, mask)]
    )
    assert_close(got, F.cross_entropy(logits, torch.tensor([1] * 4 + [0] * 8)))


def test_pruned_with_all_kept_is_dense(model):
    pruned, inputs = vp.prune(model, "random", keep="ratio(ratio=1.0)"), batch()
    losses = []
    for net in (model, pruned):
        torch.manual_seed(4)
        losses.append(torch.stack(MomentumDistillation(net, queue_size=8)(net, *inputs)))
    assert_close(losses[1], losses[0])


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_gradients_reach_all_and_the_ema_model_none(model, kind):
    net = model if kind == "dense" else vp.prune(model, "madtp", guide="codebook(anchors=12)")
    distillation, inputs = MomentumDistillation(net.train(), queue_size=8), batch()
    with vp.collect() as traces:
        contrast, matching = distillation(net, *inputs)
    loss = contrast + matching
    if kind == "pruned":
        image, text, *_ = traces
        assert (image.encoder, text.encoder) == (net.visual, net.text)
        loss = loss + 0.1 * vp.losses.alignment(image.aligned, text.aligned)
    loss.backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in idle if "key.bias" not in name]
    assert all(p.grad is None for p in distillation.parameters())


def test_a_step_learns(model):
    distillation, inputs = MomentumDistillation(model.train(), queue_size=8), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(30):
        torch.manual_seed(0)
        loss = torch.stack(distillation(model, *inputs, alpha=0.0))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        history.append(loss.detach())
    assert history[-1].sum() < 0.8 * history[0].sum()


def on_one_of_two_ranks(rank, folder):
    """What each rank sees: all features, packed image tokens of both, gradients from both, one queue."""
    model = small.build("retrieval")
    pruned = vp.prune(model, "random", keep="random_ratio(mean=0.5, half_width=0.5)")
    pixels, ids, mask = small.images(4), *small.words(4)
    mine = slice(2 * rank, 2 * rank + 2)

    x = torch.full((2, 1), float(rank), requires_grad=True)
    (momentum.gather_ranks(x) * torch.arange(1.0, 5.0)[:, None]).sum().backward()
    with torch.no_grad():
        whole = pruned.visual(pixels)
        gathered = momentum._gather_memory(pruned.visual(pixels[mine]))
        logits = pruned.match(gathered, ids, mask)
    soft = soften(vp.prune(model, "random", keep="learned(threshold=-0.3)"), 0.5)
    parts = soft.visual(pixels), momentum._gather_memory(soft.visual(pixels[mine]))
    distillation = MomentumDistillation(pruned, queue_size=8)
    losses = distillation(pruned, pixels[mine], ids[mine], mask[mine], torch.arange(4)[mine])
    torch.stack(losses).sum().backward()
    torch.save(
        {
            "grad": x.grad,
            "lengths": (whole.layout.lengths, gathered.layout.lengths),
            "x": (whole.x, gathered.x),
            "logits": (pruned.match(whole, ids, mask).detach(), logits),
            "keep_prob": tuple(part.keep_prob.detach() for part in parts),
            "counted_prob": tuple(part.counted_prob.detach() for part in parts),
            "soft logits": tuple(soft.match(part, ids, mask).detach() for part in parts),
            "queue": distillation.image_queue,
            "ids": distillation.id_queue[:4],
            "finite": all(p.grad is None or p.grad.isfinite().all() for p in pruned.parameters()),
        },
        f"{folder}/{rank}.pt",
    )


def test_two_ranks(tmp_path):
    on_two_ranks(on_one_of_two_ranks, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["grad"].flatten().tolist() == [2.0, 4.0]  # each rank's own rows, from both ranks' losses
    assert second["grad"].flatten().tolist() == [6.0, 8.0]
    for seen in (first, second):
        assert seen["lengths"][0] == seen["lengths"][1]
        assert_close(*seen["x"], rtol=0, atol=1e-5)
        for name in ("logits", "keep_prob", "counted_prob", "soft logits"):
            assert_close(*seen[name], rtol=0, atol=1e-5)
        assert seen["keep_prob"][0].min() < 1
        assert seen["ids"].tolist() == [0, 1, 2, 3]
        assert seen["finite"]
    assert torch.equal(first["queue"], second["queue"])
