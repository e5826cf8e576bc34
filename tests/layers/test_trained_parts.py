"""Keepers and scorers of trained methods against their formulas, one instance at a time."""

from __future__ import annotations

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from strategies import DIM, cases, generator, packed
from torch.testing import assert_close

from vltprune import AttentionStats, BlockSpec, Layout, PackedTokens, keepers, scorers

SPEC = BlockSpec("image", 1, 4, DIM, 2, has_summary=True)


@given(cases(), st.floats(0, 3), st.floats(-0.5, 0.5), st.booleans(), st.integers(0, 3))
def test_rising_threshold(case, final, learned, relative, depth):
    """LTP: theta_l = final l / L + learned, in units of the mean attention 1 / n where it is relative."""
    keeper = keepers["rising_threshold"](dataclasses.replace(case.spec, depth=depth), final, relative)
    with torch.no_grad():
        keeper.learned.fill_(learned)
    counts = keeper(case.scores, case.tokens, None)
    margins = keeper.margin(case.scores, case.tokens, None).split(case.tokens.layout.lengths)
    parts = zip(
        case.scores.split(case.tokens.layout.lengths), case.tokens.free.split(case.tokens.layout.lengths), strict=True
    )
    for i, (scores, free) in enumerate(parts):
        theta = final * (depth + 1) / case.spec.depths + keeper.learned.item()
        theta = theta / len(scores) if relative else theta
        if any(abs(score - theta) < 1e-4 * (abs(score) + abs(theta)) for score in scores.tolist()):
            continue  # a tie: which side it falls on is rounding
        above = [score > theta for score, is_free in zip(scores.tolist(), free.tolist(), strict=True) if is_free]
        assert int(counts[i]) == sum(above)
        assert ((margins[i] > 0)[free]).tolist() == above


def test_the_margin_is_in_standard_deviations_and_has_a_gradient_to_the_learned_threshold():
    tokens = PackedTokens.pack(torch.zeros(1, 4, DIM))
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
    keeper = keepers["rising_threshold"](SPEC, final=1.0)
    deviation = scores.detach().var(unbiased=False).sqrt()
    margin = keeper.margin(scores, tokens, None)
    assert_close(margin, (scores - 1.0 * 2 / 4 / 4) / deviation, rtol=1e-4, atol=1e-5)
    to_scores, to_threshold = torch.autograd.grad(margin.sum(), [scores, keeper.learned])
    assert_close(to_scores, torch.ones(4) / deviation, rtol=1e-4, atol=1e-4)
    assert_close(to_threshold, -1 / deviation, rtol=1e-4, atol=1e-4)


@given(cases(), st.floats(-1, 1))
def test_above(case, threshold):
    counts = keepers["above"](case.spec, threshold)(case.scores, case.tokens, None)
    for i, rows in enumerate(torch.arange(case.tokens.layout.total).split(case.tokens.layout.lengths)):
        scores = case.scores[rows][case.tokens.free[rows]]
        if not (scores - threshold).abs().lt(1e-4).any():
            assert int(counts[i]) == int((scores > threshold).sum())
    assert_close(keepers["above"](case.spec, threshold).margin(case.scores, case.tokens, None), case.scores - threshold)


def test_a_sample_stays_as_often_as_its_probability_says():
    """Logistic noise on the logit: hardened, a token stays in a share of samples that is its score."""
    wanted = torch.tensor([0.05, 0.3, 0.5, 0.9])
    tokens = PackedTokens.pack(torch.zeros(1, 4000, DIM))
    scores = wanted.repeat_interleave(1000)
    keeper = keepers["sampled_ratio"](SPEC, 0.5).train()
    torch.manual_seed(0)
    stays = (keeper.margin(scores, tokens, None) > 0).view(4, 1000).float().mean(1)
    assert_close(stays, wanted, rtol=0, atol=4 * math.sqrt(0.25 / 1000))
    assert_close(keeper.eval().margin(scores, tokens, None).sigmoid(), scores)
    assert keeper(scores, tokens, None).tolist() == [2000]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 99), st.booleans())
