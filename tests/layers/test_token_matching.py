"""Token matching against plain computations of the formulas, and the same for an instance alone and in any batch."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from choices import (
    DIM,
    TOLERANCE,
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

from vltprune.layers.algorithms import matching

# each on a padded batch: features, candidates, counts, scores, windows
MATCHINGS = {
    "bipartite": lambda x, c, k, s, w: matching.bipartite(x, c, k),
    "bipartite, threshold": lambda x, c, k, s, w: matching.bipartite(x, c, least_similarity=0.5),
    "bipartite, both": lambda x, c, k, s, w: matching.bipartite(x, c, k, torch.full_like(k, 0.5, dtype=torch.float32)),
    "energy": lambda x, c, k, s, w: matching.energy(x, c, k, 0.5),
    "graph": lambda x, c, k, s, w: matching.graph(x, c, k),
    "graph, importance": lambda x, c, k, s, w: matching.graph(x, c, k, s),
    "local_pairs": lambda x, c, k, s, w: matching.local_pairs(x, c, w, 0.4),
    "components": lambda x, c, k, s, w: matching.components(x, c, 0.4),
    "nearest": lambda x, c, k, s, w: matching.nearest(x, c, s > 0.3),
}

every_matching = pytest.mark.parametrize("name", MATCHINGS)


@every_matching
@settings(max_examples=10)
@given(batch=batches, seed=st.integers(0, 99))
def test_an_instance_alone_and_in_any_batch(name, batch, seed):
    """Alone, padded beside others, and with the batch in another order: bit for bit the same pairs."""
    pair = MATCHINGS[name]
    longest = max(len(one.features) for one in batch) + seed % 3
    keep, match = pair(*padded(batch, longest))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(batch)))
    shuffled = pair(*padded([batch[i] for i in order], longest))
    assert torch.equal(shuffled[0], keep[order]) and torch.equal(shuffled[1], match[order])
    for i, one in enumerate(batch):
        n = len(one.features)
        alone = pair(*padded([one], n))
        assert torch.equal(keep[i, :n], alone[0][0]) and torch.equal(match[i, :n], alone[1][0])
        assert not keep[i, n:].any()
        assert torch.equal(match[i, n:], torch.arange(n, longest))


@every_matching
@settings(max_examples=10)
@given(one=instances())
def test_who_goes_goes_into_a_kept_candidate(name, one):
    keep, match = (out[0] for out in MATCHINGS[name](*padded([one], len(one.features))))
    assert not (keep & ~one.candidates).any()
    own = torch.arange(len(keep))
    goes = one.candidates & ~keep
    assert torch.equal(match[~goes], own[~goes])
    if keep.any():
        assert keep[match[goes]].all()


@every_matching
@pytest.mark.parametrize("seed", range(5))
def test_rounding_does_not_decide(name, seed):
    """Copies that differ in their last digits, and scores too: the same choice."""
    for noisy, exact in zip(MATCHINGS[name](*copies(seed, 1e-6)), MATCHINGS[name](*copies(seed, 0.0)), strict=True):
        assert torch.equal(noisy, exact)


@every_matching
def test_no_waiting_for_a_device(name):
    without_reading(MATCHINGS[name])


@every_matching
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast(name, dtype):
    """The features of half precision, computed in single: those of their values in single precision."""
    g = torch.Generator().manual_seed(0)
    features, scores = (
        torch.randn(2, 30, DIM, generator=g).to(dtype),
        torch.randint(9, (2, 30), generator=g).to(dtype) / 8,
    )
    rest = torch.ones(2, 30, dtype=torch.bool), torch.tensor([7, 12])
    windows = torch.arange(30).expand(2, -1) // 4
    single = MATCHINGS[name](features.float(), *rest, scores.float(), windows)
    with torch.autocast("cpu", torch.bfloat16):
        out = MATCHINGS[name](features, *rest, scores, windows)
    assert torch.equal(out[0], single[0]) and torch.equal(out[1], single[1])


@every_matching
def test_copies_zeros_and_nothing(name):
    """All tokens equal, all zero, one candidate, none, and no token at all."""
    pair = MATCHINGS[name]
    for features in (torch.ones(1, 6, DIM), torch.zeros(1, 6, DIM)):
        for candidates in (torch.ones(1, 6).bool(), torch.arange(6)[None] == 4, torch.zeros(1, 6).bool()):
            keep, match = pair(features, candidates, torch.tensor([3]), torch.ones(1, 6), torch.zeros(1, 6).long())
            assert not (keep & ~candidates).any()
            assert (match < 6).all()
    nothing = torch.zeros(1, 0)
    keep, match = pair(torch.zeros(1, 0, DIM), nothing.bool(), torch.tensor([3]), nothing, nothing.long())
    assert keep.shape == match.shape == (1, 0)


def bipartite_of(one, r, least=-9.0):
    """ToMe on the whole sequence: A the even and B the odd indices, protected tokens without edges.

    Where protected tokens stand elsewhere than in front, in the sequence without those.
    """
    first = next(iter(slots(one.candidates)), 0)
    sequence = [*range(first), *slots(one.candidates)]
    a = [i for i in sequence[::2] if one.candidates[i]]
    b = [i for i in sequence[1::2] if one.candidates[i]]
    similarity = cosines(one.features)
    best = {i: b[argbest([similarity[i, j] for j in b])] for i in a} if b else {}
    a = [i for i in best if similarity[i, best[i]] >= least - TOLERANCE]
    merged = [a[n] for n in in_order([similarity[i, best[i]] for i in a])][
        : r if r is None else min(r, int(one.candidates.sum()) // 2)
    ]
    match = [best[i] if i in merged else i for i in range(len(one.features))]
    return [i for i in slots(one.candidates) if i not in merged], match


@given(one=instances(longest=13), least=st.sampled_from([None, -1.0, 0.0, 0.5, 1.0]))
def test_bipartite(one, least):
    features, candidates, counts, *_ = padded([one], len(one.features))
    keep, match = matching.bipartite(features, candidates, counts, least)
    assert (slots(keep[0]), match[0].tolist()) == bipartite_of(one, one.count, -9.0 if least is None else least)
    if least is not None:
        keep, match = matching.bipartite(features, candidates, least_similarity=least)
        assert (slots(keep[0]), match[0].tolist()) == bipartite_of(one, None, least)


@pytest.mark.parametrize("n", [2, 3, 8, 9])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_bipartite_removes_r(n, protected):
    """As many as asked for, up to half of the unprotected tokens, for odd and even counts."""
    features = torch.randn(1, n + protected, DIM)
    candidates = (torch.arange(n + protected) >= protected)[None]
    for r in range(n):
        keep, _ = matching.bipartite(features, candidates, torch.tensor([r]))
        assert int(keep.sum()) == n - min(r, n // 2)


def test_bipartite_needs_one_of_two():
    with pytest.raises(ValueError, match="needs r"):
        matching.bipartite(torch.ones(1, 3, 2), torch.ones(1, 3).bool())


@given(one=instances())
def test_nearest(one):
    keep = one.scores > 0.3
    features, candidates, *_ = padded([one], len(one.features))
    kept, match = matching.nearest(features, candidates, keep[None])
    similarity, targets = cosines(one.features), slots(keep & one.candidates)
    assert slots(kept[0]) == targets
    for i, to in enumerate(match[0].tolist()):
        goes = bool(one.candidates[i]) and i not in targets and bool(targets)
        assert to == (targets[argbest([similarity[i, j] for j in targets])] if goes else i)


def f(cosine, margin):
    """PiToMe's weight of a neighbor: ELU(cos - margin)."""
    return cosine - margin if cosine > margin else np.exp(cosine - margin) - 1


