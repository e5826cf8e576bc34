"""What must hold of any part, of this library or registered by a user. Each takes a part by name and what to try it on.

The numbers are those of the thirteen invariants in the design: 1 counts, 2 protected tokens, 3 order, 4 an instance alone,
5 batch permutation, 6 best kept, 7 keep-all, 8 sizes, 9 monotone, 11 scores, 12 gradients. (10, pack and unpack, is a
property of tokens; 13, round trips, of configs and checkpoints.)
"""

from __future__ import annotations

import torch
from strategies import DIM, HEADS, Case
from torch import Tensor
from torch.testing import assert_close

from vltprune import (
    AttentionStats,
    BlockSpec,
    Guidance,
    PackedTokens,
    Reduction,
    Selection,
    guides,
    keepers,
    reducers,
    scorers,
    selectors,
)

CLOSE = {"rtol": 2e-5, "atol": 1e-6}  # sums in another order, single precision


def scorer(name: str, args: dict, case: Case, seed: int) -> None:
    """4, 5, 11."""
    part = scorers[name](case.spec, **args)

    def score(case: Case) -> Tensor:
        asked = {stat: value for stat, value in case.stats.values.items() if stat in part.needs}
        return part(case.tokens, AttentionStats(part.needs, asked), case.guidance if part.guided else None)

    scores, free = score(case), case.tokens.free
    assert scores.shape == (case.tokens.layout.total,)
    assert scores.dtype == case.tokens.x.dtype
    assert scores.isfinite().all()

    alone = torch.cat([score(case.instances([i])) for i in range(case.batch)])
    assert_close(alone[free], scores[free], **CLOSE)

    order = torch.randperm(case.batch).tolist()
    moved = score(case.instances(order))
    rows = torch.arange(len(scores)).split(case.tokens.layout.lengths)
    index = torch.cat([rows[i] for i in order])
    assert_close(moved[free[index]], scores[index][free[index]], **CLOSE)

    shuffled, index = case.shuffled(seed)
    assert_close(score(shuffled)[free[index]], scores[index][free[index]], **CLOSE)


def keeper(name: str, args: dict, case: Case) -> None:
    """1 (a count for every instance), 4, 5."""
    part = keepers[name](case.spec, **args)

    def count(case: Case) -> Tensor:
        return part(case.scores, case.tokens, case.guidance if part.guided else None)

    counts = count(case)
    assert counts.shape == (case.batch,)
    assert counts.dtype == torch.int64
    assert (counts >= 0).all()
    alone = [count(case.instances([i])).item() for i in range(case.batch)]
    assert counts.tolist() == alone

    order = torch.randperm(case.batch).tolist()
    assert count(case.instances(order)).tolist() == [alone[i] for i in order]


def keeper_is_monotone(name: str, args: dict, case: Case, values: tuple[float, float]) -> None:
    """9: the knob, turned to where it keeps more, never keeps fewer."""
    knob = keepers[name].knob
    low, high = (
        keepers[name](case.spec, **{**args, knob.name: value})(case.scores, case.tokens, case.guidance)
        for value in sorted(values, reverse=not knob.larger_keeps_more)
    )
    assert (low <= high).all()


