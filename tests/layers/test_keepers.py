"""Each keeper against what it promises, edges included."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DIM, HEADS, cases, generator, packed, values_of
from torch.testing import assert_close

from vltprune import AttentionStats, BlockSpec, Guidance, Layout, PackedTokens, Pruner, TokenScorer, keepers
from vltprune.layers import Distortion, Drop, Threshold, Top

SPEC = BlockSpec("image", 0, 4, DIM, HEADS, has_summary=True)


def naive_threshold(scores, affinity, tau, power, sparse):
    """DTP for one instance, as the method states it: how many of its unprotected tokens stay."""
    if len(scores) == 0:
        return 0
    logits, scores = affinity.double() / tau, scores.double()
    weight = sparsemax(logits) if sparse else logits.softmax(0)
    theta = (weight * scores[:, None]).sum(0).min()
    if (scores - theta).abs().min() < 1e-6 * theta.abs():
        return None  # a tie: which side it falls on is rounding
    n = int((scores > theta).sum())
    n = len(scores) if n < 1 or len(scores) - n <= 1 else n
    return math.ceil(len(scores) * (n / len(scores)) ** power - 1e-9)


def sparsemax(z):
    """By bisection on the threshold, independent of any sorting."""
    low, high = z.amax(0) - 1, z.amax(0)
    for _ in range(200):
        middle = (low + high) / 2
        above = (z - middle).clamp(min=0).sum(0) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (z - high).clamp(min=0)


@given(cases(), st.floats(-6, 6).map(lambda power: 10**power), st.just(1.0) | values_of(Threshold.knob))
def test_threshold(case, tau, power):
    counts = Threshold(case.spec, temperature=tau, power=power)(case.scores, case.tokens, case.guidance)
    for i in range(case.batch):
        rows = (case.tokens.layout.instance == i) & case.tokens.free
        sparse = case.guidance.attend == "sparsemax"
        expected = naive_threshold(case.scores[rows], case.guidance.affinity[rows], tau, power, sparse)
        assert expected is None or counts[i] == expected


def test_threshold_between_its_extremes():
    """Hot, the threshold is the mean score; cold, the weakest of the scores that the anchors look at."""
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 12.0])
    tokens = PackedTokens.pack(torch.zeros(1, 6, DIM))
    affinity = torch.zeros(6, 2)
    affinity[4, 0] = affinity[2, 1] = 1.0  # one anchor looks at score 5, the other at score 3
    guidance = Guidance(affinity, tokens)
    assert Threshold(SPEC, 1e6)(scores, tokens, guidance).item() == 2
    assert Threshold(SPEC, 1e-6)(scores, tokens, guidance).item() == 3


@pytest.mark.parametrize(("scores", "expected"), [([1.0] * 5, 5), ([0.0, 2.0, 2.0, 2.0], 4), ([0.0, 0.0, 2.0, 2.0], 2)])
def test_threshold_prunes_nothing_where_none_would_stay_or_one_would_go(scores, expected):
    tokens = PackedTokens.pack(torch.zeros(1, len(scores), DIM))
    counts = Threshold(SPEC, 1e6)(torch.tensor(scores), tokens, Guidance(torch.zeros(len(scores), 2), tokens))
    assert counts.tolist() == [expected]


@given(cases(), st.floats(0.1, 3), st.floats(0.1, 5), st.integers(0, 4))
def test_what_decays_from_block_to_block(case, decay, power, before):
    """Behind i others a decayed keeper does what one without does at power or error times decay^i, at a share to that power."""
    spec = dataclasses.replace(case.spec, before=before)
    inputs = (case.scores, case.tokens, case.guidance)
    decayed = Threshold(spec, power=power, decay=decay)(*inputs)
    assert decayed.tolist() == Threshold(spec, power=power * decay**before)(*inputs).tolist()
    ratio = 1 / (1 + power)
    decayed = keepers["ratio"](spec, ratio=ratio, decay=decay)(*inputs)
    assert decayed.tolist() == keepers["ratio"](spec, ratio=ratio ** (decay**before))(*inputs).tolist()
    error = ratio / max(1, decay**before)  # at most 1 where it grows, too
    decayed = Distortion(spec, error=error, decay=decay)(*inputs)
    assert decayed.tolist() == Distortion(spec, error=error * decay**before)(*inputs).tolist()


@pytest.mark.parametrize(
    ("scores", "counts"),
    [
        ([[0, 0, 0, 0, 0, 9], [0, 0, 0, 9, 9, 9]], [1, 3]),
        ([[0, 0, 0, 0, 0, 9], [1, 1, 1, 1, 1, 1]], [1, 6]),  # none above the threshold: then all
        ([[0, 0, 0, 0, 0, 9], [0, 9, 9, 9, 9, 9]], [1, 6]),  # all but one: then all
    ],
)
def test_threshold_counts_each_instance_by_itself(scores, counts):
    """What is above the instance's own threshold stays, whatever batch mates have; all stay where at most one would go."""
    scores = torch.tensor(scores).float()
    tokens = PackedTokens.pack(torch.zeros(2, 6, DIM))
    guidance = Guidance(torch.zeros(12, 2), tokens)
    assert Threshold(SPEC)(scores.flatten(), tokens, guidance).tolist() == counts


