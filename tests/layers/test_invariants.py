"""The invariants over everything registered; and proof that they bite, on parts that break them."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import invariants
import pytest
import torch
from hypothesis import given, settings
from strategies import arguments, cases, seeds, values_of

from vltprune import KeepRatioPredictor, Stat, TokenReducer, TokenScorer, guides, keepers, reducers, scorers
from vltprune.layers import Codebook, Drop, Fuse, Ratio

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


@st.composite
def reductions(draw, name):
    """Arguments, a case whose tokens may stand for several already, and counts from none to more than there are."""
    case, counts = draw(cases()), []
    for n in case.tokens.layout.lengths:
        counts.append(draw(st.integers(0, n + 1)))
    if draw(st.booleans()):
        size = 1 + torch.arange(case.tokens.layout.total) % 3
        case = dataclasses.replace(case, tokens=dataclasses.replace(case.tokens, size=size))
    return draw(arguments(reducers[name])), case, torch.tensor(counts)


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

    def forward(self, tokens, scores, counts, stats):
        return (self.drop if tokens.layout.batch == 0 else self.fuse)(tokens, scores, counts, stats)


def test_registering_is_enough():
    """A part registered here goes through the very tests above, arguments of its own included."""
    makers = {"scorer": KeyLength, "keeper": Half, "reducer": Wrapped, "guide": Codebook}
    with (
        scorers.temporarily(mine=makers["scorer"]),
        keepers.temporarily(mine=makers["keeper"]),
        reducers.temporarily(mine=makers["reducer"]),
        guides.temporarily(mine=makers["guide"]),
    ):
        for test in (test_scorers, test_keepers, test_reducers, test_reducers_have_gradients, test_guides):
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


class _Odd(Drop):
    """Drop with the scores or counts tampered with."""

    def tamper(self, tokens, scores, counts):
        return tokens, scores, counts

    def forward(self, tokens, scores, counts, stats):
        return super().forward(*self.tamper(tokens, scores, counts), stats)


class DropsProtected(_Odd):
    def tamper(self, tokens, scores, counts):
        return dataclasses.replace(tokens, protected=torch.zeros_like(tokens.protected)), scores, counts


class KeepsOneMore(_Odd):
    def tamper(self, tokens, scores, counts):
        return tokens, scores, counts + 1


class KeepsTheWorst(_Odd):
    def tamper(self, tokens, scores, counts):
        return tokens, -scores, counts


class Reorders(Drop):
    def forward(self, tokens, scores, counts, stats):
        plan = super().forward(tokens, scores, counts, stats)
        return plan and dataclasses.replace(plan, index=plan.index.flip(0))


class ForgetsSizes(Fuse):
    def forward(self, tokens, scores, counts, stats):
        plan = super().forward(tokens, scores, counts, stats)
        if plan is None:
            return None
        merge = dataclasses.replace(plan.merge, sources=torch.zeros_like(plan.merge.sources))
        return dataclasses.replace(plan, merge=merge)


BROKEN = [
    (scorers, test_scorers, (SeesItsBatch, BlowsUp, ReadsPlaces, ReadsUndeclared)),
    (keepers, test_keepers, (Neediest,)),
    (keepers, test_keepers_are_monotone, (Contrary,)),
    (reducers, test_reducers, (DropsProtected, KeepsOneMore, KeepsTheWorst, Reorders, ForgetsSizes)),
]


@pytest.mark.parametrize(
    ("registry", "test", "part"), [pytest.param(r, t, p, id=p.__name__) for r, t, parts in BROKEN for p in parts]
)
def test_broken_parts_are_caught(registry, test, part):
    with registry.temporarily(broken=part), pytest.raises((AssertionError, LookupError)):
        test(name="broken")
