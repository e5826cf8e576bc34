"""Invariants of selectors."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from ..layers import Selection, TokenSelector
from .cases import Case
from .invariant import CheckedPart, Kind, Results, expect, invariant
from .scorers import asked


@invariant(
    "a selection", "return vltprune.Selection with keep [total] bool, and match [total] int64 or None", first=True
)
def is_selection(part: CheckedPart, case: Case) -> None:
    """A selector returns a selection of the tokens of the batch."""
    selection, total = part.call(case), case.tokens.layout.total
    expect(isinstance(selection, Selection), "a vltprune.Selection", type(selection).__name__)
    for name, column, dtype in (("keep", selection.keep, torch.bool), ("match", selection.match, torch.int64)):
        if column is not None or name == "keep":
            expect(isinstance(column, Tensor), f"a tensor {name}", type(column).__name__)
            expect(column.shape == (total,), f"{name} of shape [{total}]", f"shape {list(column.shape)}")
            expect(column.dtype == dtype, f"{name} of dtype {dtype}", column.dtype)


@invariant("protected tokens", "keep all protected tokens: tokens.protected | ...")
def protected(part: CheckedPart, case: Case) -> None:
    """Protected tokens stay."""
    kept = part.call(case).keep[case.tokens.protected]
    expect(kept.all(), "all protected tokens to stay", kept)


@invariant(
    "counts respected", "keep at most `counts` unprotected tokens of each instance, and all where there are no more"
)
def counts(part: CheckedPart, case: Case) -> None:
    """No more unprotected tokens stay than were asked for; all of them where they are no more; one where any was asked for."""
    keep = part.call(case).keep & case.tokens.free
    kept = [int(one.sum()) for one in keep.split(case.tokens.layout.lengths)]
    for i, (found, wanted, available) in enumerate(zip(kept, case.counts.tolist(), case.available, strict=True)):
        least = available if wanted >= available else min(wanted, 1)
        most = min(wanted, available)
        expect(least <= found <= most, f"{least} to {most} unprotected tokens of instance {i} to stay", found)


@invariant(
    "matches", "match a token that goes with an unprotected one of its instance that stays, and others with themselves"
)
def matches(part: CheckedPart, case: Case) -> None:
    """A token that goes resembles one of its own instance that stays and is unprotected; one that stays, itself."""
    selection, layout, free = part.call(case), case.tokens.layout, case.tokens.free
    keep, match = selection.keep, selection.match
    if match is None:
        return
    expect(torch.equal(match[keep], torch.arange(layout.total)[keep]), "tokens that stay to match themselves", match)
    some = torch.zeros(layout.batch, dtype=torch.bool).index_fill(0, layout.instance[keep & free], True)
    goes = ~keep & some[layout.instance]
    expect((keep & free)[match[goes]].all(), "matches that stay and are unprotected", match)
    expect(torch.equal(layout.instance[match[goes]], layout.instance[goes]), "matches of the same instance", match)


class Selectors(Kind):
    """Selectors: which tokens stay."""

    base = TokenSelector
    registry = registry.selectors
    own = (is_selection, protected, counts, matches)

    def call(self, part: TokenSelector, case: Case, everything: bool = False) -> Selection:
        return part(case.tokens, case.scores, case.counts, case.stats if everything else asked(part, case))

    def results(self, returned: Selection, case: Case) -> Results:
        layout = case.tokens.layout
        results = [{"keep": keep} for keep in returned.keep.split(layout.lengths)]
        if returned.match is not None:
            slots = (returned.match - layout.offsets[:-1].long()[layout.instance]).masked_fill(returned.keep, -1)
            results = [one | {"match": slot} for one, slot in zip(results, slots.split(layout.lengths), strict=True)]
        return results

    def loss(self, part: TokenSelector, case: Case) -> None:
        return None
