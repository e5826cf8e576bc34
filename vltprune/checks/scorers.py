"""Invariants of scorers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from ..core.statistics import AttentionStats
from ..layers import TokenReducer, TokenScorer, TokenSelector
from .cases import Case
from .invariant import CheckedPart, Kind, Results, expect, expect_same, invariant


@invariant("one score a token", "return scores [total], one for each token, in single precision", first=True)
def one_a_token(part: CheckedPart, case: Case) -> None:
    """Scores are [total], in single precision at least, whatever the dtype of the model is."""
    scores, total = part.call(case), case.tokens.layout.total
    expect(isinstance(scores, Tensor), "a tensor of scores", type(scores).__name__)
    expect(scores.shape == (total,), f"scores of shape [{total}]", f"shape {list(scores.shape)}")
    expect(scores.dtype in (torch.float32, torch.float64), "scores in single precision", scores.dtype)


@invariant(
    "finite scores", "allow for sums of zero and for large logits: add an epsilon to divisors, clamp before exp and log"
)
def finite(part: CheckedPart, case: Case) -> None:
    """Scores are finite."""
    scores = part.call(case)
    expect(scores.isfinite().all(), "finite scores", scores)


@invariant("token order", "score a token by what it holds and by its position, never by its row or slot")
def token_order(part: CheckedPart, case: Case) -> None:
    """The tokens of each instance in another order get the same scores in that order."""
    shuffled, index = case.shuffled()
    free = case.tokens.free
    found, wanted = part.call(shuffled), part.call(case)[index]
    expect_same(
        "the same scores for the tokens of each instance in another order",
        [{"scores": found[free[index]]}],
        [{"scores": wanted[free[index]]}],
    )


class Scorers(Kind):
    """Scorers: how much each token matters."""

    base = TokenScorer
    registry = registry.scorers
    own = (one_a_token, finite, token_order)

    def call(self, part: TokenScorer, case: Case, everything: bool = False) -> Tensor:
        guided = everything or part.guided
        return part(case.tokens, case.stats if everything else asked(part, case), case.guidance if guided else None)

    def results(self, returned: Tensor, case: Case) -> Results:
        lengths = case.tokens.layout.lengths
        pairs = zip(returned.split(lengths), case.tokens.free.split(lengths), strict=True)
        return [{"scores": scores[free]} for scores, free in pairs]

    def loss(self, part: TokenScorer, case: Case) -> Tensor:
        scores = self.call(part, case)
        return (scores * torch.linspace(1, 2, len(scores)))[case.tokens.free].sum()


def asked(part: TokenScorer | TokenSelector | TokenReducer, case: Case) -> AttentionStats:
    """The attention statistics that a part declares in `needs`.

    Args:
        part: the part.
        case: the batch whose statistics they are.
    """
    return AttentionStats(part.needs, {stat: value for stat, value in case.stats.values.items() if stat in part.needs})
