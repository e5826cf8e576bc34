"""Sentence embeddings without padding, and ranks among nearest neighbors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

import vltprune as vp
from vltprune.hosts.ops import weighted_mean


def mean_pooled(model: nn.Module, ids: Tensor) -> Tensor:
    """ids [batch, n] without padding -> [batch, dim]: the mean over tokens, a merged one counted as often as it merged."""
    if not isinstance(model, vp.PrunedEncoder):
        return model(ids).last_hidden_state.mean(1)
    tokens, _ = model.encode(ids)
    return weighted_mean(tokens, torch.ones_like(tokens.protected))


def nearest(embeddings: Tensor, count: int) -> Tensor:
    """[inputs, count]: which others lie nearest, best first."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-1).topk(count).indices


def shared_neighbors(dense: Tensor, pruned: Tensor) -> Tensor:
    """[inputs]: the share of each input's ten nearest that stay among its nearest."""
    before, after = nearest(dense, 10), nearest(pruned, 10)
    return (before[:, :, None] == after[:, None]).any(-1).float().mean(-1)


def hits(embeddings: Tensor, owners: Tensor) -> Tensor:
    """[inputs], of which R@1 is the mean: whether the nearest other input has the same owner."""
    return (owners[nearest(embeddings, 1)[:, 0]] == owners).float()


def of_one_length(owned: Sequence[tuple[int, list[int]]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Owners [batch] and ids [batch, n], at most `size` sentences of one length at a time."""

    def length(pair: tuple[int, list[int]]) -> int:
        return len(pair[1])

    for _, group in groupby(sorted(owned, key=length), length):
        owners, ids = zip(*group, strict=True)
        yield from zip(torch.tensor(owners).split(size), torch.tensor(ids).split(size), strict=True)
