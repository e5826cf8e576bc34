"""Invariants of keepers."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from .. import registry
from ..layers import KeepRatioPredictor
from ..layers.keepers.base import with_statistics
from .cases import Case
from .invariant import Broken, CheckedPart, Kind, Results, expect, first_where, invariant, shown


@invariant(
    "counts",
    "return int64 counts [batch] from 0 to the number of unprotected tokens: "
    "counts.long().clamp(min=0).minimum(segments.count(tokens.free, tokens.layout))",
    first=True,
)
def counts(part: CheckedPart, case: Case) -> None:
    """Counts are whole numbers, one for each instance, none negative and none above what there is."""
    found = part.call(case)
    expect(isinstance(found, Tensor), "a tensor of counts", type(found).__name__)
    expect(found.shape == (case.batch,), f"counts of shape [{case.batch}]", f"shape {list(found.shape)}")
    expect(found.dtype == torch.int64, "counts of dtype int64", found.dtype)
    expect((found >= 0).all(), "no negative count", found)
    available = torch.tensor(case.available)
    if (found > available).any():
        i = first_where(found > available)
        raise Broken(
            f"at most {available[i]} of the {available[i]} unprotected tokens of instance {i}",
            f"{found[i]} ({shown(found)})",
        )


@invariant("knob", "hold the knob's value in the attribute of its name, and declare whether larger values keep more")
def knob(part: CheckedPart, case: Case) -> None:
    """Calibration sets the knob by its attribute, and a value that keeps more keeps no fewer of any instance."""
    keeper = part.build(case.spec, part.args)
    if keeper.knob is None:
        return
    name, draw = keeper.knob.name, random.Random(case.settings.seed)
    low, high = sorted(keeper.knob.value_at(draw.choice((0.0, 1.0, draw.random()))) for _ in range(2))
    kept = {value: _set_knob(part, case, keeper, value) for value in (low, high)}
    fewer, more = (low, high) if keeper.knob.larger_keeps_more else (high, low)
    expect(
        (kept[fewer] <= kept[more]).all(),
        f"with {name} = {fewer:.6g} no more than the {shown(kept[more])} of {name} = {more:.6g}",
        kept[fewer],
    )


def _set_knob(part: CheckedPart, case: Case, keeper: KeepRatioPredictor, value: float) -> Tensor:
    """The counts of a keeper whose knob is set, which are those of one that is built with the value."""
    assert keeper.knob is not None
    name, cast = keeper.knob.name, case.to(part.dtype)
    expect(hasattr(keeper, name), f"the knob's value as the attribute {name!r}", "no such attribute")
    setattr(keeper, name, value)
    found = part.kind.call(keeper, cast)
    built = part.kind.call(part.build(case.spec, {**part.args, name: value}), cast)
    expect(torch.equal(found, built), f"after setting {name} = {value:.6g} the counts {shown(built)}", found)
    return found


class Keepers(Kind):
    """Keepers: how many tokens of each instance stay."""

    base = KeepRatioPredictor
    registry = registry.keepers
    own = (counts, knob)

    def call(self, part: KeepRatioPredictor, case: Case, everything: bool = False) -> Tensor:
        tokens = with_statistics(case.tokens, case.stats, part.needs)
        return part(case.scores, tokens, case.guidance if everything or part.guided else None)

    def results(self, returned: Tensor, case: Case) -> Results:
        return [{"count": count} for count in returned]

    def loss(self, part: KeepRatioPredictor, case: Case) -> Tensor:
        margin = part.margin(case.scores, case.tokens, case.guidance if part.guided else None)
        return (margin * torch.linspace(1, 2, len(margin)))[case.tokens.free].sum()
