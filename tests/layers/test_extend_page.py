"""Parts written in docs/extend.md: they keep the invariants of built-in parts, and do what no built-in part does."""

from __future__ import annotations

import pages
import pytest
from small_models import SCORERS

import vltprune as vp


@pytest.fixture(scope="module", autouse=True)
def page():
    """The names of the page's code, as far as the section on hosts."""
    with pages.run(pages.ROOT / "docs" / "extend.md", until="## Host") as names:
        yield names


@pytest.mark.parametrize(
    ("registry", "name"),
    [
        (vp.scorers, "key_novelty"),
        (vp.keepers, "effective"),
        (vp.selectors, "even_first"),
        (vp.reducers, "into_previous"),
        (vp.guides, "cosine"),
    ],
)
def test_parts_keep_the_invariants(registry, name):
    report = vp.check_part(registry[name])
    assert report.passed, report


def test_scorer_and_keeper_do_what_no_built_in_does(page):
    """On one tower and one batch, other tokens stay than under any built-in scorer, and other counts than under any keeper."""
    config = vp.preset("evit").replace(guide="codebook(anchors=8)", at=2)
    mine = {"key_novelty": {"scorer": "key_novelty"}, "effective": {"keep": "effective(scale=0.4)"}}
    for name, parts in mine.items():
        (kind, _) = next(iter(parts.items()))
        others = SCORERS if kind == "scorer" else vp.keepers.names()
        kept = _kept(page, config.replace(**parts))
        for other in others:
            if other not in mine and other not in ("count", "query_attention"):
                assert _kept(page, config.replace(**{kind: other})) != kept, (name, other)


def _kept(page, config):
    model = vp.prune(page["dense"], config)
    vp.fit_guide(model, [page["images"]])
    with vp.collect() as traces:
        model(page["images"])
    return traces[0].layers[2].position.tolist(), traces[0].lengths
