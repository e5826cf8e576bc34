"""Depths of a config: the blocks of each tower that are pruned, by index or as a fraction of the tower's depth."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set

from ..utils.frozen import FrozenDict

Depths = Iterable[int | float] | int | float | None
FrozenDepths = tuple[int | float, ...] | None


def freeze_depths(at: object) -> FrozenDepths | FrozenDict:
    """Depths as tuples of numbers, also those of a mapping. TypeError or ValueError for anything that is not depths."""
    if not isinstance(at, Mapping):
        return _freeze(at)
    wrong = [tower for tower in at if not isinstance(tower, str)]
    if wrong:
        raise TypeError(f"at={dict(at)!r}: keys are names of towers, such as 'image', not {wrong[0]!r}")
    return FrozenDict({tower: _freeze(depths) for tower, depths in at.items()})


def block_indices(at: FrozenDepths, tower: str, depths: int) -> tuple[int, ...]:
    """The blocks of a tower that the depths of a config select.

    Args:
        at: the depths, as `freeze_depths` returns them. None selects every block.
        tower: the tower's name, for the error.
        depths: the number of blocks of the tower.

    Returns:
        Their indices, ascending, each once.

    Raises:
        ValueError: for depths that the tower does not have.
    """
    if at is None:
        return tuple(range(depths))
    wrong = [d for d in at if not -depths <= d < depths]
    if wrong:
        raise ValueError(
            f"at={list(at)}: the {tower} tower has depths 0 .. {depths - 1}, or -{depths} .. -1 from the end, "
            f"not {wrong[0]}"
        )
    return tuple(sorted({_block_index(d, depths) for d in at}))


def _block_index(depth: int | float, depths: int) -> int:
    if isinstance(depth, float):
        return math.floor(depth * depths + 1e-9)  # 15 / 26 * 26 rounds to below 15
    return depth % depths


def _freeze(at: object) -> FrozenDepths:
    """The depths as Python's numbers, each once."""
    if at is None:
        return None
    given = at.tolist() if hasattr(at, "tolist") else at  # arrays and scalars of numpy, tensors of torch
    if isinstance(given, numbers.Real) and not isinstance(given, bool):
        given = (given,)
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, bytearray, Mapping)):
        raise TypeError(f"at={at!r}: write depths, such as at=6 or at=(3, 6, 9), or a mapping from tower to depths")
    entries = list(given)
    depths = [_freeze_depth(depth, entries) for depth in entries]
    return tuple(dict.fromkeys(sorted(depths) if isinstance(given, Set) else depths))


def _freeze_depth(depth: object, among: Sequence[object]) -> int | float:
    number = depth.tolist() if hasattr(depth, "tolist") else depth
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"at={among}: depths are numbers, {number!r} is not")
    if isinstance(number, numbers.Integral):
        return int(number)
    fraction = float(number)
    if not 0 <= fraction < 1:
        raise ValueError(f"at={among}: a fraction of the depth lies in [0, 1); {fraction} does not")
    return fraction
