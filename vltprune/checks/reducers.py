"""Invariants of reducers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import registry
from ..core.tokens import PackedTokens
from ..layers import Reduction, Selection, TokenReducer
from .cases import Case
from .invariant import Broken, CheckedPart, Kind, Results, expect, expect_same, invariant, shown
from .scorers import asked

_ATOL = 1e-4  # of weights that sum to one


@invariant(
    "a plan", "return a vltprune.Reduction, as plan_reduction builds it, or None where all tokens stay", first=True
)
def is_plan(part: CheckedPart, case: Case) -> None:
    """A reducer returns a plan or None, and the rows of a plan fit its layouts."""
    plan = part.call(case)
    if plan is None:
        return
    expect(isinstance(plan, Reduction), "a vltprune.Reduction or None", type(plan).__name__)
    total, after = case.tokens.layout.total, plan.layout.total
    expect(plan.index.shape == (after,), f"an index of its layout's {after} rows", f"shape {list(plan.index.shape)}")
    goes_to = plan.provenance()
    expect(goes_to.shape == (total,), f"the result row of each of the {total} tokens", f"shape {list(goes_to.shape)}")
    expect(
        torch.equal(goes_to[plan.index], torch.arange(after)), "each result row to hold the token at its index", goes_to
    )


@invariant("keep all", "return None where the selection keeps all tokens")
def keep_all(part: CheckedPart, case: Case) -> None:
    """Where all tokens are to stay, there is no plan, or one that changes nothing."""
    out = _reduced(part, replace(case, selection=Selection(torch.ones_like(case.selection.keep))))
    wanted = {"x": case.to(part.dtype).tokens.x, "position": case.tokens.position}
    expect_same("all tokens unchanged", [{"x": out.x, "position": out.position}], [wanted])


@invariant(
    "selection respected",
    "keep each selected token in a row of its own, unchanged unless others are merged into it",
)
def selected(part: CheckedPart, case: Case) -> None:
    """Each token that the selection keeps is a row of its own, and holds what it held unless others were merged into it."""
    plan, before, keep = part.call(case), case.to(part.dtype).tokens, case.selection.keep
    if plan is None:
        expect(keep.all(), "a plan, since the selection keeps only some tokens", None)
        return
    rows = plan.provenance()[keep]
    expect((rows >= 0).all(), "all selected tokens to stay", rows)
    expect(len(rows.unique()) == len(rows), "a row of its own for each selected token", rows)
    most = int(keep.sum()) + case.batch  # one token for all that go, in each instance
    expect(plan.layout.total <= most, f"at most {most} rows", plan.layout.total)
    whole = ~_merged(plan)[rows]
    expect(
        torch.equal(plan.values(before.x)[rows[whole]], before.x[keep][whole]), "unchanged selected tokens", "others"
    )


@invariant("protected tokens", "leave protected tokens (tokens.protected) out of what is dropped, merged or changed")
def protected(part: CheckedPart, case: Case) -> None:
    """Protected tokens stay as they are, bit for bit."""
    before, out = case.to(part.dtype).tokens, _reduced(part, case)
    kept, wanted = out.position[out.protected], before.position[before.protected]
    expect(torch.equal(kept, wanted), f"the protected tokens at {shown(wanted)} to stay", shown(kept))
    same = torch.equal(out.x[out.protected], before.x[before.protected])
    expect(same, "the contents of protected tokens, bit for bit", "other contents")
    if before.summary is not None:
        assert out.summary is not None
        same = torch.equal(out.first_where(out.summary), before.first_where(before.summary))
        expect(same, "the summary token of each instance, bit for bit", "other contents")


@invariant("order", "list rows in the order of positions")
def order(part: CheckedPart, case: Case) -> None:
    """The tokens that stay are in the order of their positions, within their instance."""
    plan, out = part.call(case), _reduced(part, case)
    for i, position in enumerate(out.position.split(out.layout.lengths)):
        expect((position.diff() > 0).all(), f"ascending positions in instance {i}", position)
    if plan is not None:
        found = case.tokens.layout.instance[plan.index]
        expect(torch.equal(found, out.layout.instance), "each row in its own instance", found)


@invariant("sizes sum", "say in `target` which row each token goes into: a row has the summed size of its sources")
def sizes(part: CheckedPart, case: Case) -> None:
    """A result row counts the original tokens that it holds, and stands at one of its sources, in causal towers at the last."""
    plan, tokens = part.call(case), case.tokens
    if plan is None:
        return
    out, goes_to = _reduced(part, case), plan.provenance()
    size = torch.ones_like(tokens.position) if tokens.size is None else tokens.size
    held = torch.zeros(out.layout.total, dtype=size.dtype).index_add(0, goes_to[goes_to >= 0], size[goes_to >= 0])
    given = torch.ones_like(out.position) if out.size is None else out.size
    expect(
        torch.equal(held, given.to(held.dtype)), f"rows of the sizes {shown(held)}, the sums of their sources", given
    )
    for row, position in enumerate(out.position.tolist()):
        sources = tokens.position[goes_to == row]
        expect(position in sources, f"row {row} at the position of a source, {shown(sources)}", position)
        if case.spec.causal:
            expect(
                position == sources.max(), f"row {row} of a causal tower at its last source, {sources.max()}", position
            )


@invariant("weights", "divide the weights of a merge by their sum, or say is_affine = False")
def weights(part: CheckedPart, case: Case) -> None:
    """The weights of a plan that may come before an affine map sum to one."""
    plan = part.call(case)
    if plan is not None and plan.is_affine:
        found = plan.values(torch.ones(case.tokens.layout.total, 2))
        expect(((found - 1).abs() < _ATOL).all(), "weights of each row that sum to 1", found[:, 0])


@invariant("gradients of tokens", "compute contents from those of the sources, without detaching them")
def token_gradients(part: CheckedPart, case: Case) -> None:
    """Gradients reach every token that stays, and no token that is dropped."""
    plan = part.call(case)
    if plan is None:
        return
    x = case.to(part.dtype).tokens.x.clone().requires_grad_()
    plan.values(x).sum().backward()
    if x.grad is None:
        raise Broken("gradients to the tokens", "none")
    expect(x.grad.isfinite().all(), "finite gradients to the tokens", x.grad)
    expect((x.grad[plan.provenance() < 0] == 0).all(), "no gradient to dropped tokens", x.grad)
    expect((x.grad[plan.index[~_merged(plan)]] != 0).all(), "a gradient to every token that stays", x.grad)


class Reducers(Kind):
    """Reducers: what becomes of the tokens that go."""

    base = TokenReducer
    registry = registry.reducers
    own = (is_plan, keep_all, selected, protected, order, sizes, weights, token_gradients)

    def call(self, part: TokenReducer, case: Case, everything: bool = False) -> Reduction | None:
        return part(case.tokens, case.scores, case.selection, case.stats if everything else asked(part, case))

    def results(self, returned: Reduction | None, case: Case) -> Results:
        out = returned.tokens(case.tokens) if returned is not None else case.tokens
        columns = zip(out.x.split(out.layout.lengths), out.position.split(out.layout.lengths), strict=True)
        return [{"position": position, "x": x} for x, position in columns]

    def loss(self, part: TokenReducer, case: Case) -> Tensor:
        plan = self.call(part, case)
        out = plan.tokens(case.tokens) if plan is not None else case.tokens
        return (out.x * torch.linspace(1, 2, out.layout.total)[:, None]).sum()


def _reduced(part: CheckedPart, case: Case) -> PackedTokens:
    """The tokens after the plan that a reducer makes."""
    plan, tokens = part.call(case), case.to(part.dtype).tokens
    return tokens if plan is None else plan.tokens(tokens)


def _merged(plan: Reduction) -> Tensor:
    """The result rows that other tokens were merged into: [new total] bool."""
    return torch.zeros(plan.layout.total, dtype=torch.bool) if plan.merged is None else plan.merged
