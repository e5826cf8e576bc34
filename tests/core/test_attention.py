"""`attend` and every statistic against the whole map, written out naively."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from strategies import generator, lengths, packed, seeds, shares
from torch import Tensor
from torch.testing import assert_close

from vltprune import AttentionStats, Layout, PackedTokens, PairBias, Stat, attend, attend_with_stats
from vltprune.core import attention as room

EVERY = Stat.SUMMARY | Stat.RECEIVED | Stat.CONTEXT | Stat.KEY
HEADS, HEAD_DIM, SCALE, FAR = 3, 4, 0.7, 20
TIGHT = {"rtol": 1e-10, "atol": 1e-12}  # the draws are in double precision


@pytest.fixture(params=["padded", "rows", "short rows"], autouse=True)
def path(request, monkeypatch):
    """Every test runs on each of the ways `attend` may go: all instances at once, or one by one, some rows at a time."""
    if request.param != "padded":
        monkeypatch.setattr(room, "_SMALL", {})
    monkeypatch.setattr(room, "_ROWS", 2 if request.param == "short rows" else 128)


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


@given(heads(), st.booleans())
def test_self_attention(drawn, causal):
    layout, q, k, v, bias, apart = drawn
    out = attend(q, k, v, layout, SCALE, causal=causal, key_bias=bias, pairs=apart and apart.pairs)
    assert_close(out, naive(q, k, v, layout, layout, causal=causal, bias=bias, apart=apart), **TIGHT)


@given(heads(), seeds, st.booleans())
def test_cross_attention(drawn, seed, uniform):
    keys, _, k, v, bias, _ = drawn
    g = generator(seed)
    sizes = torch.randint(1, 6, (1 if uniform else keys.batch,), generator=g).expand(keys.batch)
    layout = Layout(tuple(sizes.tolist()))
    q = torch.randn(layout.total, HEADS, HEAD_DIM, generator=g, dtype=torch.float64)
    out = attend(q, k, v, layout, SCALE, key_layout=keys, key_bias=bias)
    assert_close(out, naive(q, k, v, layout, keys, bias=bias), **TIGHT)


@given(heads(), shares, st.booleans(), seeds)
def test_statistics(drawn, protect, causal, seed):
    layout, q, k, v, bias, apart = drawn
    tokens = packed(layout, 2, protect, True, causal, 1.0, generator(seed))
    room = {"causal": causal, "key_bias": bias, "pairs": apart and apart.pairs}
    out, stats = attend_with_stats(q, k, v, tokens, SCALE, EVERY, **room)

    maps = list(whole_maps(q, k, layout, layout, causal=causal, bias=bias, apart=apart))
    free, speaks = tokens.free.split(layout.lengths), tokens.summary.split(layout.lengths)
    received = [p.amax(0)[f].sum(0) for p, f in zip(maps, free, strict=True)]
    summary = [p[:, s].squeeze(1).t() for p, s in zip(maps, speaks, strict=True)]
    expected = naive(q, k, v, layout, layout, causal=causal, bias=bias, apart=apart)
    assert_close(out, expected, **TIGHT)
    assert_close(stats[Stat.RECEIVED], torch.cat(received), **TIGHT)
    assert_close(stats[Stat.SUMMARY], torch.cat(summary), **TIGHT)
    assert_close(stats[Stat.CONTEXT], expected.norm(dim=-1), **TIGHT)
    assert_close(stats[Stat.KEY], k.mean(1), **TIGHT)


def test_a_causal_summary_sees_no_later_token():
    """Where the tokens behind an end of text stay, as in a tower that returns its tokens."""
    layout, g = Layout((5, 3)), generator(0)
    q, k, v = (torch.randn(layout.total, HEADS, HEAD_DIM, generator=g, dtype=torch.float64) for _ in range(3))
    speaks = layout.slot == torch.tensor([2, 0])[layout.instance]
    tokens = PackedTokens(q.flatten(1), layout, layout.slot, speaks, speaks)
    _, stats = attend_with_stats(q, k, v, tokens, SCALE, Stat.SUMMARY, causal=True)
    maps = whole_maps(q, k, layout, layout, causal=True)
    summary = [p[:, s].squeeze(1).t() for p, s in zip(maps, speaks.split(layout.lengths), strict=True)]
    assert_close(stats[Stat.SUMMARY], torch.cat(summary), **TIGHT)
    assert (stats[Stat.SUMMARY] == 0).all(1).tolist() == [False] * 3 + [True] * 2 + [False] + [True] * 2


@pytest.mark.parametrize("sizes", [(5, 5), (3, 1, 6)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [None, 1])
def test_gradients(sizes, causal, reach):
    layout, g = Layout(sizes), generator(1)
    tokens = packed(layout, 2, 0.2, True, causal, 1.0, g)
    size = (layout.total, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(size, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(layout.total, generator=g, dtype=torch.float64, requires_grad=True)
    table = torch.randn(HEADS, 2 * FAR + 1, generator=g, dtype=torch.float64, requires_grad=True)

    def everything(q, k, v, bias, table):
        pairs = None if reach is None else Apart(tokens.position + 9, table, reach).pairs
        room = {"causal": causal, "key_bias": bias, "pairs": pairs}
        out, stats = attend_with_stats(q, k, v, tokens, SCALE, EVERY, **room)
        return attend(q, k, v, layout, SCALE, **room), out, *stats.values.values()

    assert torch.autograd.gradcheck(everything, (q, k, v, bias, table), fast_mode=True)


def test_pairs_are_of_one_sequence():
    layout, q = Layout((2, 3)), torch.randn(5, HEADS, HEAD_DIM)
    pairs = Apart(torch.arange(5), torch.zeros(1, 2 * FAR + 1), FAR).pairs
    with pytest.raises(ValueError, match="pairs are of one sequence"):
        attend(q, q, q, layout, SCALE, key_layout=Layout((3, 2)), pairs=pairs)


@pytest.mark.parametrize("stat", list(Stat))
def test_only_what_was_asked_for_is_there(stat):
    layout = Layout((2, 3))
    tokens = packed(layout, 2, 0.0, True, False, 1.0, generator(0))
    q = torch.randn(5, HEADS, HEAD_DIM)
    _, stats = attend_with_stats(q, q, q, tokens, SCALE, stat)
    assert list(stats.values) == [stat]
    other = next(s for s in Stat if s is not stat)
    with pytest.raises(LookupError, match=f"Stat.{other.name} was not computed: add it to the part's `needs`"):
        stats[other]


def test_nothing_asked_nothing_computed():
    with pytest.raises(LookupError):
        AttentionStats()[Stat.KEY]


def test_summary_needs_a_summary_token():
    tokens = packed(Layout((2, 3)), 2, 0.0, False, False, 1.0, generator(0))
    q = torch.randn(5, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="needs a summary token"):
        attend_with_stats(q, q, q, tokens, SCALE, Stat.SUMMARY)


@pytest.mark.parametrize("needs", [Stat.NONE, Stat.RECEIVED])
@pytest.mark.parametrize("sizes", [(300, 300), (300, 70)])
def test_dropout_hits_the_weights_and_keeps_their_mean(needs, sizes):
    """With every value one, a row's output is the kept share of its weights over 1 - p: mean 1, and seldom 1 exactly."""
    tokens = packed(Layout(sizes), 2, 0.0, True, False, 1.0, generator(0))
    q = torch.randn(sum(sizes), HEADS, HEAD_DIM, generator=generator(2))
    out, stats = attend_with_stats(q, q, torch.ones_like(q), tokens, SCALE, needs, dropout=0.5)
    clean = attend_with_stats(q, q, torch.ones_like(q), tokens, SCALE, needs)[1]
    assert (out - 1).abs().mean() > 0.02
    assert abs(out.mean().item() - 1) < 0.03  # five deviations; unscaled it would be off by a half
    if needs:
        assert torch.equal(stats[Stat.RECEIVED], clean[Stat.RECEIVED])  # scores are of the clean map


def test_uniform_and_ragged_batches_agree():
    """The same instances once in a uniform batch, once beside one of another length."""
    g = generator(3)
    q, k, v = (torch.randn(20, HEADS, HEAD_DIM, generator=g) for _ in range(3))
    for causal in (False, True):
        uniform = attend(q[:16], k[:16], v[:16], Layout((8, 8)), SCALE, causal=causal)
        ragged = attend(q, k, v, Layout((8, 8, 4)), SCALE, causal=causal)
        assert_close(ragged[:16], uniform, rtol=1e-6, atol=1e-6)
