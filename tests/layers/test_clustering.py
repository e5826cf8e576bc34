"""Density peaks against the formula, token by token."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given
from strategies import generator, seeds

from vltprune.layers.algorithms.clustering import density_peaks


def naive(x, clusters):
    """Centers and the center of each token, of one instance x [n, dim]."""
    n, dim = x.shape
    distance = [[float((a - b).square().sum() / dim) ** 0.5 for b in x] for a in x]
    density = [torch.tensor([-d * d for d in sorted(row)[:clusters]]).mean().exp().item() for row in distance]
    score = []
    for i in range(n):
        denser = [distance[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append(density[i] * (min(denser) if denser else max(map(max, distance))))
    centers = sorted(range(n), key=lambda i: -score[i])[:clusters]
    home = [i if i in centers else min(centers, key=lambda c: (distance[i][c], c)) for i in range(n)]
    return centers, home


@given(st.integers(1, 9), st.integers(1, 4), seeds)
def test_centers_and_clusters(n, clusters, seed):
    clusters = min(n, clusters)
    x = torch.randn(2, n + 2, 6, generator=generator(seed))
    candidates = torch.ones(2, n + 2, dtype=torch.bool)
    candidates[:, [0, -1]] = False
    candidates[1] = False
    centers, match = density_peaks(x, candidates, torch.tensor([clusters, 0]))
    wanted, home = naive(x[0, 1:-1], clusters)
    assert centers[0].nonzero().flatten().tolist() == [i + 1 for i in sorted(wanted)]
    assert match[0].tolist() == [0, *(i + 1 for i in home), n + 1]
    assert not centers[1].any() and match[1].tolist() == list(range(n + 2))


def test_of_copies_the_first_are_centers():
    centers, match = density_peaks(torch.zeros(1, 5, 3), torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]))
    assert centers[0].tolist() == [True, True, False, False, False] and match[0].tolist() == [0, 1, 0, 0, 0]
    assert density_peaks(torch.zeros(1, 0, 3), torch.ones(1, 0, dtype=torch.bool), torch.tensor([0]))[0].shape == (1, 0)
