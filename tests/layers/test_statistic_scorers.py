"""Scorers of published methods against their formulas, from queries, keys and values of one instance at a time."""

from __future__ import annotations

from math import sqrt

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import generator, packed, seeds
from torch.testing import assert_close

from vltprune import BlockSpec, Layout, attend_with_stats, scorers

HEADS, HEAD_DIM = 3, 4
SPEC = BlockSpec("image", 0, 4, HEADS * HEAD_DIM, HEADS, has_summary=True)


def columns(maps, q, k, v, free):
    return [maps[:, :, j].mean(0).sum() / maps.shape[1] for j in range(maps.shape[1])]


def columns_of_others(maps, q, k, v, free):
    n = maps.shape[1]
    return [sum(maps[h, i, j] for h in range(HEADS) for i in range(n) if i != j) / (HEADS * n) for j in range(n)]


def ats(maps, q, k, v, free):
    scores = torch.stack([maps[:, 0, j].sum() * v[j].flatten().norm() for j in range(len(v))])
    return scores / scores[free].sum()


def value_weighted(maps, q, k, v, free):
    return [sum(maps[h, 0, j] * v[j, h].norm() for h in range(HEADS)) for j in range(len(v))]


def key_norm(maps, q, k, v, free):
    return k.abs().sum((1, 2))


def pagerank(maps, q, k, v, free):
    ends = [torch.linalg.matrix_power(one, 30).mean(0) for one in maps]
    return (sum(end**2 for end in ends) / HEADS).sqrt()


def wide(maps, q, k, v, free):
    return torch.softmax(q[0].flatten() @ k.flatten(1).T / sqrt(HEADS * HEAD_DIM), 0)


def flowcut(maps, q, k, v, free):
    value = v.mean(1)
    attention, likeness = maps[:, 0].mean(0), torch.stack([(value[0] @ one).exp() for one in value])
    return (attention / attention[free].sum() + likeness / likeness[free].sum()) * value.abs().sum(1)


FORMULAS = {
    "column_attention": columns,
    "column_attention(diagonal=False)": columns_of_others,
    "ats": ats,
    "value_weighted_attention": value_weighted,
    "key_norm": key_norm,
    "pagerank": pagerank,
    "wide_cls_attention": wide,
    "flowcut": flowcut,
}


@pytest.mark.parametrize("name", FORMULAS)
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=3), seed=seeds)
@settings(max_examples=25)
def test_formulas(name, lengths, seed):
    """A class token in front, some registers, odd and even numbers of tokens."""
    g, layout = generator(seed), Layout(tuple(lengths))
    tokens = packed(layout, SPEC.dim, 0.2, True, False, 1.0, g)
    q, k, v = (torch.randn(layout.total, HEADS, HEAD_DIM, generator=g, dtype=torch.float64) for _ in range(3))
    base, _, option = name.partition("(")
    part = scorers[base](SPEC, **({"diagonal": False} if option else {}))
    _, stats = attend_with_stats(q.float(), k.float(), v.float(), tokens, HEAD_DIM**-0.5, part.needs)
    scores = part(tokens, stats, None)

    pieces = zip(*(t.split(lengths) for t in (q, k, v, tokens.free, scores)), strict=True)
    for one_q, one_k, one_v, free, score in pieces:
        if not free.any():
            continue
        maps = torch.einsum("ihd,jhd->hij", one_q, one_k).mul(HEAD_DIM**-0.5).softmax(-1)
        expected = torch.as_tensor(FORMULAS[name](maps, one_q, one_k, one_v, free))
        assert_close(score[free].double(), expected.double()[free], rtol=1e-3, atol=1e-5)


def test_flowcut_smooths_over_the_blocks_that_scored():
    g, layout = generator(0), Layout((5, 4))
    tokens = packed(layout, SPEC.dim, 0.0, True, False, 1.0, g)
    q, k, v = torch.randn(3, layout.total, HEADS, HEAD_DIM, generator=g)
    part = scorers["flowcut"](SPEC, momentum=0.25)
    _, stats = attend_with_stats(q, k, v, tokens, 0.5, part.needs)
    now, before = part(tokens, stats, None), torch.rand(layout.total, generator=g)
    assert_close(part(tokens.with_column("flowcut", before), stats, None), 0.25 * before + 0.75 * now)
    with pytest.raises(ValueError, match=r"momentum=1.0\) must lie in \[0, 1\)"):
        scorers["flowcut"](SPEC, momentum=1.0)
