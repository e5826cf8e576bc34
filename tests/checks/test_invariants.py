"""The invariants over everything registered, and over parts that a user wrote."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from registered import registered
from strategies import arguments, case_settings

from vltprune import KeepRatioPredictor, Stat, TokenReducer, TokenScorer
from vltprune.checks.check import check_case
from vltprune.checks.invariant import CheckedPart
from vltprune.checks.kinds import KINDS
from vltprune.layers import Codebook, Drop, Fuse, Top

EVERY = [(kind, name) for kind, entry in KINDS.items() for name in entry.registry.names()]


@pytest.mark.parametrize(("kind", "name"), EVERY)
@given(data=st.data(), settings=case_settings())
def test_registered_parts(kind, name, data, settings):
    entry = KINDS[kind]
    maker = entry.registry[name]
    part = CheckedPart(entry, maker, data.draw(arguments(maker, vary=kind != "keeper")))
    assert {invariant: failure for invariant, failure in check_case(part, settings).items() if failure} == {}


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


MINE = {"scorer": KeyLength, "keeper": Half, "selector": Worst, "reducer": Wrapped, "guide": Codebook}


@pytest.mark.parametrize("kind", KINDS)
def test_registering_is_enough(kind):
    """A part registered here goes through the very test above, arguments of its own included."""
    with registered(KINDS[kind].registry, mine=MINE[kind]):
        test_registered_parts(kind=kind, name="mine")
