"""Presets of trained methods against the published methods, written out for one image at a time."""

from __future__ import annotations

from math import exp, sqrt

import pytest
import torch
from published import KINDS, check, images, vit
from registered import registered
from small_models import soften
from torch.testing import assert_close

import vltprune as vp

everywhere = pytest.mark.parametrize("patches", [4, 5])
summarized = pytest.mark.parametrize("kind", ["class token", "registers"])


def some(block, kept, scores):
    """What is kept, or the best token where the output is a mean of tokens and none is left."""
    if not kept and block.protected == 0:
        kept = [max(block.free, key=lambda j: scores[j])]
    return block.kept(kept)


@everywhere
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("final", [0.0, 0.8, 1.3])
def test_ltp(kind, patches, final):
    def decide(block):
        n, free = len(block.x), block.free
        scores = [
            sum(float(one[i, j]) for one in block.maps for i in range(n)) / (len(block.maps) * n) for j in range(n)
        ]
        return some(block, [j for j in free if scores[j] > final * (block.depth + 1) / 4 / n], scores)

    kept = check("ltp", decide, kind, patches, keep=f"rising_threshold(final={final})")
    everything = KINDS[kind] + patches**2
    assert kept == [everything] * 3 if final == 0 else min(kept) < everything and (final > 1 or len(set(kept)) > 1)


@everywhere
@summarized
def test_asvit(kind, patches):
    def decide(block):
        out = [(one @ block.v[:, h]).norm(dim=-1) for h, one in enumerate(block.maps)]
        scores = {
            j: float(sum(one[0, j] * out[h][j] for h, one in enumerate(block.maps)) / sum(norm[j] for norm in out))
            for j in block.free
        }
        mean = sum(scores.values()) / len(scores)
        deviation = sqrt(sum((score - mean) ** 2 for score in scores.values()) / len(scores))
        return block.kept([j for j, score in scores.items() if score > mean - 0.5 * deviation])

    kept = check("asvit", lambda block: decide(block) if block.depth else None, kind, patches)
    assert len(set(kept)) > 1


@everywhere
@pytest.mark.parametrize("kind", KINDS)
def test_avit(kind, patches):
    def decide(block):
        sums = block.memory.setdefault("sums", {})
        for j in block.free:
            sums[block.place[j]] = sums.get(block.place[j], 0.0) + 1 / (1 + exp(0.5 - float(block.x[j, 0])))
        remain = {j: 0.99 - sums[block.place[j]] for j in block.free}
        return some(block, [j for j in block.free if remain[j] > 0], remain)

    kept = check("avit", decide, kind, patches, "block", scorer="halting(gain=1.0, center=0.5)")
    assert max(kept) < KINDS[kind] + patches**2


@pytest.mark.parametrize("reduction", [0.2, 0.4, 0.6])
def test_avit_reaches_costs_without_training(reduction):
    """Halting probabilities of random towers are small, and their sums differ."""
    data = [images(5, 8)]
    model = vp.prune(vit("class token", 5), "avit", reduction=reduction, data=data)
    assert vp.measure(model, data).reduction == pytest.approx(reduction, abs=0.01)


def test_dynamicvit_prunes_before_the_published_blocks():
    config = vp.preset("dynamicvit")
    assert config.place == "block"
    for depths, before in ((12, (3, 6, 9)), (24, (6, 12, 18)), (4, (1, 2, 3))):
        assert config.depths("image", depths) == tuple(block - 1 for block in before)


