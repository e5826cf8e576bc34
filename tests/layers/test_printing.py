"""What `print` shows of a pruned model: where it is pruned, and by which parts, with their arguments."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from small_models import small

import vltprune as vp

CONFIG = {"scorer": "alignment", "keep": "ratio", "reducer": "drop", "guide": "codebook(anchors=4)"}
KINDS = {"scorer": vp.scorers, "keep": vp.keepers, "reducer": vp.reducers}
PARTS = [(kind, registry, name) for kind, registry in KINDS.items() for name in registry.names()]


@pytest.mark.parametrize(("kind", "registry", "name"), PARTS)
def test_each_part_shows_its_arguments(kind, registry, name):
    pruned = vp.prune(
        small("vit").model, vp.PruneConfig(**{**CONFIG, kind: "count(count=4)" if name == "count" else name})
    )
    _, *arguments = inspect.signature(registry[name]).parameters
    shown = repr(pruned).partition(f" {registry[name].__name__}(")[2][
        :200
    ]  # on a line of its own where it has children
    assert all(f"{argument}=" in shown for argument in arguments)


def test_a_model_shows_where_it_is_pruned_and_by_what():
    pruned = vp.prune(small("blip").model, "madtp", keep="ratio(ratio=0.6)", at=(1, 3), guide="codebook(anchors=7)")
    text = repr(pruned)
    assert "tower='image', at=(1, 3)" in text
    assert "Ratio(ratio=0.6, decay=" in text
    assert "Codebook(\n" in text and "anchors=7, dim=None, project=True, attend='softmax'" in text


def test_what_was_set_since_is_shown():
    pruned = vp.prune(copy.deepcopy(small("vit").model), "random", keep="count(count=9)")  # which others have, too
    for pruner in pruned.pruners.values():
        pruner.keeper.count = 5
    assert "Count(count=5)" in repr(pruned)
    assert "count=9" not in repr(pruned)
    with torch.device("meta"):
        repr(pruned.to("meta"))
