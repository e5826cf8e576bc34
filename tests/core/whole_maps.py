"""What hypothesis draws for attention, and whole attention maps, written out naively."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from strategies import generator, lengths, packed, seeds
from torch import Tensor

from vltprune import Layout, PairBias

HEADS, HEAD_DIM, SCALE, FAR = 3, 4, 0.7, 20
TIGHT = {"rtol": 1e-10, "atol": 1e-12}  # the draws are in double precision


@dataclass(frozen=True)
class Apart:
    """What pairs of tokens get: an entry of table [HEADS or 1, 2 * FAR + 1] up to a distance, and nothing beyond it."""

    position: Tensor
    table: Tensor
    reach: int

    @property
    def pairs(self):
        return PairBias(self.position, self.distance_bias)

    def distance_bias(self, distance):
        hidden = (distance.abs() > self.reach).unsqueeze(-3)
        return self.table[:, distance + FAR].movedim(0, -3).masked_fill(hidden, -torch.inf)

    def written_out(self, lengths):
        """Per instance, [HEADS or 1, n, n], pair by pair."""
        never = torch.full_like(self.table[:, 0], -torch.inf)
        for own in self.position.split(lengths):
            rows = [[self.table[:, k - q + FAR] if abs(k - q) <= self.reach else never for k in own] for q in own]
            yield torch.stack([torch.stack(row, -1) for row in rows], 1)


@st.composite
def aparts(draw, layout, g):
    """None, a bias for each head, a window, or both; earlier pruning has left gaps between the positions."""
    if draw(st.booleans()):
        return None
    position = packed(layout, 2, 0.0, False, False, 1.0, g).position + draw(st.sampled_from([0, 9]))
    table = torch.randn(HEADS, 2 * FAR + 1, generator=g, dtype=torch.float64) if draw(st.booleans()) else None
    return Apart(position, torch.zeros(1, 2 * FAR + 1) if table is None else table, draw(st.sampled_from([0, 2, FAR])))


@st.composite
def heads(draw, size=lengths):
    """Layout, q, k, v, key bias or None, biases of pairs or None; logits from nothing to saturated."""
    layout, g = Layout(draw(size)), generator(draw(seeds))
    q, k, v = (torch.randn(layout.total, HEADS, HEAD_DIM, generator=g, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(layout.total, generator=g, dtype=torch.float64) if draw(st.booleans()) else None
    return layout, q * draw(st.sampled_from([0.0, 1.0, 1e3])), k, v, bias, draw(aparts(layout, g))


def whole_maps(q, k, layout, keys, causal=False, bias=None, apart=None):
    """Per instance, [heads, n, m]."""
    biases = [0.0] * layout.batch if bias is None else bias.split(keys.lengths)
    pairs = [0.0] * layout.batch if apart is None else apart.written_out(layout.lengths)
    for one_q, one_k, *added in zip(q.split(layout.lengths), k.split(keys.lengths), biases, pairs, strict=True):
        logits = torch.einsum("ihd,jhd->hij", one_q, one_k) * SCALE + added[0] + added[1]
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
        yield logits.softmax(-1)


def naive(q, k, v, layout, keys, **room):
    maps = whole_maps(q, k, layout, keys, **room)
    return torch.cat([torch.einsum("hij,jhd->ihd", p, o) for p, o in zip(maps, v.split(keys.lengths), strict=True)])