def selector(name: str, args: dict, case: Case, counts: Tensor) -> None:
    """1, 2, 4, 5 and 7, and matches that a reducer can follow."""

    def select(case: Case, counts: Tensor) -> Selection:
        part = selectors[name](case.spec, **args)
        asked = {stat: value for stat, value in case.stats.values.items() if stat in part.needs}
        return part(case.tokens, case.scores, counts, AttentionStats(part.needs, asked))

    selection, tokens, layout = select(case, counts), case.tokens, case.tokens.layout
    assert selection.keep.shape == (layout.total,)
    assert selection.keep.dtype == torch.bool
    assert selection.keep[tokens.protected].all()
    kept = [int(one.sum()) for one in (selection.keep & tokens.free).split(layout.lengths)]
    free = [int(one.sum()) for one in tokens.free.split(layout.lengths)]
    for here, wanted, n in zip(kept, counts.tolist(), free, strict=True):
        assert here <= wanted
        assert here == n or wanted < n
        assert here or not min(wanted, n)

    if selection.match is not None:
        rows = torch.arange(layout.total)
        assert torch.equal(selection.match[selection.keep], rows[selection.keep])
        goes = ~selection.keep & torch.tensor(kept, dtype=torch.bool)[layout.instance]
        partner = selection.match[goes]
        assert (selection.keep & tokens.free)[partner].all()
        assert torch.equal(layout.instance[partner], layout.instance[goes])

    starts, pieces = layout.offsets[:-1].long(), selection.keep.split(layout.lengths)
    order = torch.randperm(case.batch).tolist()
    for chosen in (*([i] for i in range(case.batch)), order):
        alone = select(case.instances(chosen), counts[chosen])
        assert torch.equal(alone.keep, torch.cat([pieces[i] for i in chosen]))
        if selection.match is not None:
            goes, there = ~alone.keep, case.instances(chosen).tokens.layout
            slots = (alone.match - there.offsets[:-1].long()[there.instance])[goes]
            whole = (selection.match - starts[layout.instance]).split(layout.lengths)
            assert torch.equal(slots, torch.cat([whole[i] for i in chosen])[goes])


def reducer(name: str, args: dict, case: Case, selection: Selection) -> None:
    """1 to 3, 5, 7 and 8, for one plan."""
    tokens, before = case.tokens, case.tokens.layout
    plan = _plan(name, args, case, selection)
    if selection.keep.all():
        assert plan is None
        return
    assert plan is not None
    out = plan.tokens(tokens)
    _check_apart(name, args, case, selection, out)

    merged = torch.zeros(out.layout.total, dtype=torch.bool)
    if plan.merged is not None:
        merged |= plan.merged
    goes_to = plan.provenance()
    kept_to = goes_to[selection.keep]
    assert (kept_to >= 0).all()
    assert len(kept_to.unique()) == len(kept_to)
    whole = ~merged[kept_to]
    assert torch.equal(out.x[kept_to[whole]], tokens.x[selection.keep][whole])
    assert out.layout.total <= before.total
    assert torch.equal(out.x[out.protected], tokens.x[tokens.protected])
    assert torch.equal(out.position[out.protected], tokens.position[tokens.protected])
    if tokens.summary is not None:
        assert torch.equal(out.first_where(out.summary), tokens.first_where(tokens.summary))
    for position in out.position.split(out.layout.lengths):
        assert (position.diff() > 0).all()

    _check_sizes(plan, tokens, out, case.spec.causal)


def reducer_has_gradients(name: str, args: dict, case: Case, selection: Selection) -> None:
    """12, the reducer's share: gradients reach what stays and what is merged, and they are finite."""
    x = case.tokens.x.clone().requires_grad_()
    plan = _plan(name, args, case, selection)
    if plan is None:
        return
    plan.values(x).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[plan.provenance() < 0] == 0).all()
    kept = plan.index if plan.merged is None else plan.index[~plan.merged]
    assert (x.grad[kept] != 0).all()


def guide(name: str, args: dict, case: Case, seed: int) -> None:
    """4, 5, 11 and 12 for a guide; protected tokens do not sway what the anchors gather."""
    specs = {"image": BlockSpec("image", 0, 4, DIM, HEADS, True), "text": BlockSpec("text", 0, 4, DIM, HEADS, True)}
    part = guides[name](specs, **args)

    def guidance(tokens: PackedTokens) -> Guidance:
        return part(tokens, "image")

    whole = guidance(case.tokens)
    assert whole.affinity.shape[0] == case.tokens.layout.total
    assert whole.affinity.isfinite().all()
    assert whole.pooled.isfinite().all()
    assert whole.pooled.shape[:2] == (case.batch, whole.affinity.shape[1])

    alone = [guidance(case.instances([i]).tokens) for i in range(case.batch)]
    assert_close(torch.cat([one.affinity for one in alone]), whole.affinity, **CLOSE)
    assert_close(torch.cat([one.pooled for one in alone]), whole.pooled, **CLOSE)
    shuffled, index = case.shuffled(seed)
    assert_close(guidance(shuffled.tokens).affinity, whole.affinity[index], **CLOSE)
    assert_close(guidance(shuffled.tokens).pooled, whole.pooled, **CLOSE)
    other = torch.where(case.tokens.protected[:, None], case.tokens.x + 1, case.tokens.x)
    assert_close(guidance(case.tokens.with_x(other)).pooled, whole.pooled, **CLOSE)


