"""Layout and PackedTokens against plain loops over instances."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from strategies import cases, generator, lengths, seeds

from vltprune import Layout, PackedTokens

# ---- layout


@given(lengths)
def test_layout(sizes):
    layout = Layout(sizes)
    pairs = [(i, s) for i, n in enumerate(sizes) for s in range(n)]
    assert (layout.batch, layout.total, layout.longest) == (len(sizes), len(pairs), max(sizes))
    assert layout.is_uniform == all(n == sizes[0] for n in sizes)
    assert layout.offsets.tolist() == [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    assert layout.offsets.dtype == torch.int32
    assert list(zip(layout.instance.tolist(), layout.slot.tolist(), strict=True)) == pairs
    assert layout.padded_index.tolist() == [i * max(sizes) + s for i, s in pairs]
    assert layout.valid.flatten().nonzero().flatten().tolist() == layout.padded_index.tolist()
    assert layout.sizes.tolist() == list(sizes)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4))
def test_grouped_layout(pairs):
    layout = Layout(tuple(n for pair in pairs for n in pair))
    assert layout.grouped(len(pairs)).lengths == tuple(map(sum, pairs))
    assert layout.grouped(1).lengths == (layout.total,)
    assert layout.grouped(layout.batch) is layout


# ---- pack and unpack (invariant 10)


@given(cases())
def test_unpack_then_pack(case):
    tokens = case.tokens
    x, valid = tokens.unpack()
    assert (valid is None) == tokens.layout.is_uniform
    if valid is not None:
        assert (x[~valid] == 0).all()
    again = PackedTokens.pack(x, valid)
    assert torch.equal(again.x, tokens.x)
    assert again.layout == tokens.layout
    assert torch.equal(again.position, tokens.layout.slot)
    assert not again.protected.any()


@given(lengths, seeds, st.booleans())
def test_pack_takes_only_what_is_valid(sizes, seed, left):
    """Padding may stand on either side, and a token's position is its place in the padded row."""
    layout, g = Layout(sizes), generator(seed)
    valid = layout.valid.flip(1) if left else layout.valid
    x = torch.randn(*valid.shape, 2, generator=g)
    x[~valid] = float("nan")
    marks = torch.rand(valid.shape, generator=g) < 0.5

    tokens = PackedTokens.pack(x, valid, protected=marks, summary=marks)
    rows = [(i, j) for i in range(len(sizes)) for j in range(valid.shape[1]) if valid[i, j]]
    assert tokens.x.isfinite().all()
    assert torch.equal(tokens.x, torch.stack([x[row] for row in rows]))
    assert tokens.position.tolist() == [j for _, j in rows]
    assert tokens.protected.tolist() == tokens.summary.tolist() == [bool(marks[row]) for row in rows]
    assert tokens.layout.lengths == sizes


def test_pack_without_padding_copies_nothing():
    x = torch.randn(2, 3, 4)
    tokens = PackedTokens.pack(x, protected=torch.arange(3) == 0)
    assert tokens.x.data_ptr() == tokens.unpack()[0].data_ptr() == x.data_ptr()
    assert tokens.protected.tolist() == [True, False, False] * 2
    assert tokens.summary is None


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_pack_refuses_an_empty_batch(shape):
    with pytest.raises(ValueError, match="empty batch"):
        PackedTokens.pack(torch.zeros(shape))


def test_pack_refuses_an_empty_instance():
    with pytest.raises(ValueError, match="instance 1 has no token at all"):
        PackedTokens.pack(torch.zeros(2, 3, 4), torch.tensor([[True] * 3, [False] * 3]))


# ---- selecting


@given(cases(), seeds)
def test_select(case, seed):
    size = torch.arange(case.tokens.layout.total)
    tokens = dataclasses.replace(case.tokens, size=size)
    keep = torch.rand(tokens.layout.total, generator=generator(seed)) < 0.5
    out = tokens.select(keep)
    assert out.layout.lengths == tuple(int(part.sum()) for part in keep.split(tokens.layout.lengths))
    for column in ("x", "position", "protected", "summary", "size"):
        before, after = getattr(tokens, column), getattr(out, column)
        assert after is None if before is None else torch.equal(after, before[keep])


@given(cases(), seeds)
def test_of(case, seed):
    tokens, batch = case.tokens, case.tokens.layout.batch
    which = torch.randint(batch, (batch + 1,), generator=generator(seed)).tolist()
    picked = tokens.select_instances(which)
    rows = torch.arange(tokens.layout.total).split(tokens.layout.lengths)
    index = torch.cat([rows[i] for i in which])
    assert picked.layout.lengths == tuple(tokens.layout.lengths[i] for i in which)
    assert torch.equal(picked.x, tokens.x[index])
    assert torch.equal(picked.position, tokens.position[index])


@given(cases(), seeds)
def test_the_first_of_a_mask(case, seed):
    tokens, g = case.tokens, generator(seed)
    slots = [int(torch.randint(0, n, (), generator=g)) for n in tokens.layout.lengths]
    rows = tokens.layout.offsets[:-1].long() + torch.tensor(slots)
    mark = torch.zeros(tokens.layout.total, dtype=torch.bool)
    mark[rows] = True
    later = mark | ((tokens.layout.slot > torch.tensor(slots)[tokens.layout.instance]) & (tokens.x[:, 0] > 0))
    assert torch.equal(tokens.first_where(later), tokens.x[rows])  # the first of several
    assert torch.equal(tokens.free, ~tokens.protected)
    assert tokens.with_x(tokens.x[:, :1]).x.shape == (tokens.layout.total, 1)


def test_summaries_are_the_contents_of_the_summary_tokens():
    x = torch.arange(12.0).view(2, 3, 2)
    tokens = PackedTokens.pack(x, summary=torch.tensor([False, True, False]))
    assert torch.equal(tokens.summaries(), x[:, 1])
    with pytest.raises(ValueError, match="no summary token: pack them with summary="):
        PackedTokens.pack(x).summaries()


def test_where_nothing_is_left_of_any_token_all_count_alike():
    """A bias of minus infinity for each key would give NaN."""
    tokens = PackedTokens.pack(torch.zeros(1, 3, 2))
    assert tokens.bias is None
    assert len(tokens.with_keep_prob(torch.zeros(3)).bias.softmax(0).unique()) == 1
    shares = torch.tensor([0.5, 1e-30, 1.0])
    assert torch.equal(tokens.with_keep_prob(shares).bias, shares.log())


def test_what_is_left_of_what_was_left_is_their_product():
    once = PackedTokens.pack(torch.zeros(1, 3, 2)).with_keep_prob(
        torch.tensor([0.5, 1.0, 0.25]), torch.tensor([0.5, 0.5, 1.0])
    )
    twice = once.with_keep_prob(torch.tensor([0.5, 0.5, 1.0]))
    assert twice.keep_prob.tolist() == [0.25, 0.5, 0.25]
    assert twice.counted_prob.tolist() == [0.25, 0.25, 1.0]
