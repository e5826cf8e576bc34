"""Segment operations against a loop over instances, ties, single tokens and empty candidate sets included."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from strategies import few, generator, lengths, levels, seeds, shares
from torch.testing import assert_close

from vltprune import Layout
from vltprune.core import segments

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@st.composite
def values(draw, columns=(1, 3)):
    """Layout, values [total, *] in double precision with ties, from zero to huge; a mask, in which instances may be empty."""
    layout, g = Layout(draw(lengths)), generator(draw(seeds))
    width = draw(st.sampled_from([(), columns]))
    drawn = few(layout.total, draw(levels), g, *width).double() - 0.3
    mask = torch.rand(layout.total, generator=g) >= draw(shares)
    return layout, drawn * draw(st.sampled_from([0.0, 1.0, 5.0, 1e5])), mask


def each(layout, *columns):
    return zip(*(column.split(layout.lengths) for column in columns), strict=True)


@given(values())
def test_pad_flat_sum_count(drawn):
    layout, x, mask = drawn
    padded = segments.pad(x, layout, 7.0)
    assert padded.shape == (layout.batch, layout.longest, *x.shape[1:])
    assert torch.equal(padded[layout.valid], x)
    assert (padded[~layout.valid] == 7.0).all()
    assert torch.equal(segments.unpad(padded, layout), x)
    assert_close(segments.sum(x, layout), torch.stack([part.sum(0) for (part,) in each(layout, x)]), **TIGHT)
    assert segments.count(mask, layout).tolist() == [int(part.sum()) for (part,) in each(layout, mask)]


def sparsemax(z):
    """Projection onto the simplex by trying every support size: z [n, k]."""
    columns = []
    for column in z.t():
        ordered = column.sort(descending=True).values
        sizes = [r for r in range(1, len(ordered) + 1) if 1 + r * ordered[r - 1] > ordered[:r].sum()]
        columns.append((column - (ordered[: max(sizes)].sum() - 1) / max(sizes)).clamp(min=0))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
@given(drawn=values())
def test_normalizing(kind, drawn):
    layout, x, mask = drawn
    out, expected = getattr(segments, kind)(x, layout, mask), torch.zeros_like(x)
    for rows, there in each(layout, torch.arange(layout.total), mask):
        chosen = rows[there]
        if len(chosen):
            z = x[chosen].flatten(1) if x.dim() > 1 else x[chosen, None]
            normalized = z.softmax(0) if kind == "softmax" else sparsemax(z)
            expected[chosen] = normalized.view(len(chosen), *x.shape[1:])
    assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert (out[~mask] == 0).all()


@pytest.mark.parametrize("kind", ["softmax", "sparsemax"])
def test_normalizing_has_gradients(kind):
    layout, g = Layout((4, 1, 3)), generator(0)
    mask = torch.tensor([True] * 4 + [False] + [True, False, True])
    x = torch.randn(8, 2, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: getattr(segments, kind)(x, layout, mask), x)


@given(lengths, levels, seeds)
def test_rank(sizes, distinct, seed):
    layout = Layout(sizes)
    scores = few(layout.total, distinct, generator(seed))
    expected = []
    for (part,) in each(layout, scores):
        order = sorted(range(len(part)), key=lambda i: (-part[i].item(), i))
        expected += [order.index(i) for i in range(len(part))]
    assert segments.rank(scores, layout).tolist() == expected


@pytest.mark.parametrize("sizes", [(300,), (300, 40)])
def test_ranks_of_ties_go_by_place_in_long_instances_too(sizes):
    """Short sorts are stable by themselves, long ones are not."""
    ranks = segments.rank(torch.zeros(sum(sizes)), Layout(sizes))
    assert ranks.tolist() == [slot for n in sizes for slot in range(n)]


@given(values(columns=(3,)), seeds)
def test_mix(drawn, seed):
    layout, weight, _ = drawn
    weight = weight if weight.dim() == 2 else weight[:, None]
    contents = torch.randn(layout.total, 5, generator=generator(seed), dtype=torch.float64)
    expected = torch.stack([w.t() @ v for w, v in each(layout, weight, contents)])
    assert_close(segments.weighted_sum(weight, contents, layout), expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [segments.softmax, segments.sparsemax])
def test_half_precision_holds_the_value_of_hidden_tokens(normalize, dtype):
    layout = Layout((3, 1, 2))
    values, there = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 5.0]), torch.tensor([True, False, True, False, True, True])
    weight = normalize(values.to(dtype), layout, there)
    assert weight.dtype == dtype
    assert_close(weight.float(), normalize(values, layout, there), rtol=1e-2, atol=1e-3)
