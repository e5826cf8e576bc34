"""Parts written in docs/extend.md: they keep the invariants of built-in parts, and do what no built-in part does."""

from __future__ import annotations

import hypothesis.strategies as st
import invariants
import pages
import pytest
import torch
from hypothesis import given
from strategies import cases, seeds

import vltprune as vp


@pytest.fixture(scope="module", autouse=True)
def page():
    """The names of the page's code, as far as the section on hosts."""
    with pages.run(pages.ROOT / "docs" / "extend.md", until="## Host") as names:
        yield names


@given(case=cases(), seed=seeds)
def test_scorer(case, seed):
    invariants.scorer("key_novelty", {"power": 2.0}, case, seed)


@given(case=cases(), values=st.tuples(st.floats(0, 4), st.floats(0, 4)))
def test_keeper(case, values):
    invariants.keeper("effective", {"scale": values[0]}, case)
    invariants.keeper_is_monotone("effective", {}, case, values)


@given(case=cases(), seed=seeds)
def test_guide(case, seed):
    invariants.guide("cosine", {}, case, seed)


@given(case=cases(), data=st.data())
def test_reducer(case, data):
    """Counts as asked, down to half of the tokens; sizes and sums of contents stay; batch mates change nothing."""
    tokens, layout = case.tokens, case.tokens.layout
    counts = torch.tensor([data.draw(st.integers(0, n + 1)) for n in layout.lengths])
    out = _merged(case, counts)
    size = torch.ones(layout.total) if out is tokens else out.size
    for i, free in enumerate(tokens.free.split(layout.lengths)):
        left = int(out.free[out.layout.instance == i].sum())
        assert min(int(counts[i]), int(free.sum())) <= left
        assert size[out.layout.instance == i].sum() == layout.lengths[i]
        total = tokens.x[layout.instance == i].sum(0)
        torch.testing.assert_close((out.x * size[:, None])[out.layout.instance == i].sum(0), total, atol=1e-4, rtol=0)
        alone = _merged(case.instances([i]), counts[[i]])
        torch.testing.assert_close(alone.x, out.x[out.layout.instance == i], **invariants.CLOSE)
    assert torch.equal(out.x[out.protected], tokens.x[tokens.protected])


def _merged(case, counts):
    part = vp.reducers["merge_pairs"](case.spec)
    plan = part(case.tokens, case.scores, counts, case.stats)
    if plan is None:
        return case.tokens
    assert torch.equal(plan.target()[plan.index], torch.arange(plan.layout.total))
    return plan.tokens(case.tokens)


def test_scorer_and_keeper_do_what_no_built_in_does(page):
    """On one tower and one batch, other tokens stay than under any built-in scorer, and other counts than under any keeper."""
    config = vp.preset("evit").replace(guide="codebook(anchors=8)", at=2)
    mine = {"key_novelty": {"scorer": "key_novelty"}, "effective": {"keep": "effective(scale=0.5)"}}
    for name, parts in mine.items():
        (kind, _) = next(iter(parts.items()))
        registry = vp.scorers if kind == "scorer" else vp.keepers
        kept = _kept(page, config.replace(**parts))
        for other in registry.names():
            if other not in mine and other != "count":
                assert _kept(page, config.replace(**{kind: other})) != kept, (name, other)


def _kept(page, config):
    model = vp.prune(page["dense"], config)
    vp.fit_guide(model, [page["images"]])
    with vp.collect() as traces:
        model(page["images"])
    return traces[0].layers[2].position.tolist(), traces[0].lengths
