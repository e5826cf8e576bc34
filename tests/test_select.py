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
    "dpp": lambda k, x, p: vp.select.dpp(x, torch.linspace(0, 1, len(x)), k, p),
}
MATCHINGS = {
    "bipartite": lambda k, x, p: vp.select.bipartite(x, k, p),
    "bipartite, threshold": lambda k, x, p: vp.select.bipartite(x, protected=p, least_similarity=0.2),
    "nearest": lambda k, x, p: vp.select.nearest(x, torch.arange(len(x)) < k, p),
}
ALL = CHOICES | MATCHINGS
every_function = pytest.mark.parametrize("name", ALL)


def features(n=N):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(0))


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


@every_function
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


@pytest.mark.parametrize("name", [*CHOICES, "bipartite"])
@pytest.mark.parametrize("count", [-1, 0.5, True])
def test_counts_that_are_none(name, count):
    with pytest.raises(ValueError, match="whole number of tokens"):
        ALL[name](count, features(), None)


@pytest.mark.parametrize("scores", [torch.ones(N - 1), torch.ones(N, 1), torch.full((N,), float("nan"))])
def test_scores_that_are_none(scores):
    with pytest.raises(ValueError, match="scores"):
        vp.select.dpp(features(), scores, 2)
