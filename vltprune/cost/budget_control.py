"""The budget argument of a model's keepers: reads it, sets it, and writes it into the config."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..layers import KeepRatioPredictor
from ..pruning.encoder import PrunedEncoder
from ..pruning.model import get_pruning
from ..pruning.part import Part
from ..utils.wrappers import unwrapped


class BudgetControl:
    """The knob of a pruned model, at all its depths, or at those of one tower.

    ValueError where it has none, or several, and for a tower that the model lacks.
    """

    def __init__(self, model: nn.Module, tower: str | None = None):
        self.model = model
        towers = get_pruning(model).towers
        if tower is not None and tower not in towers:
            raise ValueError(f"tower={tower!r} is none of this model's, which are {', '.join(towers)}")
        asked = towers if tower is None else (tower,)
        self.towers = tuple(name for name in asked if towers[name].pruners)
        self.keepers = [keeper for name in self.towers for keeper in keepers_of(towers[name])]
        knobs = {keeper.knob for keeper in self.keepers if keeper.knob is not None}
        if not knobs or any(keeper.knob is None for keeper in self.keepers):
            whose = "" if tower is None else f" in the {tower} tower"
            raise ValueError(
                f"keep={get_pruning(model).config.spelled('keep')!r} has nothing a budget can turn{whose}: use "
                "keep='threshold', 'ratio' or 'random_ratio'"
            )
        if len(knobs) > 1:
            raise ValueError(
                f"keep={get_pruning(model).config.spelled('keep')!r}: the towers have different knobs, which one value cannot "
                "set: calibrate each, with reduction={'image': 0.5, 'text': 0.5}"
            )
        self.knob = knobs.pop()

    @property
    def value(self) -> float:
        """Of the first depth; `turn` sets all alike."""
        return self.values[0]

    @property
    def values(self) -> list[float]:
        """Of every depth."""
        return [getattr(keeper, self.knob.name) for keeper in self.keepers]

    def set(self, value: float) -> None:
        for keeper in self.keepers:
            setattr(keeper, self.knob.name, value)

    @contextlib.contextmanager
    def unless_done(self) -> Iterator[None]:
        """Where the `with` block fails, every depth has the value again that it had before."""
        before = self.values
        try:
            yield
        except BaseException:
            for keeper, value in zip(self.keepers, before, strict=True):
                setattr(keeper, self.knob.name, value)
            raise

    def commit(self, value: float) -> None:
        """Turn it, and write the value into `model.pruning.config`, for the towers that it turns."""
        self.set(value)
        record = get_pruning(self.model)
        config, pruned = record.config, [name for name, tower in record.towers.items() if tower.pruners]
        if isinstance(config.keep, Part) and set(pruned) == set(self.towers):
            keep: Any = config.keep.replace(**{self.knob.name: value})
        else:
            named = config.keep if isinstance(config.keep, Mapping) else record.towers
            keep = {tower: config.part("keep", tower) for tower in named}
            keep |= {tower: keep[tower].replace(**{self.knob.name: value}) for tower in self.towers}
            one = keep[self.towers[0]]
            keep = one if all(part == one for part in keep.values()) else keep
        object.__setattr__(
            unwrapped(self.model), "pruning", dataclasses.replace(record, config=config.replace(keep=keep))
        )


def keepers_of(tower: PrunedEncoder) -> list[KeepRatioPredictor]:
    """The keepers of a pruned tower, one a depth."""
    return [module for module in tower.pruners.modules() if isinstance(module, KeepRatioPredictor)]
