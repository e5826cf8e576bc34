"""Token choice against plain computations of the formulas, and the same for an instance alone and in any batch."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from choices import (
    DIM,
    Instance,
    argbest,
    batches,
    copies,
    cosines,
    in_order,
    instances,
    padded,
    slots,
    without_reading,
)
from hypothesis import given, settings

from vltprune.layers.algorithms import choosing, sampling

# each on a padded batch: features, candidates, counts, scores, windows
CHOICES = {
    "max_min": lambda x, c, k, s, w: choosing.max_min(x, c, k),
    "dpp": lambda x, c, k, s, w: choosing.dpp(x, c, k, s),
    "deduplicate": lambda x, c, k, s, w: choosing.deduplicate(x, c, k, s),
    "deduplicate, all": lambda x, c, k, s, w: choosing.deduplicate(x, c, k, s, important=0.0),
    "pivots": lambda x, c, k, s, w: choosing.pivots(x, c, k, s, number=2),
    "sample_cdf": lambda x, c, k, s, w: sampling.sample_cdf(s, c, k),
    "windows": lambda x, c, k, s, w: sampling.windows(s, c, k, w),
    "windows, local scores": lambda x, c, k, s, w: sampling.windows(s, c, k, w, 1 - s, local=0.8),
    "spread_uniform": lambda x, c, k, s, w: sampling.spread_uniform(c, k),
}
FEWER = ["sample_cdf"]

every_choice = pytest.mark.parametrize("name", CHOICES)


@every_choice
@settings(max_examples=10)
@given(batch=batches, seed=st.integers(0, 99))
def test_an_instance_alone_and_in_any_batch(name, batch, seed):
    """Alone, padded beside others, and with the batch in another order: bit for bit the same choice."""
    choose = CHOICES[name]
    longest = max(len(one.features) for one in batch) + seed % 3
    together = choose(*padded(batch, longest))
    order = np.random.default_rng(seed).permutation(len(batch))
    shuffled = choose(*padded([batch[i] for i in order], longest))
    assert torch.equal(shuffled, together[torch.from_numpy(order)])
    for one, keep in zip(batch, together, strict=True):
        alone = choose(*padded([one], len(one.features)))[0]
        assert torch.equal(keep[: len(alone)], alone)
        assert not keep[len(alone) :].any()


@every_choice
@settings(max_examples=10)
@given(one=instances())
def test_only_candidates_and_at_most_counts(name, one):
    keep = CHOICES[name](*padded([one], len(one.features)))[0]
    assert not (keep & ~one.candidates).any()
    wanted = min(one.count, int(one.candidates.sum()))
    assert min(wanted, 1) <= keep.sum() <= wanted
    if name not in FEWER or one.count >= one.candidates.sum():
        assert keep.sum() == wanted


@settings(max_examples=10)
@given(batch=batches)
def test_a_known_largest_count_changes_nothing(batch):
    features, candidates, counts, scores, _ = padded(batch, 9)
    for most in (int(counts.max()), 12):
        for choose, args in (
            (choosing.max_min, (features, candidates, counts)),
            (choosing.dpp, (features, candidates, counts, scores)),
            (choosing.deduplicate, (features, candidates, counts, scores)),
            (sampling.sample_cdf, (scores, candidates, counts)),
        ):
            assert torch.equal(choose(*args), choose(*args, most=most))


@every_choice
@pytest.mark.parametrize("seed", range(5))
def test_rounding_does_not_decide(name, seed):
    """Copies that differ in their last digits, and scores too: the same choice."""
    assert torch.equal(CHOICES[name](*copies(seed, 1e-6)), CHOICES[name](*copies(seed, 0.0)))


@every_choice
def test_no_waiting_for_a_device(name):
    without_reading(CHOICES[name])


@every_choice
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast(name, dtype):
    """The features of half precision, computed in single: those of their values in single precision."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 30, DIM, generator=g).to(dtype)
    scores = torch.rand(2, 30, generator=g).to(dtype)
    rest = torch.ones(2, 30, dtype=torch.bool), torch.tensor([7, 12])
    windows = torch.arange(30).expand(2, -1) // 5
    single = CHOICES[name](features.float(), *rest, scores.float(), windows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CHOICES[name](features, *rest, scores, windows), single)


@every_choice
def test_copies_zeros_and_nothing(name):
    """All tokens equal, all zero, one candidate, none, and no token at all."""
    choose = CHOICES[name]
    for features in (torch.ones(1, 6, DIM), torch.zeros(1, 6, DIM)):
        for candidates in (torch.ones(1, 6).bool(), torch.arange(6)[None] == 4, torch.zeros(1, 6).bool()):
            keep = choose(features, candidates, torch.tensor([3]), torch.ones(1, 6), torch.zeros(1, 6).long())
            assert int(keep.sum()) <= min(3, int(candidates.sum()))
            assert not (keep & ~candidates).any()
    nothing = torch.zeros(1, 0)
    empty = choose(torch.zeros(1, 0, DIM), nothing.bool(), torch.tensor([3]), nothing, nothing.long())
    assert empty.shape == (1, 0)


