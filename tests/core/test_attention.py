"""`attend` against the whole map, written out naively."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from strategies import generator, seeds
from torch.testing import assert_close
from whole_maps import FAR, HEAD_DIM, HEADS, SCALE, TIGHT, Apart, heads, naive

from vltprune import Layout, attend
from vltprune.core import attention


@pytest.fixture(params=["padded", "one by one"], autouse=True)
def path(request, monkeypatch):
    """Every test runs on both of the ways `attend` may go: all instances at once, or one by one."""
    if request.param != "padded":
        monkeypatch.setattr(attention, "_SMALL", {})


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


def test_pairs_are_of_one_sequence():
    layout, q = Layout((2, 3)), torch.randn(5, HEADS, HEAD_DIM)
    pairs = Apart(torch.arange(5), torch.zeros(1, 2 * FAR + 1), FAR).pairs
    with pytest.raises(ValueError, match="pairs are of one sequence"):
        attend(q, q, q, layout, SCALE, key_layout=Layout((3, 2)), pairs=pairs)


def test_uniform_and_ragged_batches_agree():
    """The same instances once in a uniform batch, once beside one of another length."""
    g = generator(3)
    q, k, v = (torch.randn(20, HEADS, HEAD_DIM, generator=g) for _ in range(3))
    for causal in (False, True):
        uniform = attend(q[:16], k[:16], v[:16], Layout((8, 8)), SCALE, causal=causal)
        ragged = attend(q, k, v, Layout((8, 8, 4)), SCALE, causal=causal)
        assert_close(ragged[:16], uniform, rtol=1e-6, atol=1e-6)


@given(heads(), seeds)
def test_a_mask_of_pairs_hides_what_its_table_says_and_a_soft_cap_bounds_dot_products(drawn, seed):
    layout, q, k, v, bias, _ = drawn
    g, length = generator(seed), layout.longest + 3
    # tokens that are left of a longer batch
    place = torch.cat([torch.randperm(length, generator=g)[:n].sort().values for n in layout.lengths])
    visible = torch.rand(layout.batch, length, length, generator=g) < 0.5
    visible |= torch.eye(length, dtype=torch.bool)
    pairs = attention.PairMask(layout.instance * length + place, visible)
    out = attend(q, k, v, layout, SCALE, key_bias=bias, pairs=pairs, softcap=3.0)

    biases = [0.0] * layout.batch if bias is None else bias.split(layout.lengths)
    parts = zip(*(t.split(layout.lengths) for t in (place, q, k, v)), visible, biases, strict=True)
    for got, (own, one_q, one_k, one_v, table, added) in zip(out.split(layout.lengths), parts, strict=True):
        logits = 3.0 * (torch.einsum("qhd,khd->hqk", one_q, one_k) * SCALE / 3.0).tanh() + added
        weight = logits.masked_fill(~table[own][:, own], -torch.inf).softmax(-1)
        assert_close(got, torch.einsum("hqk,khd->qhd", weight, one_v), rtol=1e-5, atol=1e-6)


def test_key_heads_may_be_fewer():
    g = generator(4)
    q, k, v = (torch.randn(2, n, 5, HEAD_DIM, generator=g) for n in (6, 2, 2))
    for softcap in (None, 2.0):
        repeated = (t.repeat_interleave(3, 1) for t in (k, v))
        want = attention.attend_by_head(q, *repeated, SCALE, causal=True, softcap=softcap)
        assert_close(attention.attend_by_head(q, k, v, SCALE, causal=True, softcap=softcap), want)
