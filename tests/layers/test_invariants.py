"""The invariants over everything registered; and proof that they bite, on parts that break them."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import invariants
import pytest
import torch
from hypothesis import given, settings
from strategies import arguments, cases, counted, reductions, seeds, values_of

from vltprune import (
    KeepRatioPredictor,
    Stat,
    TokenReducer,
    TokenScorer,
    guides,
    keepers,
    reducers,
    scorers,
    selectors,
)
from vltprune.layers import Codebook, Drop, Fuse, Ratio, Top

TURNED = [name for name in keepers.names() if keepers[name].knob]


@pytest.mark.parametrize("name", scorers.names())
@given(data=st.data(), case=cases(), seed=seeds)
def test_scorers(name, data, case, seed):
    maker = scorers[name]
    if Stat.SUMMARY in maker.needs and not case.spec.has_summary:
        return  # refused when a model is built
    invariants.scorer(name, data.draw(arguments(maker)), case, seed)


@pytest.mark.parametrize("name", keepers.names())
@given(data=st.data(), case=cases())
def test_keepers(name, data, case):
    invariants.keeper(name, data.draw(arguments(keepers[name], vary=False)), case)


@pytest.mark.parametrize("name", TURNED)
@given(data=st.data(), case=cases())
def test_keepers_are_monotone(name, data, case):
    values = data.draw(st.tuples(*[values_of(keepers[name].knob)] * 2))
    invariants.keeper_is_monotone(name, data.draw(arguments(keepers[name], vary=False)), case, values)


@pytest.mark.parametrize("name", selectors.names())
@given(data=st.data(), counted=counted())
def test_selectors(name, data, counted):
    invariants.selector(name, data.draw(arguments(selectors[name])), *counted)


@pytest.mark.parametrize("name", reducers.names())
@given(data=st.data())
def test_reducers(name, data):
    invariants.reducer(name, *data.draw(reductions(name)))


@pytest.mark.parametrize("name", reducers.names())
@given(data=st.data())
def test_reducers_have_gradients(name, data):
    invariants.reducer_has_gradients(name, *data.draw(reductions(name)))


@pytest.mark.parametrize("name", guides.names())
@given(data=st.data(), case=cases(), seed=seeds)
def test_guides(name, data, case, seed):
    invariants.guide(name, data.draw(arguments(guides[name])), case, seed)


@pytest.mark.parametrize("name", guides.names())
@given(data=st.data())
@settings(max_examples=3)
def test_guides_learn(name, data):
    invariants.guide_learns(name, data.draw(arguments(guides[name])))


class KeyLength(TokenScorer):
    """A user's scorer, written against the public names only."""

    needs = Stat.KEY

    def __init__(self, spec, power: int, signed: bool = False):
        super().__init__(spec)
        self.power, self.sign = power, -1 if signed else 1

    def forward(self, tokens, stats, guidance):
        return self.sign * stats[Stat.KEY].norm(dim=-1) ** self.power


class Half(KeepRatioPredictor):
    """A user's keeper."""

    def forward(self, scores, tokens, guidance):
        return torch.tensor([(int(free.sum()) + 1) // 2 for free in tokens.free.split(tokens.layout.lengths)])


class Wrapped(TokenReducer):
    """A user's reducer: two of ours in one."""

    def __init__(self, spec):
        super().__init__(spec)
        self.drop, self.fuse = Drop(spec), Fuse(spec)

    def forward(self, tokens, scores, selection, stats):
        return (self.drop if tokens.layout.batch == 0 else self.fuse)(tokens, scores, selection, stats)


class Worst(Top):
    """A user's selector."""

    def forward(self, tokens, scores, counts, stats):
        return super().forward(tokens, -scores, counts, stats)


def test_registering_is_enough():
    """A part registered here goes through the very tests above, arguments of its own included."""
    makers = {"scorer": KeyLength, "keeper": Half, "selector": Worst, "reducer": Wrapped, "guide": Codebook}
    with (
        scorers.temporarily(mine=makers["scorer"]),
        keepers.temporarily(mine=makers["keeper"]),
        selectors.temporarily(mine=makers["selector"]),
        reducers.temporarily(mine=makers["reducer"]),
        guides.temporarily(mine=makers["guide"]),
    ):
        for test in (
            test_scorers,
            test_keepers,
            test_selectors,
            test_reducers,
            test_reducers_have_gradients,
            test_guides,
        ):
            test(name="mine")


# ---- Parts that break one invariant each: were the tests to pass them, the tests would be worth nothing.


class SeesItsBatch(TokenScorer):
    def forward(self, tokens, stats, guidance):
        return tokens.x.sum(-1) / tokens.layout.batch


class BlowsUp(TokenScorer):
    def forward(self, tokens, stats, guidance):
        return 1 / (tokens.x - tokens.x[0]).abs().sum(-1)


class ReadsPlaces(TokenScorer):
    def forward(self, tokens, stats, guidance):
        return tokens.layout.slot.to(tokens.x.dtype)


class ReadsUndeclared(TokenScorer):
    def forward(self, tokens, stats, guidance):
        return stats[Stat.RECEIVED]


class Neediest(Half):
    def forward(self, scores, tokens, guidance):
        return super().forward(scores, tokens, guidance).amax().expand(tokens.layout.batch)


class Contrary(Ratio):
    def __init__(self, spec, ratio: float = 0.5):
        super().__init__(spec, 1 - ratio)


class DropsProtected(Top):
    def forward(self, tokens, scores, counts, stats):
        unprotected = dataclasses.replace(tokens, protected=torch.zeros_like(tokens.protected))
        return super().forward(unprotected, scores, counts, stats)


class KeepsOneMore(Top):
    def forward(self, tokens, scores, counts, stats):
        return super().forward(tokens, scores, counts + 1, stats)


class MatchesItself(Top):
    def forward(self, tokens, scores, counts, stats):
        selection = super().forward(tokens, scores, counts, stats)
        return dataclasses.replace(selection, match=torch.arange(len(selection.keep)))


class KeepsTheWrongOnes(Drop):
    def forward(self, tokens, scores, selection, stats):
        keep = tokens.protected | ~selection.keep
        return super().forward(tokens, scores, dataclasses.replace(selection, keep=keep), stats)


class Reorders(Drop):
    def forward(self, tokens, scores, selection, stats):
        plan = super().forward(tokens, scores, selection, stats)
        return plan and dataclasses.replace(plan, index=plan.index.flip(0))


class ForgetsSources(Fuse):
    def forward(self, tokens, scores, selection, stats):
        plan = super().forward(tokens, scores, selection, stats)
        if plan is None:
            return None
        return dataclasses.replace(plan, target=torch.full_like(plan.target, -1))


BROKEN = [
    (scorers, test_scorers, (SeesItsBatch, BlowsUp, ReadsPlaces, ReadsUndeclared)),
    (keepers, test_keepers, (Neediest,)),
    (keepers, test_keepers_are_monotone, (Contrary,)),
    (selectors, test_selectors, (DropsProtected, KeepsOneMore, MatchesItself)),
    (reducers, test_reducers, (KeepsTheWrongOnes, Reorders, ForgetsSources)),
]


@pytest.mark.parametrize(
    ("registry", "test", "part"), [pytest.param(r, t, p, id=p.__name__) for r, t, parts in BROKEN for p in parts]
)
def test_broken_parts_are_caught(registry, test, part):
    with registry.temporarily(broken=part), pytest.raises((AssertionError, LookupError)):
        test(name="broken")
