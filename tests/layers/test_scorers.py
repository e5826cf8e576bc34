"""Each scorer against its formula, written out for one instance at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from strategies import DIM, HEADS, cases, generator, packed
from torch.testing import assert_close

from vltprune import AttentionStats, BlockSpec, Layout, PackedTokens, Stat, scorers

SPEC = BlockSpec("image", 2, 4, DIM, HEADS, has_summary=True)
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def norm1(z):
    return z / (z.sum() + 1e-8)


def formula(name, received, summary, context, affinity):
    """One instance's unprotected tokens, in the words of the method: S_self, S_cls, S_tok and their mean."""
    each = {
        "self_attention": norm1(received),
        "cls_attention": (summary * context / (context.sum(1, keepdim=True) + 1e-8)).sum(1),
        "mean_cls_attention": summary.mean(1),
        "alignment": norm1(affinity.amax(1)),
    }
    each["madtp"] = (each["self_attention"] + each["cls_attention"] + each["alignment"]) / 3
    return each[name]


@pytest.mark.parametrize("name", ["self_attention", "cls_attention", "mean_cls_attention", "alignment", "madtp"])
@given(case=cases(has_summary=True))
def test_formulas(name, case):
    """Where the sums are well away from zero, which is where the method's own formula means something."""
    lifted = dataclasses.replace(case.guidance, affinity=case.guidance.affinity.abs() + 0.1)
    stats = AttentionStats(case.stats.requested, {stat: value + 0.1 for stat, value in case.stats.values.items()})
    scores = scorers[name](case.spec)(case.tokens, stats, lifted)
    for i in range(case.batch):
        rows = (case.tokens.layout.instance == i) & case.tokens.free
        columns = [stats[s][rows] for s in (Stat.RECEIVED, Stat.SUMMARY, Stat.CONTEXT)]
        assert_close(scores[rows], formula(name, *columns, lifted.affinity[rows]), **CLOSE)


@pytest.mark.parametrize("affinity", [[-3.0, -1.0, -2.0], [1.0, -2.0, 1.0], [0.0, 0.0, 0.0], [1e30, -1e30, 0.0]])
def test_alignment_keeps_the_order_of_odd_sums(affinity):
    """Dot products may sum to nothing or less: finite, and larger stays larger."""
    values = torch.tensor(affinity)
    tokens = PackedTokens.pack(torch.zeros(1, 3, DIM))
    guidance = dataclasses.make_dataclass("Affine", ["affinity"])(values[:, None])
    scores = scorers["alignment"](SPEC)(tokens, AttentionStats(), guidance)
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    for i in range(3):
        for j in range(3):
            assert (values[i] > values[j]) == (scores[i] > scores[j])


def test_random_is_drawn_from_seed_depth_and_position_alone():
    layout = Layout((300, 200))
    tokens = packed(layout, DIM, 0.0, False, False, 1.0, generator(0))

    def score(tokens=tokens, depth=2, **args):
        return scorers["random"](dataclasses.replace(SPEC, depth=depth), **args)(tokens, AttentionStats(), None)

    scores = score()
    assert torch.equal(scores, score(tokens.with_x(tokens.x + 1)))
    assert not torch.equal(scores, score(seed=1))
    assert not torch.equal(scores, score(depth=3))
    first = {int(p): float(s) for p, s in zip(tokens.position[:300], scores[:300], strict=True)}
    shared = [
        (first[int(p)], float(s)) for p, s in zip(tokens.position[300:], scores[300:], strict=True) if int(p) in first
    ]
    assert len(shared) > 50
    assert all(a == b for a, b in shared)


def test_random_is_uniform():
    position = torch.arange(20_000)
    tokens = PackedTokens(torch.zeros(20_000, 1), Layout((20_000,)), position, torch.zeros(20_000, dtype=torch.bool))
    scores = scorers["random"](SPEC, seed=3)(tokens, AttentionStats(), None)
    assert ((scores > 0) & (scores < 1)).all()
    counts = torch.histc(scores, 20, 0, 1)
    assert ((counts - 1000).abs() < 160).all()  # five deviations
    neighbors = torch.corrcoef(torch.stack([scores[:-1], scores[1:]]))[0, 1]
    assert neighbors.abs() < 0.035