@everywhere
@pytest.mark.parametrize("kind", KINDS)
def test_dynamicvit_keeps_a_ratio_by_its_networks(kind, patches):
    """The networks are those of the pruned model, called on one image."""
    torch.manual_seed(0)
    networks = {}

    class Kept(vp.TokenScorer):
        """The registered network, which the published loop can call too."""

        def __init__(self, spec):
            super().__init__(spec)
            self.network = networks.setdefault(spec.depth, vp.scorers["predictor"](spec))
            with torch.no_grad():  # random networks say nearly the same of all tokens
                self.network.logits[-1].weight.mul_(30)

        def forward(self, tokens, stats, guidance):
            return self.network(tokens, stats, guidance)

    def decide(block):
        if block.depth not in (0, 1, 2):
            return None
        network, free = networks[block.depth], block.free
        halves = network.halves(block.x)
        mean = halves[free, 16:].mean(0)
        scores = {j: float(network.logits(torch.cat([halves[j, :16], mean])).softmax(-1)[0]) for j in free}
        count = -(-7 * len(free) // 10)
        return block.kept(sorted(free, key=lambda j: -scores[j])[:count])

    with registered(vp.scorers, kept_predictor=Kept):
        check("dynamicvit", decide, kind, patches, "block", scorer="kept_predictor")


def masked(model, image, decide, place):
    """A published training loop for one image: the tokens [n, dim] behind the last block, and the mask D [n] of what stays.

    Masked tokens have no part in the softmax of attention: exp(q k) D / sum exp(q k) D. `decide(depth, x, maps, v, D)` gives
    the mask of a block, hard with a gradient, or None.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    stays = torch.ones(len(x))
    for depth, block in enumerate(model.blocks):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, -1).unbind(1)
        weights = [(q[:, h] @ k[:, h].T * attn.scale).exp() * stays for h in range(attn.num_heads)]
        maps = [one / one.sum(1, keepdim=True) for one in weights]
        x = x + attn.proj(torch.cat([one @ v[:, h] for h, one in enumerate(maps)], 1))
        if place == "block":
            x = x + block.mlp(block.norm2(x))
        mask = decide(depth, x, maps, v, stays)
        if place != "block":
            x = x + block.mlp(block.norm2(x))
        stays = stays if mask is None else stays * mask
    return x, stays


def straight_through(margin, certain):
    """1 where a margin is positive and 0 elsewhere, with the gradient of the sigmoid; 1 for indices that stay for certain."""
    soft = margin.sigmoid()
    hard = (margin > 0).float() + soft - soft.detach()
    return torch.stack([torch.ones(()) if i in certain else one for i, one in enumerate(hard)])


def check_training(model, batch, decide, place, weights, of_cost):
    """A softly trained tower against the published loop, image by image: contents, gradients, and `of_cost` of the count."""
    directions = torch.randn(100, 32)
    torch.manual_seed(5)
    with vp.collect() as traces:
        model(batch)
    tokens = traces[0].output_tokens
    assert set(tokens.layout.lengths) == {len(tokens.position) // len(batch)}  # masked, not removed
    ours = (tokens.x * directions[tokens.position] * tokens.keep_prob[:, None]).sum()
    ours = ours + of_cost * tokens.expected.float().square().sum()
    gradients = torch.autograd.grad(ours, weights)

    loss, kept = 0.0, []
    for number, image in enumerate(batch):
        x, stays = masked(model.host, image, lambda *block, i=number: decide(i, *block), place)
        loss = loss + (x * directions[: len(x)] * stays[:, None]).sum() + of_cost * stays.sum() ** 2
        kept.append(int(stays.sum().round()))
    assert kept == tokens.expected.round().int().tolist() and min(kept) < len(x)
    assert_close(ours, loss, rtol=1e-4, atol=1e-3)
    for ours, wanted in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
        assert_close(ours, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@everywhere
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_dynamicvit_trains_by_hard_samples_that_mask(kind, batch, patches):
    """Gumbel samples are 0 or 1; what they mask has no part in attention, and the gradient of its probability."""
    dense = vit(kind, patches)
    model = soften(vp.prune(dense, "dynamicvit"), 0.3)
    networks = {depth: model.pruners_at(depth)[0].scorer for depth in (0, 1, 2)}
    for network in networks.values():  # random networks say nearly the same of all tokens
        network.logits[-1].weight.data.mul_(20)
    n, protected, noise = patches**2 + KINDS[kind], KINDS[kind], {}

    def decide(number, depth, x, maps, v, stays):
        if depth not in networks:
            return None
        network, weight = networks[depth], stays[protected:, None]
        own, shared = network.halves(x).chunk(2, -1)
        mean = (shared[protected:] * weight).sum(0) / weight.sum()
        logits = network.logits(torch.cat([own, mean.expand(len(x), -1)], -1))
        margin = logits[:, 0] - logits[:, 1]
        # where the output is a mean of tokens, the best one that is left stays in any case
        certain = range(protected) if protected else [int(margin.masked_fill(stays < 0.5, -1e9).argmax())]
        return straight_through(margin + noise[depth][number], certain)

    torch.manual_seed(5)
    for depth in networks:
        noise[depth] = torch.logit(torch.rand(batch * n), 1e-6).view(batch, n)
    weights = [weight for network in networks.values() for weight in network.parameters()]
    check_training(model, images(patches, batch), decide, "block", weights, of_cost=1.0)


@everywhere
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", ["class token", "registers"])
def test_asvit_trains_thresholds_straight_through(kind, batch, patches):
    dense = vit(kind, patches)
    model = soften(vp.prune(dense, "asvit"), 0.3)
    thresholds, protected = {depth: model.pruners_at(depth)[0].keeper.threshold for depth in (1, 2, 3)}, KINDS[kind]

    def decide(number, depth, x, maps, v, stays):
        if depth not in thresholds:
            return None
        norms = [(one @ v[:, h]).norm(dim=-1) for h, one in enumerate(maps)]
        score = sum(one[0] * norm for one, norm in zip(maps, norms, strict=True)) / sum(norms)
        there = score[protected:][stays[protected:] > 0.5]
        margin = (score - there.mean()) / there.std(unbiased=False) - thresholds[depth]
        return straight_through(margin, range(protected))

    check_training(model, images(patches, batch), decide, "attention", [*thresholds.values()], of_cost=0.0)
