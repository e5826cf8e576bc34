"""Invariants of alignment guides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..core.tokens import PackedTokens
from ..layers import AlignmentGuide, BlockSpec, Guidance, TextGuide, set_query
from .cases import DIM, Case
from .invariant import CheckedPart, Kind, Results, expect, expect_same, invariant


@invariant(
    "one affinity a token", "return vltprune.Guidance with an affinity [total, anchors] in single precision", first=True
)
def one_a_token(part: CheckedPart, case: Case) -> None:
    """The affinity is [total, anchors], and what the anchors pool is [batch, anchors, anchor dim], in single precision."""
    guidance, total = part.call(case), case.tokens.layout.total
    expect(isinstance(guidance, Guidance), "a vltprune.Guidance", type(guidance).__name__)
    affinity = guidance.affinity
    expect(
        affinity.dim() == 2 and len(affinity) == total,
        f"an affinity [{total}, anchors]",
        f"shape {list(affinity.shape)}",
    )
    expect(affinity.dtype in (torch.float32, torch.float64), "an affinity in single precision", affinity.dtype)
    wanted = (case.batch, affinity.shape[1])
    expect(
        guidance.pooled.shape[:2] == wanted, f"pooled tokens {[*wanted]} and their width", list(guidance.pooled.shape)
    )


@invariant("finite affinity", "allow for tokens of zero length and for large products")
def finite(part: CheckedPart, case: Case) -> None:
    """Affinities and pooled tokens are finite."""
    guidance = part.call(case)
    expect(guidance.affinity.isfinite().all(), "finite affinities", guidance.affinity)
    expect(guidance.pooled.isfinite().all(), "finite pooled tokens", guidance.pooled)


@invariant("token order", "relate a token to the anchors by what it holds, never by its row or slot")
def token_order(part: CheckedPart, case: Case) -> None:
    """The tokens of each instance in another order have the same affinities in that order, and pool to the same."""
    shuffled, index = case.shuffled()
    found, whole = part.call(shuffled), part.call(case)
    expect_same(
        "the same guidance for the tokens of each instance in another order",
        [{"affinity": found.affinity, "pooled": found.pooled}],
        [{"affinity": whole.affinity[index], "pooled": whole.pooled}],
    )


@invariant("protected tokens", "pool unprotected tokens alone: guidance.attention leaves the others out")
def protected(part: CheckedPart, case: Case) -> None:
    """What protected tokens hold does not change what the anchors pool."""
    changed = torch.where(case.tokens.protected[:, None], case.tokens.x + 1, case.tokens.x)
    found, wanted = part.call(replace(case, tokens=case.tokens.with_x(changed))), part.call(case)
    expect_same(
        "what the anchors pool, whatever protected tokens hold", [{"pooled": found.pooled}], [{"pooled": wanted.pooled}]
    )


@invariant("trained or not", "let `is_untrained` compare the anchors with their initialization, and let `fit` set them")
def untrained(part: CheckedPart, case: Case) -> None:
    """A guide is untrained when it is built, and no longer after `fit`."""
    built = part.build(case.spec, part.args)
    if built.queried:
        # its anchors are the text
        return
    expect(built.is_untrained, "is_untrained of a guide that was just built", False)
    tokens = PackedTokens.pack(
        torch.randn(1, 200, case.spec.dim, generator=torch.Generator().manual_seed(0)).to(part.dtype)
    )
    with torch.no_grad():
        built.fit(built(tokens, case.spec.tower).mapped.x.float())
    expect(not built.is_untrained, "is_untrained to be False after fit", True)


class Guides(Kind):
    """Alignment guides: how the tokens of all towers relate to shared anchors."""

    base = AlignmentGuide
    registry = registry.guides
    passed = "specs"
    own = (one_a_token, finite, token_order, protected, untrained)

    def build(self, maker: Callable[..., Any], spec: BlockSpec, args: Mapping[str, Any]) -> Any:
        return maker({"image": spec, "text": replace(spec, tower="text")}, **args)

    def call(self, part: AlignmentGuide, case: Case, everything: bool = False) -> Guidance:
        with _asking(part, case):
            return part(case.tokens, case.spec.tower)

    def results(self, returned: Guidance, case: Case) -> Results:
        affinities = returned.affinity.split(case.tokens.layout.lengths)
        return [{"affinity": one, "pooled": pooled} for one, pooled in zip(affinities, returned.pooled, strict=True)]

    def loss(self, part: AlignmentGuide, case: Case) -> Tensor:
        loss = case.tokens.x.new_zeros(())
        for tower in ("image", "text"):
            with _asking(part, case):
                guidance = part(case.tokens, tower)
            loss = loss + guidance.pooled.square().sum() + guidance.affinity.square().mean()
        return loss


def _asking(part: AlignmentGuide, case: Case) -> contextlib.AbstractContextManager[None]:
    """The context in which a guide is called: where it reads a text, that of the case, as wide as the guide takes it."""
    if not part.queried:
        return contextlib.nullcontext()
    width = part.query_dim if isinstance(part, TextGuide) else DIM
    return set_query(case.query[..., torch.arange(width) % DIM])
