"""Scores that tokens share with those that resemble them, against the formula and on tokens that are copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from strategies import DIM, HEADS, cases
from torch.testing import assert_close

from vltprune import AttentionStats, BlockSpec, Layout, PackedTokens, Stat, scorers

SPEC = BlockSpec("image", 2, 4, DIM, HEADS, has_summary=True)


def alone(x, width):
    """One instance's unprotected tokens: 1 / sum over j of exp(-||z_i - z_j||^2 / width), cut a thousandth from either end."""
    z = F.layer_norm(x, (DIM,)) / DIM**0.5
    apart = torch.cdist(z[None], z[None], compute_mode="donot_use_mm_for_euclid_dist")[0].square()
    return 1 / (((-apart / width).exp() - 1e-3) / 0.998).clamp(0, 1).sum(1)


@pytest.mark.parametrize("width", [0.03, 1.0])
@given(case=cases(has_summary=True))
def test_the_formula(width, case):
    """Of every layout: protected tokens are not counted, nor those of others."""
    scores = scorers["distinct"](case.spec, width=width)(case.tokens, case.stats, None)
    assert ((scores > 0) & (scores <= 1)).all()
    for i in range(case.batch):
        rows = (case.tokens.layout.instance == i) & case.tokens.free
        assert_close(scores[rows], alone(case.tokens.x[rows], width), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lengths", [(12, 12), (12, 9, 12)])
def test_copies_share_one_score(lengths):
    """An instance of 3 different tokens, one 7 times, one 4 times (or once) and one once: 1 each in all, 3 an instance."""
    kinds = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))
    which = [[0] * 7 + [1] * (length - 8) + [2] for length in lengths]
    layout = Layout(lengths)
    x = torch.cat([kinds[torch.tensor(one)] for one in which])
    tokens = PackedTokens(
        x, layout, torch.cat([torch.arange(n) for n in lengths]), torch.zeros(len(x), dtype=torch.bool)
    )
    scores = scorers["distinct"](SPEC)(tokens, AttentionStats(), None)
    for one, of in zip(which, scores.split(lengths), strict=True):
        assert torch.equal(of, torch.tensor([1 / one.count(kind) for kind in one]))  # but for nothing


@given(case=cases(has_summary=True))
def test_another_scorers_scores_are_shared(case):
    stats = AttentionStats(case.stats.requested, {stat: value + 0.1 for stat, value in case.stats.values.items()})
    for name, of in (("distinct_attention", "self_attention"), ("distinct_madtp", "madtp")):
        args = (case.tokens, stats, case.guidance)
        scores = scorers[name](case.spec)(*args)
        product = scorers[of](case.spec)(*args) * scorers["distinct"](case.spec)(*args)
        for i in range(case.batch):
            rows = (case.tokens.layout.instance == i) & case.tokens.free
            if (product[rows] >= 0).all() and product[rows].sum() > 1e-3:
                assert_close(scores[rows], product[rows] / product[rows].sum(), rtol=1e-3, atol=1e-5)


def test_what_resembles_is_not_learned_and_what_is_shared_is():
    x = torch.randn(2, 5, DIM, requires_grad=True)
    tokens, received = PackedTokens.pack(x), torch.rand(10, requires_grad=True)
    assert not scorers["distinct"](SPEC)(tokens, AttentionStats(), None).requires_grad
    scores = scorers["distinct_attention"](SPEC)(tokens, AttentionStats(Stat.RECEIVED, {Stat.RECEIVED: received}), None)
    scores[0].backward()
    assert received.grad is not None
    assert received.grad[:5].abs().min() > 0
    assert x.grad is None


def test_tokens_that_say_nothing_are_alike():
    """Constant tokens have no direction; they are copies of each other all the same."""
    tokens = PackedTokens.pack(torch.arange(4.0)[None, :, None].expand(1, 4, DIM))
    assert_close(scorers["distinct"](SPEC)(tokens, AttentionStats(), None), torch.full((4,), 0.25))


@pytest.mark.parametrize("name", ["distinct", "distinct_attention", "distinct_madtp"])
@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_a_width_that_is_none(name, width):
    with pytest.raises(ValueError, match="must be above 0"):
        scorers[name](SPEC, width=width)
