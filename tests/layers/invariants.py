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

from vltprune import AttentionStats, BlockSpec, Guidance, PackedTokens, Reduction, guides, keepers, reducers, scorers

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


def reducer(name: str, args: dict, case: Case, counts: Tensor) -> None:
    """1 to 8, for one plan."""
    tokens, before = case.tokens, case.tokens.layout
    plan = _plan(name, args, case, counts)
    out = plan.tokens(tokens) if plan else tokens
    _check_apart(name, args, case, counts, out)

    free = [int(part.sum()) for part in tokens.free.split(before.lengths)]
    kept = [min(n, wanted) for n, wanted in zip(free, counts.tolist(), strict=True)]
    if kept == free:
        assert plan is None
        return
    assert plan is not None

    merged = torch.zeros(out.layout.total, dtype=torch.bool)
    merged[plan.merge.rows if plan.merge else []] = True
    assert [int(m.sum()) for m in (out.free & ~merged).split(out.layout.lengths)] == kept
    assert torch.equal(out.x[out.protected], tokens.x[tokens.protected])
    assert torch.equal(out.position[out.protected], tokens.position[tokens.protected])
    if tokens.summary is not None:
        assert torch.equal(out.first_where(out.summary), tokens.first_where(tokens.summary))
    for position in out.position.split(out.layout.lengths):
        assert (position.diff() > 0).all()

    _check_best_kept(plan, merged, case)
    _check_sizes(plan, merged, tokens, out)


def reducer_has_gradients(name: str, args: dict, case: Case, counts: Tensor) -> None:
    """12, the reducer's share: gradients reach what stays and what is merged, and they are finite."""
    x = case.tokens.x.clone().requires_grad_()
    plan = _plan(name, args, case, counts)
    if plan is None:
        return
    plan.values(x).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[plan.target() < 0] == 0).all()
    kept = plan.index if plan.merge is None else plan.index[~torch.isin(torch.arange(len(plan.index)), plan.merge.rows)]
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


def _plan(name: str, args: dict, case: Case, counts: Tensor) -> Reduction | None:
    part = reducers[name](case.spec, **args)
    asked = {stat: value for stat, value in case.stats.values.items() if stat in part.needs}
    return part(case.tokens, case.scores, counts, AttentionStats(part.needs, asked))


def _check_apart(name: str, args: dict, case: Case, counts: Tensor, out: PackedTokens) -> None:
    """4 and 5: each instance by itself, and the batch in another order, give the same tokens."""
    order = torch.randperm(case.batch).tolist()
    for part in ([i] for i in range(case.batch)), [order]:
        for chosen in part:
            sub = case.instances(chosen)
            plan = _plan(name, args, sub, counts[chosen])
            got = plan.tokens(sub.tokens) if plan else sub.tokens
            pieces = out.x.split(out.layout.lengths), out.position.split(out.layout.lengths)
            assert_close(got.x, torch.cat([pieces[0][i] for i in chosen]), **CLOSE)
            assert torch.equal(got.position, torch.cat([pieces[1][i] for i in chosen]))


def _check_best_kept(plan: Reduction, merged: Tensor, case: Case) -> None:
    """6: nothing unprotected is kept whose score lies below one that is not."""
    kept = torch.zeros(len(case.scores), dtype=torch.bool)
    kept[plan.index[~merged]] = True
    for i in range(case.batch):
        free = case.tokens.free & (case.tokens.layout.instance == i)
        if (free & kept).any() and (free & ~kept).any():
            assert case.scores[free & kept].min() >= case.scores[free & ~kept].max()


def _check_sizes(plan: Reduction, merged: Tensor, tokens: PackedTokens, out: PackedTokens) -> None:
    """8: rows of the result count the tokens they hold, those sum to what was there, and a merge sits at its last source."""
    target, size = plan.target(), torch.ones_like(tokens.position) if tokens.size is None else tokens.size
    held = torch.zeros(out.layout.total, dtype=size.dtype).index_add(0, target[target >= 0], size[target >= 0])
    assert torch.equal(held, torch.ones_like(out.position) if out.size is None else out.size)
    if plan.merge is not None:
        instances = range(tokens.layout.batch)
        lost = [i for i in instances if (merged & (out.layout.instance == i)).any()]
        for i in lost:
            assert held[out.layout.instance == i].sum() == size[tokens.layout.instance == i].sum()
        assert out.size is not None
    assert torch.equal(target[plan.index], torch.arange(out.layout.total))
    for row in range(out.layout.total):
        sources = target == row
        assert out.position[row] == tokens.position[sources].max()
        assert out.layout.instance[row] == tokens.layout.instance[sources].unique()
    if plan.is_affine:
        ones = torch.ones(len(target), 2)
        assert_close(plan.values(ones), torch.ones(out.layout.total, 2), rtol=0, atol=1e-4)
