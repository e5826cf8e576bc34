"""Every attention statistic against the whole map, written out naively."""

from __future__ import annotations

import dataclasses
import math
from functools import reduce
from operator import or_

import hypothesis.strategies as st
import pytest
import strategies
import torch
from hypothesis import given
from strategies import generator, seeds, shares
from torch.testing import assert_close
from whole_maps import FAR, HEAD_DIM, HEADS, SCALE, TIGHT, Apart, heads, naive, whole_maps

from vltprune import AttentionStats, Layout, Stat, attend, attend_with_stats
from vltprune.core import attention, attention_stats
from vltprune.core.modality import RATER, with_modality

EVERY = reduce(or_, Stat) & ~Stat.FROM_QUERY
# of the map and of each token's own; SUMMARY_WIDE and FROM_QUERY have tests of their own
EVERY_ONE = [stat for stat in Stat if stat in EVERY and stat is not Stat.SUMMARY_WIDE]


def packed(*settings):
    """Random tokens of a text and an image, each at places that are drawn; an instance may have one of them alone."""
    tokens = strategies.packed(*settings)
    drawn = torch.rand(tokens.layout.total, generator=generator(9))
    return with_modality(tokens, drawn < 0.5).with_column(RATER, drawn > 0.7)


@pytest.fixture(params=["padded", "rows", "short rows"], autouse=True)
def path(request, monkeypatch):
    """Every test runs on each of the ways `attend` may go: all instances at once, or one by one, some rows at a time."""
    if request.param != "padded":
        monkeypatch.setattr(attention, "_SMALL", {})
    monkeypatch.setattr(attention_stats, "_ROWS", 2 if request.param == "short rows" else 128)


def written_out(stat, p, k, v, free, speaks, kind, rates):
    """A statistic of one instance from its map p [heads, n, n]."""
    every = {
        Stat.SUMMARY: lambda: p[:, speaks].squeeze(1).t(),
        Stat.RECEIVED: lambda: p.amax(0)[free].sum(0),
        Stat.CONTEXT: lambda: torch.einsum("hij,jhd->ihd", p, v).norm(dim=-1),
        Stat.KEY: lambda: k.mean(1),
        Stat.COLUMN: lambda: p.mean(0).sum(0),
        Stat.DIAGONAL: lambda: p.mean(0).diagonal(),
        Stat.VALUE: lambda: v.square().sum(-1).sqrt(),
        Stat.VALUE_MEAN: lambda: v.mean(1),
        Stat.KEY_NORM: lambda: k.flatten(1).norm(p=1, dim=1),
        Stat.LAST: lambda: p[:, -1].t(),
        Stat.PAGERANK: lambda: (p.matrix_power(30).mean(1) ** 2).mean(0).sqrt(),
        Stat.FROM_TEXT: lambda: p.mean(0)[kind == 0].sum(0) / max(int((kind == 0).sum()), 1),
        Stat.FROM_RATERS: lambda: p.mean(0)[rates].sum(0) / max(int(rates.sum()), 1),
    }
    return every[stat]()


@given(heads(), shares, st.booleans(), seeds)
def test_statistics(drawn, protect, causal, seed):
    layout, q, k, v, bias, apart = drawn
    tokens = packed(layout, 2, protect, True, causal, 1.0, generator(seed))
    room = {"causal": causal, "key_bias": bias, "pairs": apart and apart.pairs}
    out, stats = attend_with_stats(q, k, v, tokens, SCALE, EVERY, **room)

    maps = whole_maps(q, k, layout, layout, causal=causal, bias=bias, apart=apart)
    marks = (tokens.free, tokens.summary, tokens.columns["modality"], tokens.columns[RATER])
    columns = (t.split(layout.lengths) for t in (k, v, *marks))
    instances = list(zip(maps, *columns, strict=True))
    assert_close(out, naive(q, k, v, layout, layout, causal=causal, bias=bias, apart=apart), **TIGHT)
    for stat in EVERY_ONE:
        expected = torch.cat([written_out(stat, *instance) for instance in instances])
        assert_close(stats[stat], expected, **TIGHT, msg=lambda text, stat=stat: f"{stat}: {text}")


