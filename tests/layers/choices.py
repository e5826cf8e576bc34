"""What the tests of token choice and token matching draw, and the rule of ties that their own computations follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

DIM = 5
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Instance:
    """One instance's features [n, dim], candidates [n] bool, count, scores [n], and window ids [n]."""

    features: Tensor
    candidates: Tensor
    count: int
    scores: Tensor
    windows: Tensor


@st.composite
def instances(draw, longest: int = 9) -> Instance:
    """Any length, with copies, zero vectors, tied scores, any share of protected tokens, and counts beyond the length."""
    n, kinds = draw(st.integers(1, longest)), draw(st.sampled_from([1, 3, 1000]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    features = torch.randn(kinds, DIM, generator=g)[torch.randint(kinds, (n,), generator=g)]
    features[torch.rand(n, generator=g) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    scores = torch.randint(draw(st.sampled_from([1, 3, 1000])), (n,), generator=g) / 1000
    return Instance(
        features * draw(st.sampled_from([1.0, 1e-3, 1e3])),
        torch.rand(n, generator=g) >= draw(st.sampled_from([0.0, 0.3, 1.0])),
        draw(st.integers(0, n + 2)),
        scores,
        torch.randint(4, (n,), generator=g),
    )


def copies(seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two instances of 24 tokens, copies of 7, with few scores; all but for relative noise."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(7, DIM, generator=g)[torch.randint(7, (2, 24), generator=g)]
    scores = torch.randint(5, (2, 24), generator=g) / 4
    candidates = torch.rand(2, 24, generator=g) > 0.1
    off = noise * torch.randn(2, 24, DIM + 1, generator=g)
    windows = torch.arange(24).expand(2, -1) // 4
    return (
        features * (1 + off[..., 1:]),
        candidates,
        torch.tensor([5, 11]),
        scores * (1 + off[..., 0]),
        windows,
    )


batches = st.lists(instances(), min_size=1, max_size=4)


def padded(batch: Sequence[Instance], longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Instances as a batch: features, candidates, counts, scores and windows, with NaN in the padding of features."""

    def pad(rows: list[Tensor], fill: float) -> Tensor:
        padding = [row.new_full((longest - len(row), *row.shape[1:]), fill) for row in rows]
        return torch.stack([torch.cat(pair) for pair in zip(rows, padding, strict=True)])

    return (
        pad([one.features for one in batch], float("nan")),
        pad([one.candidates for one in batch], False),
        torch.tensor([one.count for one in batch]),
        pad([one.scores for one in batch], float("nan")),
        pad([one.windows for one in batch], 0),
    )


def cosines(features: Tensor) -> np.ndarray:
    """Cosine similarities in double precision, [n, n]; zero for zero vectors."""
    x = features.double().numpy()
    length = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    return x @ x.T


def argbest(values: Sequence[float]) -> int:
    """The first index of those within rounding of the largest value."""
    return next(i for i, value in enumerate(values) if value >= max(values) - TOLERANCE)


def in_order(values: Sequence[float]) -> list[int]:
    """Indices by descending value; values that are equal within rounding in the order of their indices."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and values[groups[-1][-1]] - values[i] <= TOLERANCE:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [i for group in groups for i in sorted(group)]


def slots(mask: Tensor) -> list[int]:
    """The indices at which a mask [n] is true."""
    return mask.nonzero().flatten().tolist()


def without_reading(choose: Callable[..., Any]) -> None:
    """Calls a function with tensors of an accelerator that hold no numbers: to read one there, and so to wait, is an error."""
    with FakeTensorMode():
        features, candidates, counts, scores, windows = (value.to("cuda") for value in copies(0, 0.0))
        choose(features, candidates, counts, scores, windows)
        with pytest.raises(DataDependentOutputException):
            counts.max().item()