@pytest.mark.parametrize(
    ("name", "args", "kept"), [("threshold", {"temperature": 1e6}, 2), ("learned", {"threshold": 0.0}, 2)]
)
def test_what_a_protected_token_scores_counts_for_nothing(name, args, kept):
    """It is above any threshold here, and there is one token fewer to keep."""
    tokens = PackedTokens.pack(torch.zeros(1, 7, DIM), protected=torch.arange(7) == 0)
    scores = torch.tensor([99.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0])
    assert keepers[name](SPEC, **args)(scores, tokens, Guidance(torch.zeros(7, 2), tokens)).tolist() == [kept]


def _margin(power, scores):
    """`threshold`'s margins of six tokens that two anchors look at, of scores [6]; and the logits they are read off."""
    tokens = PackedTokens.pack(torch.zeros(1, 6, DIM))
    affinity = torch.randn(6, 2, generator=generator(0)).requires_grad_()
    return Threshold(SPEC, power=power).margin(scores, tokens, Guidance(affinity, tokens)), affinity


def test_where_a_threshold_prunes_nothing_all_is_there_entirely():
    """However soft training is: the sigmoid of each margin is 1, for scores that tie as for others."""
    for scores in (torch.ones(6), torch.tensor([0.0, 9, 9, 9, 9, 9])):
        assert (_margin(1.0, scores)[0] / 10).sigmoid().tolist() == [1.0] * 6
    assert (_margin(1.0, torch.tensor([0.0, 0, 0, 9, 9, 9]))[0].sigmoid() < 1).all()


def test_a_power_moves_the_threshold_and_leaves_it_its_gradients():
    """Where the counts cut is a number that nothing is learned from; what is learned is the threshold that they came from."""
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 12.0], requires_grad=True)
    found = []
    for power in (1.0, 0.5):
        margin, affinity = _margin(power, scores)
        found.append((margin, *torch.autograd.grad(margin[0], [scores, affinity])))
    (plain, *right), (moved, *gradients) = found
    assert (plain > 0).sum() < (moved > 0).sum() < 6
    assert right[1].abs().max() > 0
    assert_close(gradients[1], right[1])


def test_scores_that_are_equal_but_for_rounding_are_a_tie_that_prunes_nothing():
    """Of 64 equal tokens a matrix product in single precision may score one higher in the last digits, or all but one."""
    tokens = PackedTokens.pack(torch.zeros(3, 64, DIM))
    scores = torch.full((3, 64), 0.013)
    scores[0, 5], scores[1, 6:] = 0.013 * (1 + 1e-5), 0.013 * (1 + 1e-5)
    scores[2, :32] = 0.013 * (1 + 4e-5)

    class Told(TokenScorer):
        def forward(self, tokens, stats, guidance):
            return scores.flatten()

    pruner = Pruner(Told(SPEC), Threshold(SPEC), Top(SPEC), Drop(SPEC))
    plan = pruner(tokens, AttentionStats(), Guidance(torch.zeros(192, 2), tokens)).plan
    assert plan.layout.lengths == (64, 64, 32)