@given(heads(), st.booleans(), seeds)
def test_summary_wide(drawn, causal, seed):
    """All heads as one that is as wide as they are, wherever the summary token is."""
    layout, q, k, v, bias, apart = drawn
    tokens = packed(layout, 2, 0.2, True, False, 1.0, generator(seed))
    speaks = layout.slot == (torch.rand(layout.batch, generator=generator(seed)) * layout.sizes).long()[layout.instance]
    tokens = dataclasses.replace(tokens, summary=speaks)
    room = {"causal": causal, "key_bias": bias, "pairs": apart and apart.pairs}
    stats = attend_with_stats(q, k, v, tokens, SCALE, Stat.SUMMARY | Stat.SUMMARY_WIDE, **room)[1]

    wide = apart and Apart(apart.position, apart.table.mean(0, keepdim=True), apart.reach)
    one_head = [t.flatten(1)[:, None] / (SCALE * (HEADS * HEAD_DIM) ** 0.5) ** 0.5 for t in (q, k)]
    for stat, mapped in {
        Stat.SUMMARY: whole_maps(q, k, layout, layout, causal=causal, bias=bias, apart=apart),
        Stat.SUMMARY_WIDE: whole_maps(*one_head, layout, layout, causal=causal, bias=bias, apart=wide),
    }.items():
        rows = [p[:, s].squeeze(1).t() for p, s in zip(mapped, speaks.split(layout.lengths), strict=True)]
        assert_close(stats[stat], torch.cat(rows).reshape(stats[stat].shape), **TIGHT)


def from_chosen(q, k, tokens, chosen, **rules):
    marked = tokens.with_column(RATER, chosen)
    stats = attention_stats.attention_stats(q, k, k, marked, SCALE, Stat.FROM_RATERS, **rules)
    return stats[Stat.FROM_RATERS]


@given(heads(), st.sampled_from([0.0, 0.3, 1.0]), st.booleans(), seeds)
def test_attention_from_chosen_queries(drawn, share, causal, seed):
    layout, q, k, _, bias, apart = drawn
    g = generator(seed)
    tokens = packed(layout, 2, 0.2, False, causal, 1.0, g)
    chosen, keep_prob = (torch.rand(layout.total, generator=g, dtype=torch.float64) for _ in range(2))
    chosen = chosen < share
    room = {"causal": causal, "key_bias": bias, "pairs": apart and apart.pairs}
    maps = list(whole_maps(q, k, layout, layout, causal=causal, bias=bias, apart=apart))
    for soft in (None, keep_prob):
        weight = chosen.double() if soft is None else chosen * soft
        expected = [
            w @ p.mean(0) / max(w.sum(), 1e-300) for p, w in zip(maps, weight.split(layout.lengths), strict=True)
        ]
        received = from_chosen(q, k, dataclasses.replace(tokens, keep_prob=soft), chosen, **room)
        assert_close(received, torch.cat(expected), **TIGHT)


