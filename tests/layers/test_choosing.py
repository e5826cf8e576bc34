"""Token choice against plain computations of the formulas, and the same for an instance alone and in any batch."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from choices import DIM, argbest, batches, cosines, in_order, instances, padded, slots
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from vltprune.layers import choosing

# each on a padded batch: features, candidates, counts, scores, windows
CHOICES = {
    "max_min": lambda x, c, k, s, w: choosing.max_min(x, c, k),
    "max_min, most": lambda x, c, k, s, w: choosing.max_min(x, c, k, most=12),
    "dpp": lambda x, c, k, s, w: choosing.dpp(x, c, k, s),
    "dpp, most": lambda x, c, k, s, w: choosing.dpp(x, c, k, s, most=12),
}
EXACT = [*CHOICES]

every_choice = pytest.mark.parametrize("name", CHOICES)


@every_choice
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
@given(one=instances())
def test_only_candidates_and_at_most_counts(name, one):
    keep = CHOICES[name](*padded([one], len(one.features)))[0]
    assert not (keep & ~one.candidates).any()
    wanted = min(one.count, int(one.candidates.sum()))
    assert keep.sum() == wanted if name in EXACT else min(wanted, 1) <= keep.sum() <= wanted


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


class _NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


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
    from choices import Instance

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