def max_min_of(one):
    similarity, left = cosines(one.features), slots(one.candidates)
    chosen: list[int] = []
    while left and len(chosen) < one.count:
        others = chosen if chosen else None
        margins = [
            min((1 - similarity[i, j] for j in (others if others is not None else left) if j != i), default=9.0)
            for i in left
        ]
        chosen.append(left.pop(argbest(margins)))
    return sorted(chosen)


@given(one=instances(longest=14))
def test_max_min(one):
    """DivPrune: first by the second-smallest distance, its own included; then by that to the nearest chosen one."""
    keep = choosing.max_min(*padded([one], len(one.features))[:3])[0]
    assert slots(keep) == max_min_of(one)


def dpp_of(one):
    """Brute force: each choice by the determinants of the kernel with every token that is left."""
    similarity, left = cosines(one.features), slots(one.candidates)
    if not left:
        return []
    values = one.scores.double().numpy()
    low, high = values[left].min(), values[left].max()
    r = (values - low) / (high - low if high > low else 1.0) + 1e-6
    chosen: list[int] = []
    while left and len(chosen) < one.count:
        # determinants divided by the relevance of the chosen, which all have in common, and of each token by its own
        grown = [np.linalg.det(similarity[np.ix_([*chosen, i], [*chosen, i])]) for i in left]
        before = np.linalg.det(similarity[np.ix_(chosen, chosen)]) if chosen else 1.0
        gains = [volume / before if volume / before > 1e-7 else 0.0 for volume in grown]
        if not any(gains):
            best = in_order([values[i] for i in left])
            chosen += [left[i] for i in best[: one.count - len(chosen)]]
            break
        gains = [gain * r[i] ** 2 for gain, i in zip(gains, left, strict=True)]
        chosen.append(left.pop(next(n for n, gain in enumerate(gains) if gain >= max(gains) * (1 - 2e-5))))
    return sorted(chosen)


@given(one=instances(longest=12))
def test_dpp(one):
    """CDPruner: greedy determinants; beyond the rank of the kernel, 5 here, the tokens of largest score."""
    keep = choosing.dpp(*padded([one], len(one.features))[:4])[0]
    assert slots(keep) == dpp_of(one)


@settings(max_examples=5)
@given(seed=st.integers(0, 999))
def test_dpp_of_many_dimensions(seed):
    """A kernel of full rank, every token of which is chosen by its determinant."""
    g = torch.Generator().manual_seed(seed)
    one = instances_of(torch.randn(24, 32, generator=g), torch.rand(24, generator=g), 13)
    assert slots(choosing.dpp(*padded([one], 24)[:4])[0]) == dpp_of(one)


def instances_of(features, scores, count):
    n = len(features)
    return Instance(features, torch.ones(n, dtype=torch.bool), count, scores, torch.zeros(n).long())


def test_dpp_scales_scores_by_the_instance():
    """Scores of another scale beside it change nothing, and neither do a factor and an offset."""
    g = torch.Generator().manual_seed(0)
    features, scores = torch.randn(1, 20, 32, generator=g), torch.rand(1, 20, generator=g)
    everywhere = torch.ones(2, 20).bool()
    both = choosing.dpp(
        features.expand(2, -1, -1), everywhere, torch.tensor([6, 6]), torch.cat([scores, 100 * scores + 7])
    )
    assert torch.equal(both[0], both[1])


def deduplicate_of(one, important):
    """VisPruner in its own words: lists that shrink by at most 8."""
    similarity, candidates = cosines(one.features), slots(one.candidates)
    candidates = [candidates[n] for n in in_order([float(one.scores[i]) for i in candidates])]
    count = min(one.count, len(candidates))
    by_score = int(count * important)
    kept, rest = candidates[:by_score], candidates[by_score:]
    while len(rest) > count - by_score:
        a, b = rest[::2], rest[1::2]
        best = [max((similarity[i, j] for j in b), default=-2.0) for i in a]
        drop = min(8, len(rest) - (count - by_score), len(a))
        rest = [a[n] for n in in_order(best)][drop:] + b
    return sorted(kept + rest)


@pytest.mark.parametrize("important", [0.0, 0.5, 1.0])
@given(one=instances(longest=40))
def test_deduplicate(important, one):
    keep = choosing.deduplicate(*padded([one], len(one.features))[:4], important=important)[0]
    assert slots(keep) == deduplicate_of(one, important)