@given(cases(), st.floats(0, 1))
def test_top_p_keeps_the_fewest_that_reach_the_share(case, p):
    counts = keepers["top_p"](case.spec, p=p)(case.scores, case.tokens, None)
    for i in range(case.batch):
        rows = (case.tokens.layout.instance == i) & case.tokens.free
        scores = case.scores[rows].double().clamp(min=0).sort(descending=True).values
        kept = min(int(counts[i]), len(scores))
        if p == 1 or len(scores) == 0:
            assert kept == len(scores)
            continue
        assert kept >= 1
        assert scores[:kept].sum() >= p * scores.sum() * (1 - 6e-5)
        assert kept == 1 or scores[: kept - 1].sum() <= p * scores.sum() * (1 + 1e-6)


def test_top_p_counts_what_matters():
    tokens = PackedTokens.pack(torch.zeros(2, 8, DIM))
    scores = torch.tensor([8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0] + [1.0] * 8)
    for p, expected in ((0.0, [1, 1]), (0.5, [1, 4]), (0.8, [5, 7]), (1.0, [8, 8])):
        assert keepers["top_p"](SPEC, p)(scores, tokens, None).tolist() == expected


@pytest.mark.parametrize("off", [-1e-5, 0.0, 1e-5])
def test_a_sum_that_is_the_share_but_for_rounding_reaches_it(off):
    tokens = PackedTokens.pack(torch.zeros(1, 5, DIM))
    scores = torch.tensor([1 / 2, 1 / 2, 1 / 3 + off, 1 / 3, 1 / 3])
    assert keepers["top_p"](SPEC, 0.5)(scores, tokens, None).tolist() == [2]


def naive_lost(scores, x):
    """What each unprotected token of one instance takes with it, in double."""
    z = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() / x.shape[1] ** 0.5
    p = scores.clamp(min=0) + 1e-12
    p = p / p.sum()
    return p * (z - p @ z).square().sum(1)


@given(cases(), st.floats(0, 1))
def test_distortion_keeps_the_fewest_that_leave_the_error(case, error):
    counts = Distortion(case.spec, error)(case.scores, case.tokens, None)
    for i in range(case.batch):
        rows = (case.tokens.layout.instance == i) & case.tokens.free
        if not rows.any():
            assert counts[i] == 0
            continue
        lost = naive_lost(case.scores[rows].double(), case.tokens.x[rows].double())
        lost = lost[case.scores[rows].argsort(descending=True, stable=True)]
        kept = int(counts[i])
        assert 1 <= kept <= len(lost)
        assert lost[kept:].sum() <= error + 1e-5
        assert kept == 1 or lost[kept - 1 :].sum() > error - 1e-5


def test_distortion_counts_what_differs():
    """Of tokens that are all alike one stands for all; of the others, as many as would be missed."""
    alike = torch.eye(DIM)[:1].expand(6, DIM)
    apart = torch.eye(DIM)[:6]
    two_sorts = torch.eye(DIM)[[0, 0, 0, 1, 1, 1]]
    tokens = PackedTokens.pack(torch.stack([alike, apart, two_sorts]))
    for error, expected in ((0.1, [1, 6, 5]), (0.3, [1, 5, 3])):
        assert Distortion(SPEC, error)(torch.ones(18), tokens, None).tolist() == expected


@pytest.mark.parametrize(
    ("n", "ratio", "expected"),
    [
        (10, 0.7, 7),
        (10, 0.1 + 0.2, 3),
        (10, 0.0, 0),
        (10, 1.0, 10),
        (1, 0.5, 1),
        (3, 1e-9, 1),
        (196, 0.7, 138),
        (0, 0.7, 0),
    ],
)
def test_ratio_rounds_up_and_only_up(n, ratio, expected):
    tokens = PackedTokens.pack(torch.zeros(1, n + 1, DIM), protected=torch.arange(n + 1) == 0)
    assert keepers["ratio"](SPEC, ratio)(torch.zeros(n + 1), tokens, None).tolist() == [expected]


@given(cases())
def test_count(case):
    free = [int(part.sum()) for part in case.tokens.free.split(case.tokens.layout.lengths)]
    for count in (0, 2, 100):
        counts = keepers["count"](case.spec, count)(case.scores, case.tokens, None)
        assert counts.tolist() == [min(n, count) for n in free]


