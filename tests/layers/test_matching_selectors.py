"""Selectors that match: what their comparisons cost, and what becomes of more than half of the tokens."""

from __future__ import annotations

import inspect

import pytest
import torch
from small_models import small
from torch.utils.flop_counter import FlopCounterMode

import vltprune as vp
from vltprune import AttentionStats, BlockSpec, PackedTokens, Selection, Stat, reducers, scorers, selectors
from vltprune.layers.algorithms import choosing, matching

SPEC = BlockSpec("image", 1, 4, 8, 2, has_summary=False)
# `clusters` measures distances, of which torch counts nothing
MATCHING = [name for name in selectors.names() if selectors[name].matches and name != "clusters"]


def inputs(n: int) -> tuple[PackedTokens, AttentionStats]:
    g = torch.Generator().manual_seed(n)
    stats = {Stat.KEY: torch.randn(n, 4, generator=g), Stat.COLUMN: torch.rand(n, generator=g)}
    return PackedTokens.pack(torch.randn(1, n, 8, generator=g)), AttentionStats(Stat.KEY | Stat.COLUMN, stats)


def counted(run) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("n", [13, 14])
@pytest.mark.parametrize("removed", [4, 11])
@pytest.mark.parametrize("name", MATCHING)
def test_macs_of_comparisons(name, removed, n):
    """One instance alone: what torch counts; the further matching where more than half go, too."""
    part, (tokens, stats) = selectors[name](SPEC), inputs(n)
    counts = torch.tensor([n - removed])
    found = counted(lambda: part(tokens, torch.rand(n), counts, stats))
    assert found == float(part.macs(torch.tensor([float(n)]), torch.tensor([float(n - removed)])))


def test_macs_of_clusters_are_those_of_all_distances():
    assert selectors["clusters"](SPEC).macs(torch.tensor([13.0]), torch.tensor([9.0])).tolist() == [8 * 13**2]


def test_every_part_that_compares_features_names_them_alike():
    """By one argument, `by`; other values are refused with the part's name and what to write."""
    for registry in (scorers, selectors, reducers):
        for name in registry.names():
            taken = inspect.signature(registry[name]).parameters
            assert "features" not in taken
            if "by" in taken:
                with pytest.raises(ValueError, match=rf"{name}\(by='x'\): write by='content'.*, or by='key'"):
                    registry[name](SPEC, by="x")


@pytest.mark.parametrize("by", ["key", "content"])
def test_macs_of_the_nearest_and_of_edges(by):
    (tokens, stats), n = inputs(13), torch.tensor([13.0])
    merge, scorer = reducers["merge"](SPEC, by=by), scorers["pair_distance"](SPEC, by=by)
    selection = Selection(torch.arange(13) < 8)
    assert counted(lambda: merge(tokens, torch.rand(13), selection, stats)) == float(merge.macs(n, n - 5))
    assert counted(lambda: scorer(tokens, stats, None)) == float(scorer.macs(n, n))


@pytest.mark.parametrize("name", MATCHING)
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_more_than_half_go(name, count):
    """As many stay as were asked for, and each of the others goes into one of them."""
    tokens, stats = inputs(13)
    selection = selectors[name](SPEC)(tokens, torch.rand(13), torch.tensor([count]), stats)
    assert int(selection.keep.sum()) == count
    assert selection.keep[selection.match].all() or not count


def test_mlerp_has_the_largest_norm_of_its_sources():
    tokens, stats = inputs(5)
    selection = Selection(torch.tensor([True, True, False, False, True]), torch.tensor([0, 1, 0, 0, 4]))
    plan = reducers["tofu"](SPEC, merge_from=0.0)(tokens, torch.ones(5), selection, stats)
    mean, out = tokens.x[[0, 2, 3]].mean(0), plan.values(tokens.x)
    torch.testing.assert_close(out[0], mean / mean.norm() * tokens.x[[0, 2, 3]].norm(dim=1).max())
    assert torch.equal(out[1:], tokens.x[[1, 4]])


def as_on_an_accelerator(monkeypatch):
    """Where no tensor may be read to see whether there is anything to do."""
    monkeypatch.setattr("vltprune.core.precision.surely_none", lambda true: False)


@pytest.mark.parametrize("name", ["bipartite", "energy", "graph"])
@pytest.mark.parametrize("keep", ["remove(r=2)", "ratio(ratio=0.5)", "random_ratio(mean=0.75, half_width=0.2)"])
def test_known_counts_spare_the_further_matching(monkeypatch, name, keep):
    """Where half of the tokens or fewer go, and the counts are numbers, only the matching itself runs."""
    model = vp.prune(small("vit").model, "tome", keep=keep, selector=name)
    inputs, called, graph = small("vit").draw(3), [], matching.graph
    with torch.no_grad():
        expected = model(*inputs)
        as_on_an_accelerator(monkeypatch)
        monkeypatch.setattr(matching, "graph", lambda *args: called.append(len(args)) or graph(*args))
        assert torch.equal(model(*inputs), expected)
    assert not called if name != "graph" else {*called} == {4}  # its own, with importance


@pytest.mark.parametrize("keep", ["ratio(ratio=0.3)", "random_ratio(mean=0.4, half_width=0.2)"])
def test_more_than_half_go_by_the_further_matching(monkeypatch, keep):
    model = vp.prune(small("vit").model, "tome", keep=keep)
    inputs = small("vit").draw(3)
    with torch.no_grad():
        expected = model(*inputs)
        as_on_an_accelerator(monkeypatch)
        assert torch.equal(model(*inputs), expected)


@pytest.mark.parametrize("selector", ["max_min", "dpp", "deduplicate"])
def test_choices_are_as_many_as_the_largest_count(monkeypatch, selector):
    parts = {"keep": "random_ratio(half_width=0.3)", "reducer": "drop", "selector": selector}
    model = vp.prune(small("vit").model, "evit", at=(1,), **parts)
    asked, most_of = [], choosing.most_of
    monkeypatch.setattr(choosing, "most_of", lambda *args: asked.append(args[2]) or most_of(*args))
    with torch.no_grad(), vp.collect() as traces:
        model(*small("vit").draw(4))
    assert asked == [max(traces[0].lengths[1]) - 1]  # the class token is not chosen