@pytest.mark.parametrize("number", [1, 3])
@given(one=instances(longest=14))
def test_pivots(number, one):
    """DART: for each pivot its least similar tokens of those that are left, as many of each, the first ones of one more."""
    similarity, candidates = cosines(one.features), slots(one.candidates)
    count = min(one.count, len(candidates))
    chosen = [candidates[n] for n in in_order([float(one.scores[i]) for i in candidates])][: min(number, count)]
    pivots = list(chosen)
    for n, pivot in enumerate(pivots):
        left = [i for i in candidates if i not in chosen]
        share = [len(part) for part in np.array_split(np.zeros(count - len(pivots)), len(pivots))][n]
        chosen += [left[m] for m in in_order([-similarity[pivot, i] for i in left])][:share]
    keep = choosing.pivots(*padded([one], len(one.features))[:4], number=number)[0]
    assert slots(keep) == sorted(chosen)


@given(one=instances(longest=14))
def test_sample_cdf(one):
    """ATS: the tokens whose cumulative score is nearest to each of `count` points."""
    candidates = slots(one.candidates)
    values = one.scores.double().numpy()
    order = sorted(candidates, key=lambda i: (values[i], i))
    weights = values[order] if values[order].sum() > 0 else np.ones(len(order))
    expected = set(candidates) if one.count >= len(candidates) else set()
    if candidates and 0 < one.count < len(candidates):
        cumulative = weights.cumsum() / weights.sum()
        points = np.linspace(cumulative[0], 1, one.count) if one.count > 1 else [(cumulative[0] + 1) / 2]
        expected = {order[argbest(-abs(cumulative - point))] for point in points}
    _, mask, counts, scores, _ = padded([one], len(one.features))
    keep = sampling.sample_cdf(scores, mask, counts)[0]
    # of tokens without score, which share one cumulative value, any one may stay
    assert [values[i] for i in slots(keep) if values[i] > 0] == [values[i] for i in sorted(expected) if values[i] > 0]
    assert {i for i in slots(keep) if values[i] > 0} == {i for i in expected if values[i] > 0}


@pytest.mark.parametrize("local", [0.0, 0.5, 1.0])
@given(one=instances(longest=20))
def test_windows(local, one):
    """VScan: the best of each window by its quota, and the best of all others until there are `count`."""
    candidates, inside = slots(one.candidates), 1 - one.scores
    windows = {int(one.windows[i]): [] for i in candidates}
    for i in candidates:
        windows[int(one.windows[i])].append(i)
    count = min(one.count, len(candidates))
    quota = int(count * local) // max(len(windows), 1)
    chosen = []
    for ids in windows.values():
        chosen += [ids[n] for n in in_order([float(inside[i]) for i in ids])][:quota]
    left = [i for i in candidates if i not in chosen]
    chosen += [left[n] for n in in_order([float(one.scores[i]) for i in left])][: count - len(chosen)]
    _, mask, counts, scores, ids = padded([one], len(one.features))
    assert slots(sampling.windows(scores, mask, counts, ids, 1 - scores, local)[0]) == sorted(chosen)


@given(one=instances(longest=20))
def test_spread_uniform(one):
    """VisionZip: every step-th, the first `count` of them."""
    candidates = slots(one.candidates)
    step = max(1, len(candidates) // max(one.count, 1))
    _, mask, counts, *_ = padded([one], len(one.features))
    assert slots(sampling.spread_uniform(mask, counts)[0]) == candidates[::step][: one.count]


@given(batch=batches, multiplier=st.sampled_from([1.5, 0.0, -1.25, 4.0]))
def test_outliers(batch, multiplier):
    """PruMerge's count, of each instance by itself; equal scores have none."""
    longest = max(len(one.features) for one in batch)
    _, mask, _, scores, _ = padded(batch, longest)
    expected = []
    for one in batch:
        values = one.scores.double().numpy()[one.candidates.numpy()]
        q1, q3 = np.percentile(values, [25, 75]) if len(values) else (0.0, 0.0)
        limit = q3 + multiplier * (q3 - q1)
        expected.append(int((values > limit + 2e-5 * max(abs(limit), abs(q3))).sum()))
    assert sampling.outliers(scores, mask, multiplier).tolist() == expected


def test_grid_windows():
    assert sampling.grid_windows(3, 5, 2).view(3, 5).tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]


@pytest.mark.parametrize("choose", [choosing.max_min, choosing.dpp, choosing.pivots])
def test_a_recorded_graph_chooses_among_as_many_tokens_as_there_are(choose):
    """Of texts the number depends on data: a graph has as many rounds as there can be."""

    class Chosen(torch.nn.Module):
        def forward(self, x, is_token):
            x = x[is_token][None]
            torch._check(x.shape[1] > 0)
            candidates = torch.ones(1, x.shape[1], dtype=torch.bool)
            scores = () if choose is choosing.max_min else (x.sum(2),)
            return choose(x, candidates, torch.full((1,), 4), *scores)

    x = torch.randn(12, 5)
    program = torch.export.export(Chosen(), (x, torch.arange(12) < 9), strict=False).module()
    for tokens in (12, 7, 3):
        is_token = torch.arange(12) < tokens
        found = program(x, is_token)
        assert torch.equal(found, Chosen()(x, is_token))
        assert int(found.sum()) == min(4, tokens)