@given(cases(), st.floats(0, 12) | st.integers(0, 12))
def test_remove(case, r):
    """As many as r on average over blocks, at most half of each instance, and half of it where r is larger."""
    free = [int(part.sum()) for part in case.tokens.free.split(case.tokens.layout.lengths)]
    wanted = [math.floor((i + 1) * r) - math.floor(i * r) for i in range(4)]
    assert abs(sum(wanted) - 4 * r) <= 1 and all(abs(one - r) < 1 for one in wanted)
    for i, removed in enumerate(wanted):
        counts = keepers["remove"](dataclasses.replace(case.spec, before=i), r)(case.scores, case.tokens, None)
        assert counts.tolist() == [n - min(removed, n // 2) for n in free]


def test_random_ratio_is_uniform_in_its_range():
    """400 instances of 100 tokens: uniform in 0.5 +- 0.2, none outside."""
    layout = Layout((100,) * 400)
    tokens = packed(layout, DIM, 0.0, False, False, 1.0, generator(0))

    def share(depth=0, **args):
        spec = dataclasses.replace(SPEC, depth=depth)
        return keepers["random_ratio"](spec, 0.5, 0.2, **args)(tokens.x[:, 0], tokens, None) / 100

    drawn = share()
    assert drawn.min() >= 0.3
    assert drawn.max() <= 0.7
    deviation = 0.4 / math.sqrt(12)
    assert_close(drawn.mean(), torch.tensor(0.505), rtol=0, atol=5 * deviation / 20)  # rounding up adds half a token
    assert abs(drawn.std().item() - deviation) < 0.015
    for other in (share(depth=1), share(seed=1)):
        assert torch.corrcoef(torch.stack([drawn, other]))[0, 1].abs() < 0.25


def test_random_ratio_of_width_zero_is_ratio():
    tokens = packed(Layout((7, 1, 30)), DIM, 0.2, True, False, 1.0, generator(0))
    for mean in (0.0, 0.3, 1.0):
        drawn = keepers["random_ratio"](SPEC, mean=mean, half_width=0.0)(tokens.x[:, 0], tokens, None)
        assert drawn.tolist() == keepers["ratio"](SPEC, mean)(tokens.x[:, 0], tokens, None).tolist()


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("threshold", {"temperature": 0.0}, r"temperature=0.0\) must be above 0"),
        ("threshold", {"temperature": -1.0}, "must be above 0"),
        ("threshold", {"temperature": float("nan")}, "must be above 0"),
        ("threshold", {"power": 0.0}, r"power=0.0\) must be above 0 and finite"),
        ("threshold", {"decay": 0.0}, r"threshold\(decay=0.0\) must be above 0 and finite"),
        ("distortion", {"decay": -1.0}, r"distortion\(decay=-1.0\) must be above 0 and finite"),
        ("ratio", {"decay": float("inf")}, r"ratio\(decay=inf\) must be above 0 and finite"),
        ("threshold", {"knob": "both"}, "write knob='power' or knob='temperature'"),
        ("top_p", {"p": 1.1}, r"top_p\(p=1.1\) must lie in 0 .. 1"),
        ("ratio", {"ratio": 1.5}, r"ratio\(ratio=1.5\) must lie in 0 .. 1"),
        ("ratio", {"ratio": float("nan")}, "must lie in 0 .. 1"),
        ("count", {"count": -1}, r"count\(count=-1\) must be 0 or more"),
        ("counts", {"counts": (4, -1)}, r"counts=\(4, -1\)\) must be whole numbers of 0 or more"),
        (
            "counts",
            {"counts": 8},
            r"counts\(counts=8\) .*: write counts\(\(64, 32, 32\)\), or count\(32\) for the same",
        ),
        ("counts", {"counts": "8"}, r"counts\(counts='8'\) must be whole numbers"),
        ("remove", {"r": -1.0}, r"remove\(r=-1.0\) must be 0 or more and finite"),
        ("random_ratio", {"mean": 2.0}, "both must lie in 0 .. 1"),
        ("random_ratio", {"half_width": -0.1}, "both must lie in 0 .. 1"),
    ],
)
def test_refusals(name, args, text):
    with pytest.raises(ValueError, match=text):
        keepers[name](SPEC, **args)
