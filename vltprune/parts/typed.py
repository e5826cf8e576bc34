"""typed_part: a function with the signature of a registered part's maker that returns the Part, for one's own parts too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from ..pruning.part import KINDS, Part, registered_part

P = ParamSpec("P")
Spec = TypeVar("Spec")


def typed_part(maker: Callable[Concatenate[Spec, P], object]) -> Callable[P, Part]:
    """The function that makes Parts of a registered maker: ratio = typed_part(Ratio); ratio(0.5).

    Args:
        maker: a guide, scorer, keeper or reducer that is registered.

    Returns:
        A function of the maker's arguments, without the spec that the library passes. It builds no module: it returns the Part
        that a PruneConfig holds.

    Raises:
        LookupError: for a maker that is not registered.
    """
    kind, name = _registered_name(maker)
    _, passed = KINDS[kind]

    def make(*values: P.args, **args: P.kwargs) -> Part:
        return registered_part(kind, name, values, args)

    own = [parameter for parameter in inspect.signature(maker).parameters.values() if parameter.name != passed]
    make.__name__ = make.__qualname__ = name
    make.__doc__ = inspect.getdoc(maker)
    vars(make)["__signature__"] = inspect.Signature(own, return_annotation=Part)
    return make


def _registered_name(maker: Callable[..., object]) -> tuple[str, str]:
    for kind, (registry, _) in KINDS.items():
        name = registry.name_of(maker)
        if name is not None:
            return kind, name
    raise LookupError(
        f"{maker!r} is not registered: write @vltprune.keepers.register('name') above it, or as its kind is"
    )
