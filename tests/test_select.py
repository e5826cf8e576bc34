"""Token selection of one instance: indices in order, protected tokens kept, and errors that say what to write."""

from __future__ import annotations

import pytest
import torch

import vltprune as vp

N, DIM = 12, 6
PROTECTED = torch.arange(N) % 5 == 0

# each by the number of tokens, features, and protected tokens or None
CHOICES = {
    "max_min": lambda k, x, p: vp.select.max_min(x, k, p),
    "dpp": lambda k, x, p: vp.select.dpp(x, scores(x), k, p),
    "deduplicate": lambda k, x, p: vp.select.deduplicate(x, scores(x), k, protected=p),
    "pivots": lambda k, x, p: vp.select.pivots(x, scores(x), k, 2, p),
    "windows": lambda k, x, p: vp.select.windows(scores(x), ids(x), k, 1 - scores(x), protected=p),
    "spread_uniform": lambda k, x, p: vp.select.spread_uniform(x, k, p),
}
MATCHINGS = {
    "bipartite": lambda k, x, p: vp.select.bipartite(x, k, p),
    "energy": lambda k, x, p: vp.select.energy(x, k, protected=p),
    "graph": lambda k, x, p: vp.select.graph(x, k, scores(x), p),
    "local_pairs": lambda k, x, p: vp.select.local_pairs(x, ids(x), 0.0, p),
    "components": lambda k, x, p: vp.select.components(x, 0.2, p),
    "bipartite, threshold": lambda k, x, p: vp.select.bipartite(x, protected=p, least_similarity=0.2),
    "nearest": lambda k, x, p: vp.select.nearest(x, torch.arange(len(x)) < k, p),
}
SAMPLES = {"sample_cdf": lambda k, x, p: vp.select.sample_cdf(scores(x), k, p)}
ALL = CHOICES | SAMPLES | MATCHINGS
READS_FEATURES = [name for name in ALL if name not in ("windows", "sample_cdf")]
every_function = pytest.mark.parametrize("name", ALL)


def features(n=N):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(0))


def scores(x):
    return torch.linspace(0, 1, len(x)) ** 2


def ids(x):
    return torch.arange(len(x)) // 4


def indices(out):
    return out[0] if isinstance(out, tuple) else out


@every_function
@pytest.mark.parametrize("protected", [None, PROTECTED], ids=["none protected", "some protected"])
@pytest.mark.parametrize("count", [0, 3, 4, 99])
def test_indices_are_sorted_and_hold_what_is_protected(name, protected, count):
    kept = indices(ALL[name](count, features(), protected))
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    if protected is not None:
        assert set(PROTECTED.nonzero().flatten().tolist()) <= set(kept.tolist())


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("protected", [None, PROTECTED], ids=["none protected", "some protected"])
@pytest.mark.parametrize("count", [0, 3, 4, 99])
def test_counts_are_of_unprotected_tokens(name, protected, count):
    kept = CHOICES[name](count, features(), protected)
    free = N if protected is None else int((~protected).sum())
    assert len(kept) == min(count, free) + N - free


@pytest.mark.parametrize("name", MATCHINGS)
@pytest.mark.parametrize("protected", [None, PROTECTED], ids=["none protected", "some protected"])
def test_matches_are_kept_and_unprotected(name, protected):
    kept, match = MATCHINGS[name](4, features(), protected)
    assert match.shape == (N,) and match.dtype == torch.int64
    goes = torch.ones(N, dtype=torch.bool).index_fill(0, kept, False)
    assert goes.any()
    assert torch.equal(match[~goes], torch.arange(N)[~goes])
    assert set(match[goes].tolist()) <= set(kept.tolist())
    if protected is not None:
        assert not protected[match[goes]].any()


@every_function
def test_an_instance_without_tokens(name):
    assert indices(ALL[name](2, features(0), None)).shape == (0,)


@pytest.mark.parametrize("name", READS_FEATURES)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 3, 4), "one instance"),
        (torch.ones(3, 4, dtype=torch.int64), "floating-point"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinity"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinity"),
    ],
)
def test_features_that_are_none(name, x, message):
    with pytest.raises(ValueError, match=message):
        ALL[name](1, x, None)


@every_function
@pytest.mark.parametrize("protected", [torch.ones(N - 1, dtype=torch.bool), torch.ones(N)])
def test_masks_that_are_none(name, protected):
    with pytest.raises(ValueError, match="protected must be"):
        ALL[name](1, features(), protected)


@pytest.mark.parametrize("name", [*CHOICES, *SAMPLES, "bipartite", "energy", "graph"])
@pytest.mark.parametrize("count", [-1, 0.5, True])
def test_counts_that_are_none(name, count):
    with pytest.raises(ValueError, match="whole number of tokens"):
        ALL[name](count, features(), None)


@pytest.mark.parametrize("values", [torch.ones(N - 1), torch.ones(N, 1), torch.full((N,), float("nan"))])
def test_scores_that_are_none(values):
    x, window = features(), torch.zeros(N).long()
    for choose in (vp.select.dpp, vp.select.deduplicate, vp.select.pivots):
        with pytest.raises(ValueError, match="scores"):
            choose(x, values, 2)
    with pytest.raises(ValueError, match="importance"):
        vp.select.graph(x, 2, values)
    with pytest.raises(ValueError, match=r"scores|ids"):
        vp.select.windows(values, window, 2)


def test_arguments_that_are_none():
    x, window = features(), torch.zeros(N).long()
    with pytest.raises(ValueError, match="scores must be 0 or more"):
        vp.select.sample_cdf(-torch.ones(N), 2)
    with pytest.raises(ValueError, match="scores must be those of one instance"):
        vp.select.outliers(torch.ones(2, N))
    with pytest.raises(ValueError, match="ids must be"):
        vp.select.local_pairs(x, window.float(), 0.5)
    with pytest.raises(ValueError, match="number=0 must be 1 or more"):
        vp.select.pivots(x, scores(x), 2, 0)
    with pytest.raises(ValueError, match="important=2 must be in 0"):
        vp.select.deduplicate(x, scores(x), 2, important=2)
    with pytest.raises(ValueError, match="local=-1 must be in 0"):
        vp.select.windows(scores(x), window, 2, local=-1)


def test_outliers():
    """One score far above the others, and none where it is protected."""
    values = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0, 30.0])
    assert vp.select.outliers(values) == 1
    assert vp.select.outliers(values, values > 9) == 0
    assert vp.select.outliers(torch.ones(5)) == 0


def test_windows_of_a_grid():
    """Half of 8 by a quota of 1 for each of four windows, the others by score: the last ones."""
    kept = vp.select.windows(torch.arange(16.0), vp.select.grid_windows(4, 4, 2), 8)
    assert kept.tolist() == [5, 7, 10, 11, 12, 13, 14, 15]