def guide_learns(name: str, args: dict) -> None:
    """12, and the guide knows when it is noise."""
    wide = DIM + int(args.get("project", True))  # towers of two widths need a map
    specs = {"image": BlockSpec("image", 0, 4, DIM, HEADS, True), "text": BlockSpec("text", 0, 4, wide, HEADS, True)}
    part, x = guides[name](specs, **args), {"image": torch.randn(2, 5, DIM), "text": torch.randn(2, 4, wide)}
    assert part.is_untrained
    optimizer = torch.optim.SGD(part.parameters(), 0.1)
    read = [part(PackedTokens.pack(x[tower]), tower) for tower in x]
    sum((g.pooled.square().sum() + g.affinity.square().mean()) for g in read).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None or not p.grad.any()] == []
    optimizer.step()
    assert not part.is_untrained

    fitted = guides[name](specs, **args)
    fitted.fit(torch.randn(200, read[0].mapped.x.shape[1]))
    assert not fitted.is_untrained


def _plan(name: str, args: dict, case: Case, selection: Selection) -> Reduction | None:
    part = reducers[name](case.spec, **args)
    asked = {stat: value for stat, value in case.stats.values.items() if stat in part.needs}
    return part(case.tokens, case.scores, selection, AttentionStats(part.needs, asked))


def _check_apart(name: str, args: dict, case: Case, selection: Selection, out: PackedTokens) -> None:
    """4 and 5: each instance by itself, and the batch in another order, give the same tokens."""
    order = torch.randperm(case.batch).tolist()
    for chosen in (*([i] for i in range(case.batch)), order):
        sub = case.instances(chosen)
        plan = _plan(name, args, sub, selected_instances(selection, case, chosen))
        got = plan.tokens(sub.tokens) if plan else sub.tokens
        pieces = out.x.split(out.layout.lengths), out.position.split(out.layout.lengths)
        assert_close(got.x, torch.cat([pieces[0][i] for i in chosen]), **CLOSE)
        assert torch.equal(got.position, torch.cat([pieces[1][i] for i in chosen]))


def selected_instances(selection: Selection, case: Case, chosen: list[int]) -> Selection:
    """The selection of some instances, with their rows."""
    layout = case.tokens.layout
    keep = torch.cat([selection.keep.split(layout.lengths)[i] for i in chosen])
    if selection.match is None:
        return Selection(keep)
    slots = (selection.match - layout.offsets[:-1].long()[layout.instance]).split(layout.lengths)
    there = case.instances(chosen).tokens.layout
    return Selection(keep, torch.cat([slots[i] for i in chosen]) + there.offsets[:-1].long()[there.instance])


def _check_sizes(plan: Reduction, tokens: PackedTokens, out: PackedTokens, causal: bool) -> None:
    """8: rows of the result count the tokens they hold, and a merge sits at one of its sources, in causal towers the last."""
    target, size = plan.provenance(), torch.ones_like(tokens.position) if tokens.size is None else tokens.size
    held = torch.zeros(out.layout.total, dtype=size.dtype).index_add(0, target[target >= 0], size[target >= 0])
    assert torch.equal(held, torch.ones_like(out.position) if out.size is None else out.size)
    assert torch.equal(target[plan.index], torch.arange(out.layout.total))
    for row in range(out.layout.total):
        sources = target == row
        assert out.position[row] in tokens.position[sources]
        assert not causal or out.position[row] == tokens.position[sources].max()
        assert out.layout.instance[row] == tokens.layout.instance[sources].unique()
    if plan.is_affine:
        ones = torch.ones(len(target), 2)
        assert_close(plan.values(ones), torch.ones(out.layout.total, 2), rtol=0, atol=1e-4)
