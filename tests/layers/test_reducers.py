"""What a merged token is made of; the invariants cover the rest."""

from __future__ import annotations

import pytest
import torch
from strategies import DIM, HEADS, generator
from torch.testing import assert_close

from vltprune import AttentionStats, BlockSpec, PackedTokens, reducers
from vltprune.checks.cases import random_stats
from vltprune.layers import Top

SPEC = BlockSpec("image", 0, 4, DIM, HEADS, has_summary=True)


def reduce(name, scores, counts, x=None, protected=None, **args):
    """Tokens in a uniform batch: scores [batch, n]."""
    scores = torch.as_tensor(scores)
    x = torch.randn(*scores.shape, 3, generator=generator(0)) if x is None else x
    tokens = PackedTokens.pack(x, protected=protected)
    selection = Top(SPEC)(tokens, scores.flatten(), torch.tensor(counts), AttentionStats())
    plan = reducers[name](SPEC, **args)(tokens, scores.flatten(), selection, AttentionStats())
    return tokens, plan, plan.tokens(tokens)


def test_fuse_is_the_score_weighted_mean_of_the_rest():
    scores = torch.tensor([[9.0, 0.1, 0.4, 0.3, 0.2], [9.0, 0.5, 0.4, 0.0, 0.2]])
    tokens, plan, out = reduce("fuse", scores, [2, 3], protected=torch.arange(5) == 0)
    x = tokens.x.view(2, 5, 3)
    assert out.layout.lengths == (4, 5)
    merged = (0.1 * x[0, 1] + 0.2 * x[0, 4]) / (0.1 + 0.2 + 1e-8)
    assert_close(out.x[:4], torch.stack([x[0, 0], x[0, 2], x[0, 3], merged]), rtol=1e-6, atol=1e-6)
    assert out.position[:4].tolist() == [0, 2, 3, 4]
    assert out.size[:4].tolist() == [1, 1, 1, 2]
    assert plan.provenance()[:5].tolist() == [0, 3, 1, 2, 3]


def test_fuse_without_dividing():
    """EViT, equation 3: the plain weighted sum. It does not commute with affine maps, and says so."""
    scores = torch.tensor([[0.5, 0.1, 0.2]])
    tokens, plan, out = reduce("fuse", scores, [1], normalize=False)
    assert_close(out.x[1], 0.1 * tokens.x[1] + 0.2 * tokens.x[2])
    assert not plan.is_affine
    assert reduce("fuse", scores, [1])[1].is_affine


@pytest.mark.parametrize(
    "rest", [[0.0, 0.0, 0.0], [-1.0, -2.0, -3.0], [1.0, -1.0, 0.0], [1.0, -0.9999, 0.0], [1e-9, 1e-9, 1e-9]]
)
def test_fuse_takes_the_mean_where_scores_do_not_sum_to_something(rest):
    tokens, _, out = reduce("fuse", [[5.0, *rest]], [1])
    assert_close(out.x[1], tokens.x[1:].mean(0))


def test_weights_are_of_what_is_merged_and_one_elsewhere():
    _, plan, _ = reduce("fuse", [[5.0, 1.0, 3.0], [5.0, 0.0, 0.0]], [1, 3])
    assert_close(plan.sums.weight, torch.tensor([1, 0.25, 0.75, 1, 1, 1]))


def test_a_merged_token_is_all_there_whatever_was_left_of_its_sources():
    """In soft training; what stays is there in part, as before."""
    tokens = PackedTokens.pack(torch.randn(2, 4, 3))
    tokens = tokens.with_keep_prob(torch.tensor([0.9, 0.1, 0.2, 0.8, 0.7, 0.6, 0.5, 0.4]))
    scores, counts = torch.tensor([4.0, 1, 2, 3, 4, 3, 2, 1]), torch.tensor([2, 4])
    selection = Top(SPEC)(tokens, scores, counts, AttentionStats())
    out = reducers["fuse"](SPEC)(tokens, scores, selection, AttentionStats()).tokens(tokens)
    assert out.position.tolist() == [0, 2, 3, 0, 1, 2, 3]
    for share in (out.keep_prob, out.counted_prob):
        assert_close(share, torch.tensor([0.9, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4]))


@pytest.mark.parametrize("scale", [1e-4, 1e30])
def test_fuse_does_not_care_for_the_scale_of_scores(scale):
    scores = torch.tensor([[5.0, 0.1, 0.2, 0.7]])
    _, _, plain = reduce("fuse", scores, [1])
    _, _, scaled = reduce("fuse", scores * scale, [1])
    assert_close(scaled.x, plain.x, rtol=2e-4, atol=1e-5)


def plan_of(name, tokens, scores, counts):
    selection = Top(SPEC)(tokens, scores, torch.tensor(counts), AttentionStats())
    reducer, stats = reducers[name](SPEC), random_stats(tokens.layout.total, 1000, generator(0))
    return reducer(tokens, scores, selection, AttentionStats(reducer.needs, stats.values))


def test_fuse_sends_gradients_to_the_scores():
    x = torch.randn(1, 4, 3)
    scores = torch.tensor([0.4, 0.1, 0.2, 0.3], requires_grad=True)
    tokens = PackedTokens.pack(x)
    plan = plan_of("fuse", tokens, scores, [2])
    plan.tokens(tokens).x.square().sum().backward()
    assert (scores.grad[[1, 2]] != 0).all()
    assert (scores.grad[[0, 3]] == 0).all()


def test_ties_go_to_the_earlier_token():
    _, plan, out = reduce("drop", [[1.0, 1.0, 1.0, 1.0]], [2])
    assert out.position.tolist() == [0, 1]
    assert out.size is None
    assert plan.provenance().tolist() == [0, 1, -1, -1]


@pytest.mark.parametrize("name", reducers.names())
def test_everything_protected_stays(name):
    tokens = PackedTokens.pack(torch.randn(2, 3, DIM), protected=torch.tensor(True))
    assert plan_of(name, tokens, torch.zeros(6), [0, 0]) is None
