"""What `print` shows of parts and of a pruned model: where it is pruned, and by which parts, with their arguments."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from registered import registered
from small_models import SCORERS, guide_for, small
from torch import nn

import vltprune as vp
from vltprune.pruning.part import KINDS

CONFIG = {"scorer": "alignment", "keep": "ratio", "reducer": "drop", "guide": "codebook(anchors=4)"}
NEED_BOTH = set(vp.scorers.names()) - set(SCORERS)  # which towers of one modality cannot have
PARTS = [(kind, name) for kind, (registry, _) in KINDS.items() for name in registry.names() if name not in NEED_BOTH]
SPEC = vp.BlockSpec("image", 1, 3, 8, 2, has_summary=True, before=1)


def build(kind, name, *values, **named):
    return KINDS[kind][0][name]({"image": SPEC} if kind == "guide" else SPEC, *values, **named)


def arguments(kind, name):
    """Each argument besides the spec, with its default, and 4 where it has none."""
    _, *rest = inspect.signature(KINDS[kind][0][name]).parameters.values()
    return {p.name: 4 if p.default is p.empty else p.default for p in rest}


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_each_part_shows_its_arguments_however_it_was_built(kind, name):
    args = arguments(kind, name)
    words = ", ".join(f"{name}={value!r}" for name, value in args.items())
    parts = [build(kind, name, *args.values()), build(kind, name, **args)]
    for part in (*parts, copy.deepcopy(parts[0])):
        assert part.extra_repr() == words
        assert words in repr(part)
    spec = vp.Part(name, args)
    guide = guide_for(name if kind == "scorer" else "", CONFIG["guide"])
    pruned = vp.prune(small("vit").model, vp.PruneConfig(**{**CONFIG, "guide": guide, kind: spec}))
    assert words in repr(pruned)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in PARTS if kind == "keep"])
def test_a_knob_is_shown_as_it_is_set(kind, name):
    keeper = build(kind, name, **arguments(kind, name))
    if keeper.knob is not None:
        setattr(keeper, keeper.knob.name, 0.125)
        assert f"{keeper.knob.name}=0.125" in repr(keeper)


def test_a_part_of_ones_own_shows_its_arguments():
    class Weighted(vp.TokenScorer):
        """Another scorer's scores, times a weight that is learned."""

        def __init__(self, spec, weight: float = 1.0, *, label: str = "mine"):
            super().__init__(spec)
            self.weight = nn.Parameter(torch.tensor(weight))

        def forward(self, tokens, stats, guidance):
            return self.weight * tokens.x.norm(dim=-1)

    with registered(vp.scorers, weighted=Weighted, half=lambda spec: Weighted(spec, 0.5)):
        for scorer, weight in (("weighted(0.25)", 0.25), ("half", 0.5)):
            pruned = vp.prune(small("vit").model, "random", scorer=scorer)
            assert f"Weighted(weight={weight}, label='mine')" in repr(pruned)
        with torch.no_grad():
            pruned.pruners["0"].scorer.weight.fill_(0.75)
        assert "Weighted(weight=0.75, label='mine')" in repr(pruned)


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
