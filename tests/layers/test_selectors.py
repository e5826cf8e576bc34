"""Selectors in a ragged batch against the same choice for each instance alone, the patch grid, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from small_models import images, scrambled, small
from strategies import cases
from timm.models.vision_transformer import VisionTransformer

import vltprune as vp
from vltprune import AttentionStats, BlockSpec, PackedTokens, PruneConfig, Stat, select, selectors
from vltprune.hosts.linear_maps import measure_macs
from vltprune.layers.grid import grid, window_ids, with_grid

SPEC = BlockSpec("image", 0, 4, 8, 2, True)

# the arguments of each selector, and the indices of the free tokens [n, ...] of one instance that it must choose
CHOSEN = {
    "max_min": ({}, lambda x, key, scores, count: select.max_min(x, count)),
    "max_min of keys": ({"by": "key"}, lambda x, key, scores, count: select.max_min(key, count)),
    "dpp": ({"by": "key"}, lambda x, key, scores, count: select.dpp(key, scores, count)),
    "deduplicate": ({"important": 0.3}, lambda x, key, scores, count: select.deduplicate(x, scores, count, 0.3)),
    "pivots": ({"number": 2}, lambda x, key, scores, count: select.pivots(x, scores, count, 2)),
    "sample_cdf": ({}, lambda x, key, scores, count: select.sample_cdf(scores, count)),
    "uniform": ({}, lambda x, key, scores, count: select.spread_uniform(x, count)),
    "top": ({}, lambda x, key, scores, count: scores.argsort(descending=True, stable=True)[:count]),
}


@pytest.mark.parametrize("name", CHOSEN)
@given(case=cases())
def test_selectors_choose_among_the_free_tokens_of_each_instance(name, case):
    # drawn from -0.5 on, and attention is never negative
    scores = case.scores + 0.5
    args, chosen = CHOSEN[name]
    part = selectors[name.split()[0]](case.spec, **args)
    selection = part(case.tokens, scores, case.counts, case.stats)
    kept = selection.keep & case.tokens.free
    for i in range(case.batch):
        rows = ((case.tokens.layout.instance == i) & case.tokens.free).nonzero().flatten()
        columns = (case.tokens.x, case.stats[Stat.KEY], scores)
        expected = chosen(*(column[rows] for column in columns), int(case.counts[i])) if len(rows) else []
        assert sorted(kept[rows].nonzero().flatten().tolist()) == sorted(map(int, expected))


def test_windows_have_equal_quotas_on_the_grid():
    """A 5 x 7 grid in 3 x 3 windows behind two protected tokens: 6 windows, 2 tokens of each, 3 by score."""
    tokens = PackedTokens.pack(torch.randn(2, 37, 8), protected=torch.arange(37) < 2)
    tokens = with_grid(tokens, (50, 70))
    scores = torch.rand(74)
    keep = selectors["windows"](SPEC, 3, 0.8)(tokens, scores, torch.tensor([15, 15]), AttentionStats()).keep
    for one, s in zip(keep.view(2, 37), scores.view(2, 37), strict=True):
        expected, left = set(), set(range(35))
        for r in range(0, 5, 3):
            for c in range(0, 7, 3):
                window = [y * 7 + x for y in range(r, min(r + 3, 5)) for x in range(c, min(c + 3, 7))]
                expected |= set(sorted(window, key=lambda j: -s[2 + j])[:2])
        left = sorted(left - expected, key=lambda j: -s[2 + j])
        assert one.nonzero().flatten().tolist() == [0, 1, *sorted(2 + j for j in expected | set(left[:3]))]


@pytest.mark.parametrize(
    ("patches", "image", "columns"),
    [(6, (20, 30), 3), (6, (30, 20), 2), (9, (32, 32), 3), (1, (8, 8), 1), (8, (32, 32), None), (9, None, None)],
)
def test_grid_is_that_of_the_image_or_none(patches, image, columns):
    tokens = with_grid(
        PackedTokens.pack(torch.zeros(2, patches + 1, 4), protected=torch.arange(patches + 1) < 1), image
    )
    for row, column in zip(*(part.view(2, -1)[:, 1:].tolist() for part in grid(tokens)), strict=True):
        assert row == [-1 if columns is None else n // columns for n in range(patches)]
        assert column == [n if columns is None else n % columns for n in range(patches)]


def test_windows_without_a_grid_are_consecutive():
    tokens = PackedTokens.pack(torch.zeros(1, 10, 4))
    assert window_ids(tokens, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert torch.equal(window_ids(with_grid(tokens, None), 2), window_ids(tokens, 2))


def test_towers_give_their_tokens_the_grid_and_reductions_keep_it():
    """An oblong image; the second block sees the rows and columns that the patches of the first had."""
    sizes = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    dense = scrambled(VisionTransformer(**sizes))
    config = PruneConfig(scorer="random", keep="ratio(ratio=0.6)", selector="windows(size=2)")
    with torch.no_grad(), vp.collect(tokens=True) as traces:
        vp.prune(dense, config)(images(2)[..., :24, :].repeat(1, 1, 1, 2)[..., :40])
    for step in traces[0].layers:
        row, column = grid(step.tokens)
        assert torch.equal((row * 5 + column)[step.tokens.free], (step.position - 1)[step.tokens.free])
    assert traces[0].lengths[-1] == (7, 7)
    with torch.no_grad(), vp.collect(tokens=True) as traces:
        vp.prune(small("text").model, config)(*small("text").draw(2))
    assert (grid(traces[0].output_tokens)[0] == -1).all()


def test_nobody_else_pays_for_the_grid():
    with torch.no_grad(), vp.collect(tokens=True) as traces:
        vp.prune(small("vit").model, "random")(images(1))
    assert traces[0].output_tokens.columns == {}


@pytest.mark.parametrize(
    ("name", "args", "match"),
    [
        ("max_min", {"by": "values"}, r"max_min\(by='values'\): write by='content'.* or by='key'"),
        ("deduplicate", {"important": 1.5}, "must lie in 0 .. 1"),
        ("pivots", {"number": 0}, "must be 1 or more"),
        ("windows", {"size": 0}, "must be 1 or more"),
        ("windows", {"local": -0.1}, "must lie in 0 .. 1"),
    ],
)
def test_wrong_arguments_are_refused(name, args, match):
    with pytest.raises(ValueError, match=match):
        selectors[name](SPEC, **args)


@pytest.mark.parametrize("name", ["max_min", "dpp", "deduplicate", "pivots"])
def test_comparisons_cost_what_torch_counts(name):
    """Of one instance without protected tokens, for features of both widths."""
    tokens, scores = PackedTokens.pack(torch.randn(1, 30, 8)), torch.rand(30)
    stats = AttentionStats(Stat.KEY, {Stat.KEY: torch.randn(30, 4)})
    for by in ("content", "key"):
        part = selectors[name](SPEC, by=by)
        counted = measure_macs(part, tokens, scores, torch.tensor([12]), stats)
        # sums of products of rows, which torch's counter does not see: t of them for the choice t
        counted += 30 * sum(range(12)) if name == "dpp" else 0
        assert float(part.macs(torch.tensor([30.0]), torch.tensor([12.0]))) == counted
