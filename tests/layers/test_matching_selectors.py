"""Selectors that match: what their comparisons cost, and what becomes of more than half of the tokens."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vltprune import AttentionStats, BlockSpec, PackedTokens, Selection, Stat, reducers, scorers, selectors

SPEC = BlockSpec("image", 1, 4, 8, 2, has_summary=False)
MATCHING = [name for name in selectors.names() if selectors[name].matches]


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