def test_attention_from_chosen_queries_has_gradients_and_is_in_single_precision():
    layout, g = Layout((5, 3)), generator(0)
    tokens, chosen = packed(layout, 2, 0.2, False, True, 1.0, g), layout.slot % 3 == 1
    q, k = (torch.randn(8, HEADS, HEAD_DIM, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(q, k):
        return from_chosen(q, k, tokens, chosen, causal=True)

    assert torch.autograd.gradcheck(run, (q, k), fast_mode=True)
    half = [t.detach().to(torch.bfloat16) for t in (q, k)]
    with torch.autocast("cpu", torch.bfloat16):
        received = run(*half)
    assert_close(received, run(*(t.float() for t in half)), rtol=1e-6, atol=1e-7)


def test_large_instances_in_single_precision():
    """Longer than a block of rows, beside a short one, against the maps in double precision."""
    layout, g = Layout((300, 5)), generator(0)
    tokens = packed(layout, 2, 0.2, True, False, 1.0, g)
    q, k, v = (torch.randn(layout.total, HEADS, HEAD_DIM, generator=g) for _ in range(3))
    stats = attend_with_stats(q, k, v, tokens, SCALE, EVERY)[1]
    exact = attend_with_stats(q.double(), k.double(), v.double(), tokens, SCALE, EVERY)[1]
    maps = whole_maps(q.double(), k.double(), layout, layout)
    marks = (tokens.free, tokens.summary, tokens.columns["modality"], tokens.columns[RATER])
    columns = (t.split(layout.lengths) for t in (k.double(), v.double(), *marks))
    instances = list(zip(maps, *columns, strict=True))
    for stat in EVERY_ONE:
        expected = torch.cat([written_out(stat, *instance) for instance in instances])
        assert_close(exact[stat], expected, **TIGHT)
        assert_close(stats[stat].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(dtype, causal):
    """Statistics are those of the same numbers in single precision, under autocast too; outputs alone are in half."""
    tokens, g = packed(Layout((5, 3)), 2, 0.2, True, causal, 1.0, generator(0)), generator(1)
    q, k, v = (torch.randn(8, HEADS, HEAD_DIM, generator=g).to(dtype) for _ in range(3))
    with torch.autocast("cpu", dtype):
        stats = attend_with_stats(q, k, v, tokens, SCALE, EVERY, causal=causal)[1]
    exact = attend_with_stats(q.float(), k.float(), v.float(), tokens, SCALE, EVERY, causal=causal)[1]
    for stat in EVERY_ONE:
        rounded = {"rtol": 0.02, "atol": 0.02} if stat is Stat.CONTEXT else {"rtol": 1e-6, "atol": 1e-7}
        assert stats[stat].dtype is torch.float32, stat
        assert_close(stats[stat], exact[stat], **rounded)


@pytest.mark.parametrize("causal", [False, True])
def test_an_instance_alone_is_as_in_its_batch(causal):
    layout, g = Layout((7, 2, 7, 1)), generator(0)
    tokens = packed(layout, 2, 0.2, True, causal, 1.0, g)
    q, k, v = (torch.randn(layout.total, HEADS, HEAD_DIM, generator=g) for _ in range(3))
    together = attend_with_stats(q, k, v, tokens, SCALE, EVERY, causal=causal)[1]
    for i, rows in enumerate(torch.arange(layout.total).split(layout.lengths)):
        one = tokens.select_instances([i])
        alone = attend_with_stats(q[rows], k[rows], v[rows], one, SCALE, EVERY, causal=causal)[1]
        for stat in EVERY_ONE:
            assert_close(alone[stat], together[stat][rows], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("of", [0.0, 1e4])
def test_gradients_are_finite_where_nothing_and_where_everything_stands_out(of):
    tokens, g = packed(Layout((5, 3)), 2, 0.2, True, False, 1.0, generator(0)), generator(1)
    q, k, v = (of * torch.randn(8, HEADS, HEAD_DIM, generator=g) for _ in range(3))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    stats = attend_with_stats(*inputs, tokens, SCALE, EVERY)[1]
    for gradient in torch.autograd.grad(sum(value.sum() for value in stats.values.values()), inputs):
        assert gradient.isfinite().all()


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


@pytest.mark.parametrize("stat", list(Stat))
def test_only_what_was_asked_for_is_there(stat):
    layout = Layout((2, 3))
    tokens = packed(layout, 2, 0.0, True, False, 1.0, generator(0))
    q = torch.randn(5, HEADS, HEAD_DIM)
    _, stats = attend_with_stats(q, q, q, tokens, SCALE, stat, text=q[:2])
    assert list(stats.values) == [stat]
    other = next(s for s in Stat if s is not stat)
    with pytest.raises(LookupError, match=f"Stat.{other.name} was not computed: add it to the part's `needs`"):
        stats[other]


def test_statistics_of_what_a_plan_leaves():
    stats = AttentionStats(Stat.KEY | Stat.COLUMN, {Stat.KEY: torch.arange(6.0).view(3, 2), Stat.COLUMN: torch.ones(3)})
    fewer = stats.mapped(lambda value: value[:2] * 2)
    assert fewer.requested == stats.requested
    assert fewer[Stat.KEY].tolist() == [[0, 2], [4, 6]]
    assert fewer[Stat.COLUMN].tolist() == [2, 2]


@given(heads(), shares, st.booleans(), seeds)
def test_text(drawn, protect, half, seed):
    """A softmax over the unprotected tokens of the instance, head by head, and the same for an instance alone."""
    layout, _, k, _, bias, _ = drawn
    tokens, g = packed(layout, 2, protect, False, False, 1.0, generator(seed)), generator(seed)
    text = torch.randn(layout.batch, HEADS, HEAD_DIM, generator=g, dtype=torch.float64)
    if half:
        k, text = k.half().double(), text.half().double()

    def run(text, k, tokens, bias, dtype=torch.float64):
        given = {"text": text.to(dtype), "key_bias": bias}
        return attend_with_stats(k.to(dtype), k.to(dtype), k.to(dtype), tokens, SCALE, Stat.FROM_QUERY, **given)[1][
            Stat.FROM_QUERY
        ]

    found = run(text, k, tokens, bias)
    rows = torch.arange(layout.total).split(layout.lengths)
    for i, row in enumerate(rows):
        free = [j for j in row.tolist() if not tokens.protected[j]]
        for h in range(HEADS):
            logits = [
                math.exp(SCALE * float(k[j, h] @ text[i, h]) + (0 if bias is None else float(bias[j]))) for j in free
            ]
            expected = {j: logit / sum(logits) for j, logit in zip(free, logits, strict=True)}
            assert_close(
                found[row, h], torch.tensor([expected.get(j, 0.0) for j in row.tolist()], dtype=torch.float64), **TIGHT
            )
        alone = run(text[i : i + 1], k[row], tokens.select_instances([i]), None if bias is None else bias[row])
        assert_close(alone, found[row], **TIGHT)
    if half:
        assert_close(run(text, k, tokens, bias, torch.float16).double(), found, rtol=1e-4, atol=1e-6)


@given(heads(), st.booleans(), st.booleans(), seeds)
def test_statistics_without_the_output_are_those_beside_it(drawn, causal, with_map, seed):
    layout, q, k, v, bias, apart = drawn
    tokens = packed(layout, 2, 0.2, True, causal, 1.0, generator(seed))
    room = {"causal": causal, "key_bias": bias, "pairs": apart and apart.pairs}
    needs = EVERY if with_map else EVERY & ~EVERY.with_output
    alone = attention_stats.attention_stats(q, k, v, tokens, SCALE, needs, **room)
    _, beside = attend_with_stats(q, k, v, tokens, SCALE, needs, **room)
    assert alone.requested == beside.requested and alone.values.keys() == beside.values.keys()
    assert all(torch.equal(alone[stat], beside[stat]) for stat in alone.values)


def test_the_last_token_is_the_one_that_a_column_marks():
    layout, g = Layout((4, 3)), generator(1)
    q, k = (torch.randn(7, HEADS, HEAD_DIM, generator=g) for _ in range(2))
    tokens = packed(layout, 2, 0.2, True, True, 1.0, generator(0))
    marked = tokens.with_column("last", torch.tensor([0, 1, 0, 0, 0, 0, 1]).bool())
    found = attend_with_stats(q, k, k, marked, SCALE, Stat.LAST, causal=True)[1][Stat.LAST]
    maps = list(whole_maps(q, k, layout, layout, causal=True))
    assert_close(found, torch.cat([maps[0][:, 1].t(), maps[1][:, 2].t()]), rtol=1e-5, atol=1e-6)


def test_text_has_gradients_and_is_needed():
    tokens, g = packed(Layout((4, 3)), 2, 0.2, True, False, 1.0, generator(0)), generator(1)
    k, text = (torch.randn(n, HEADS, HEAD_DIM, generator=g, dtype=torch.float64, requires_grad=True) for n in (7, 2))
    assert torch.autograd.gradcheck(
        lambda text, k: attend_with_stats(k, k, k, tokens, SCALE, Stat.FROM_QUERY, text=text)[1][Stat.FROM_QUERY],
        (text, k),
    )
    with pytest.raises(ValueError, match=r"Stat.FROM_QUERY is the attention of a text, and there is none: .* text="):
        attend_with_stats(k, k, k, tokens, SCALE, Stat.FROM_QUERY)


def test_macs_are_those_of_rows_and_of_steps():
    assert (Stat.KEY | Stat.RECEIVED | Stat.COLUMN).macs(12, 64) == (0, 0, 0)
    assert (Stat.SUMMARY | Stat.LAST).macs(12, 64) == (2 * 12 * 64, 0, 0)
    assert (Stat.SUMMARY_WIDE | Stat.PAGERANK).macs(12, 64) == (12 * 64, 30 * 12, 0)
    assert (Stat.FROM_TEXT | Stat.VALUE).macs(12, 64) == (0, 0, 12 * 64)
    assert (Stat.FROM_TEXT | Stat.FROM_RATERS).macs(12, 64) == (0, 0, 2 * 12 * 64)
    assert (Stat.FROM_QUERY | Stat.VALUE).macs(12, 64) == (12 * 64, 0, 0)


def test_nothing_asked_nothing_computed():
    with pytest.raises(LookupError):
        AttentionStats()[Stat.KEY]


@pytest.mark.parametrize("stat", [Stat.SUMMARY, Stat.SUMMARY_WIDE])
def test_summary_needs_a_summary_token(stat):
    tokens = packed(Layout((2, 3)), 2, 0.0, False, False, 1.0, generator(0))
    q = torch.randn(5, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=f"Stat.{stat.name} needs a summary token"):
        attend_with_stats(q, q, q, tokens, SCALE, stat)


def test_attention_from_a_text_needs_tokens_of_both_modalities():
    tokens = strategies.packed(Layout((2, 3)), 2, 0.0, False, False, 1.0, generator(0))
    q = torch.randn(5, HEADS, HEAD_DIM)
    with pytest.raises(LookupError, match="of one modality"):
        attend_with_stats(q, q, q, tokens, SCALE, Stat.FROM_TEXT)
    with pytest.raises(LookupError, match="no column 'rater'"):
        attend_with_stats(q, q, q, tokens, SCALE, Stat.FROM_RATERS)


@pytest.mark.parametrize("needs", [Stat.NONE, Stat.RECEIVED | Stat.COLUMN | Stat.DIAGONAL | Stat.PAGERANK])
@pytest.mark.parametrize("sizes", [(300, 300), (300, 70)])
def test_dropout_hits_the_weights_and_keeps_their_mean(needs, sizes):
    """With every value one, a row's output is the kept share of its weights over 1 - p: mean 1, and seldom 1 exactly."""
    tokens = packed(Layout(sizes), 2, 0.0, True, False, 1.0, generator(0))
    q = torch.randn(sum(sizes), HEADS, HEAD_DIM, generator=generator(2))
    out, stats = attend_with_stats(q, q, torch.ones_like(q), tokens, SCALE, needs, dropout=0.5)
    clean = attend_with_stats(q, q, torch.ones_like(q), tokens, SCALE, needs)[1]
    assert (out - 1).abs().mean() > 0.02
    assert abs(out.mean().item() - 1) < 0.03  # five deviations; unscaled it would be off by a half
    for stat, value in stats.values.items():
        assert torch.equal(value, clean[stat])  # scores are of the clean map