@pytest.mark.parametrize("margin", [0.0, 0.5])
@given(one=instances(longest=13))
def test_energy(margin, one):
    """PiToMe: the 2 r tokens in the largest clusters, in turn in A and in B."""
    similarity, candidates = cosines(one.features), slots(one.candidates)
    others = max(len(candidates) - 1, 1)
    energies = [sum(f(similarity[i, j], margin) for j in candidates if j != i) / others for i in candidates]
    r = min(one.count, len(candidates) // 2)
    mergeable = [candidates[n] for n in in_order(energies)][: 2 * r]
    a, b = mergeable[::2], mergeable[1::2]
    match = list(range(len(one.features)))
    for i in a:
        match[i] = b[argbest([similarity[i, j] for j in b])]
    features, mask, counts, *_ = padded([one], len(one.features))
    keep, out = matching.energy(features, mask, counts, margin)
    assert slots(keep[0]) == [i for i in candidates if i not in a]
    assert out[0].tolist() == match


@pytest.mark.parametrize("important", [False, True])
@given(one=instances(longest=13))
def test_graph(important, one):
    """CrossGET: sources by importance - the best edge to a token ranked later; destinations among those that stay."""
    similarity, candidates = cosines(one.features), slots(one.candidates)
    highest = [max((similarity[i, j] for j in candidates if j != i), default=-9.0) for i in candidates]
    ranked = [candidates[n] for n in in_order(highest)]
    importance = one.scores.tolist() if important else [0.0] * len(one.features)
    cost = {
        i: importance[i] - max((similarity[i, j] for j in ranked[n + 1 :]), default=-9.0) for n, i in enumerate(ranked)
    }
    sources = [candidates[n] for n in in_order([-cost[i] for i in candidates])][: one.count]
    stay = [i for i in candidates if i not in sources]
    match = list(range(len(one.features)))
    for i in sources if stay else ():
        match[i] = stay[argbest([similarity[i, j] for j in stay])]
    features, mask, counts, scores, _ = padded([one], len(one.features))
    keep, out = matching.graph(features, mask, counts, scores if important else None)
    assert (slots(keep[0]), out[0].tolist()) == (stay, match)


@pytest.mark.parametrize("least", [-1.0, 0.2, 1.0])
@given(one=instances(longest=13))
def test_local_pairs(least, one):
    """ALGM: each window whose pairs have this mean cosine becomes its first token."""
    similarity, match = cosines(one.features), list(range(len(one.features)))
    for window in set(one.windows.tolist()):
        ids = [i for i in slots(one.candidates) if one.windows[i] == window]
        edges = [similarity[i, j] for i in ids for j in ids if i < j]
        if edges and np.mean(edges) >= least - TOLERANCE:
            for i in ids:
                match[i] = ids[0]
    features, mask, _, _, windows = padded([one], len(one.features))
    keep, out = matching.local_pairs(features, mask, windows, least)
    assert out[0].tolist() == match
    assert slots(keep[0]) == [i for i in slots(one.candidates) if match[i] == i]


def components_of(connected):
    """The first node of each node's component, by depth-first search."""
    first = [-1] * len(connected)
    for start in range(len(connected)):
        stack = [start] if first[start] < 0 else []
        while stack:
            node = stack.pop()
            if first[node] < 0:
                first[node] = start
                stack += [j for j in range(len(connected)) if connected[node][j]]
    return first


@pytest.mark.parametrize("least", [-0.5, 0.0, 0.5, 1.0])
@given(one=instances(longest=13))
def test_components(least, one):
    """LLaVA-Scissor: connected components of the candidates' cosines above a threshold, each into its first token."""
    both = one.candidates.numpy()[:, None] & one.candidates.numpy()[None]
    match = components_of((cosines(one.features) > least + TOLERANCE) & both)
    features, mask, *_ = padded([one], len(one.features))
    keep, out = matching.components(features, mask, least)
    assert out[0].tolist() == match
    assert slots(keep[0]) == [i for i in slots(one.candidates) if match[i] == i]


@pytest.mark.parametrize("seed", range(3))
def test_components_that_are_long_paths(seed):
    """Tokens on an arc of a circle, each connected to its two neighbors, in any order: one component of 300."""
    angle = torch.linspace(0, 3, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(seed))].double()
    features = torch.stack([angle.cos(), angle.sin()], 1)[None]
    everywhere = torch.ones(1, 300).bool()
    step = float(torch.tensor(3 / 299).double().mul(1.5).cos())
    keep, match = matching.components(features, everywhere, step)
    assert slots(keep[0]) == [0]
    assert not match.any()