def test_predictor(lengths, seed, has_summary):
    """DynamicViT's network, one instance and one token at a time."""
    g, layout = generator(seed), Layout(tuple(lengths))
    tokens = packed(layout, DIM, 0.2, has_summary, False, 1.0, g)
    tokens = tokens.with_keep_prob(0.1 + 0.9 * torch.rand(layout.total, generator=g))
    part = scorers["predictor"](SPEC)
    scores = part(tokens, AttentionStats(), None)
    norm, first, _ = part.halves
    linear = [layer for layer in part.logits if isinstance(layer, torch.nn.Linear)]

    def halves(x):
        centered = (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt()
        y = torch.nn.functional.gelu(first.weight @ (centered * norm.weight + norm.bias) + first.bias)
        return y[: DIM // 2], y[DIM // 2 :]

    start = 0
    for n in lengths:
        rows = [row for row in range(start, start + n) if tokens.free[row]]
        shared = [tokens.keep_prob[row] * halves(tokens.x[row])[1] for row in rows]
        for row in rows:
            mean = sum(shared) / sum(tokens.keep_prob[row] for row in rows)
            y = torch.cat([halves(tokens.x[row])[0], mean])
            for i, layer in enumerate(linear):
                y = layer.weight @ y + layer.bias
                y = torch.nn.functional.gelu(y) if i < 2 else y
            assert_close(scores[row], y[0].exp() / y.exp().sum(), rtol=1e-4, atol=1e-6)
        start += n


def test_the_cost_of_the_predictor_is_that_of_its_layers_and_its_mean():
    part = scorers["predictor"](SPEC)
    per_token = DIM * DIM + DIM * DIM // 2 + (DIM // 2) * (DIM // 4) + (DIM // 4) * 2 + DIM // 2
    assert part.macs(torch.tensor([5, 7]), torch.tensor([2, 3])).tolist() == [5 * per_token, 7 * per_token]


def test_halting_sums_over_the_layers():
    """A-ViT: a token leaves at the first layer where the sum of its halting probabilities reaches 1 - eps."""
    layers = torch.randn(5, 9, DIM, generator=generator(3)) + 2
    part, keeper = scorers["halting"](SPEC, gain=2.0, center=4.5, eps=0.02), keepers["above"](SPEC)
    tokens, remembered = PackedTokens.pack(layers[0][None]), None
    for layer in range(5):
        tokens = tokens.with_x(layers[layer])
        tokens = tokens if remembered is None else tokens.with_column("halting", remembered)
        remembered = part(tokens, AttentionStats(), None)
        sums = [sum(1 / (1 + math.exp(4.5 - 2 * layers[k, j, 0].item())) for k in range(layer + 1)) for j in range(9)]
        assert_close(remembered, torch.tensor([math.log(0.98 / one) for one in sums]), rtol=1e-4, atol=1e-5)
        assert keeper(remembered, tokens, None).tolist() == [sum(one < 0.98 for one in sums)]
        assert_close(part.remaining(tokens.with_column("halting", remembered)), 0.98 - torch.tensor(sums))


def test_halting_probabilities_far_below_1_are_told_apart():
    """In single precision 0.99 - exp(-30) is 0.99."""
    x = torch.zeros(1, 3, DIM)
    x[0, :, 0] = torch.tensor([-4.0, -3.9, -20.0])
    scores = scorers["halting"](SPEC)(PackedTokens.pack(x), AttentionStats(), None)
    assert_close(scores, math.log(0.99) + torch.tensor([30.0, 29.5, 110.0]))


@pytest.mark.parametrize(
    ("kind", "name", "args", "text"),
    [
        (keepers, "rising_threshold", {"final": -1.0}, r"final=-1.0\) must be 0 or more and finite"),
        (keepers, "above", {"threshold": math.nan}, r"threshold=nan\) must be finite"),
        (keepers, "sampled_ratio", {"ratio": 1.5}, "must lie in 0 .. 1"),
        (scorers, "halting", {"gain": 0.0}, "the gain not 0"),
        (scorers, "halting", {"eps": 1.0}, r"must lie in \[0, 1\)"),
    ],
)
def test_refusals(kind, name, args, text):
    with pytest.raises(ValueError, match=text):
        kind[name](SPEC, **args)


def test_a_predictor_of_narrow_tokens_is_refused():
    with pytest.raises(ValueError, match="halves the width of tokens twice: 2 is below 4"):
        scorers["predictor"](dataclasses.replace(SPEC, dim=2))
