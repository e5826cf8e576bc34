"""Presets of trained methods against the published methods, written out for one image at a time."""

from __future__ import annotations

from math import exp, sqrt

import pytest
import torch
from published import KINDS, check

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

    with vp.scorers.temporarily(kept_predictor=Kept):
        check("dynamicvit", decide, kind, patches, "block", scorer="kept_predictor")
