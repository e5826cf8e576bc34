"""What hypothesis draws: ragged tokens with everything a part may read, and arguments for any registered part."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st

from vltprune.checks.cases import (
    DIM,
    HEADS,
    LEVELS,
    MOST_INSTANCES,
    MOST_TOKENS,
    SHARES,
    Case,
    CaseSettings,
    few,
    generator,
    packed,
)

__all__ = ["DIM", "HEADS", "arguments", "case_settings", "cases", "few", "generator", "lengths", "levels"]
__all__ += ["packed", "seeds", "shares", "values_of"]

# length 1 is where things break
lengths = st.lists(st.integers(1, MOST_TOKENS), min_size=1, max_size=MOST_INSTANCES).map(tuple)
levels = st.sampled_from(LEVELS)
seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from(SHARES)


@st.composite
def case_settings(draw, has_summary: bool | None = None) -> CaseSettings:
    """Ragged batches with any share of protected tokens, and with all tokens equal."""
    summary = draw(st.booleans()) if has_summary is None else has_summary
    return CaseSettings(
        draw(lengths), draw(seeds), summary, draw(st.booleans()), draw(shares), equal=draw(st.booleans())
    )


def cases(has_summary: bool | None = None) -> st.SearchStrategy[Case]:
    """The batches of drawn settings."""
    return case_settings(has_summary).map(CaseSettings.build)


@st.composite
def arguments(draw, maker: Callable[..., Any], vary: bool = True) -> dict[str, Any]:
    """Arguments for a registered part, read off its signature: what it requires and its knob; with `vary`, its options.

    Registering a part is enough to have it tested: this is why.
    """
    drawn: dict[str, Any] = {}
    knob = getattr(maker, "knob", None)
    hints = typing.get_type_hints(maker.__init__)
    for name, parameter in inspect.signature(maker).parameters.items():
        if name in ("spec", "specs"):
            continue
        options = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is typing.Literal else ()
        options = (False, True) if hints[name] is bool else options
        if knob is not None and knob.name == name:
            drawn[name] = draw(values_of(knob))
        elif options and vary:
            drawn[name] = draw(st.sampled_from(options))
        elif parameter.default is inspect.Parameter.empty:
            drawn[name] = draw({int: st.integers(0, 12), float: st.floats(0, 1)}[hints[name]])
    return drawn


def values_of(knob: Any) -> st.SearchStrategy[float]:
    """Anything between the ends of a knob, both included."""
    if not knob.log:
        return st.floats(knob.low, knob.high)
    inner = st.floats(math.log(knob.low), math.log(knob.high)).map(math.exp)
    return st.sampled_from([knob.low, knob.high]) | inner.map(lambda value: min(max(value, knob.low), knob.high))
