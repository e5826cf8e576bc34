"""The kinds of part that can be checked, one entry each."""

from __future__ import annotations

from .guides import Guides
from .invariant import Invariant, Kind
from .keepers import Keepers
from .reducers import Reducers
from .scorers import Scorers
from .selectors import Selectors
from .shared import FIRST, SHARED

KINDS: dict[str, Kind] = {
    kind.registry.kind: kind for kind in (Guides(), Scorers(), Keepers(), Selectors(), Reducers())
}


def invariants_of(kind: Kind) -> tuple[Invariant, ...]:
    """What the parts of a kind are held to, in order."""
    return (*FIRST, *kind.own, *SHARED)
