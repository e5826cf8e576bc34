"""BudgetControl: reads and sets the knob of a model's keepers, and writes its value into the config."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

from torch import nn

from ..layers import All, KeepRatioPredictor
from ..pruning.encoder import PrunedEncoder
from ..pruning.model import get_pruning
from ..pruning.part import Part
from ..pruning.stage import Stage
from ..registry import keepers
from ..utils.wrappers import unwrapped


class BudgetControl:
    """The knob of a pruned model's keepers, at all its depths, or at those of one tower.

    Args:
        model: a pruned model.
        tower: whose keepers are meant; None is those of all towers.

    Raises:
        ValueError: for keepers without a knob or with several, for a model that is pruned nowhere, and for a tower that the
            model lacks.
    """

    def __init__(self, model: nn.Module, tower: str | None = None):
        self.model, self.tower = model, tower
        towers = get_pruning(model).towers
        if tower is not None and tower not in towers:
            raise ValueError(f"tower={tower!r} is no tower of this model: it has {', '.join(towers)}")
        asked = towers if tower is None else (tower,)
        self.towers = tuple(name for name in asked if towers[name].pruners)
        self.keepers = [keeper for name in self.towers for keeper in keepers_of(towers[name])]
        config, whose = get_pruning(model).config, "" if tower is None else f" in the {tower} tower"
        if not self.keepers:
            raise ValueError(f"no block is pruned{whose}, so that nothing can be saved: prune at some depths (at=...)")
        knobs = {keeper.knob for keeper in self.keepers if keeper.knob is not None}
        if not knobs or any(keeper.knob is None for keeper in self.keepers):
            others = ", ".join(map(repr, keepers_with_knob(guided=config.guide is not None)))
            raise ValueError(
                f"keep={config.describe('keep')!r} has no knob that a budget can set{whose}: use one of {others}"
            )
        if len(knobs) > 1:
            if len(self.towers) == 1:
                advice = 'give all stages the same keeper, such as keep="ratio"'
            else:
                advice = f"give a target for each tower, reduction={dict.fromkeys(self.towers, 0.5)}"
            names = ", ".join(sorted(knob.name for knob in knobs))
            raise ValueError(
                f"keep={config.describe('keep')!r} has several knobs, {names}, which one value cannot set{whose}: {advice}"
            )
        self.knob = knobs.pop()

    @property
    def value(self) -> float:
        """The knob's value at the first depth; `set` gives all depths the same."""
        return self.values[0]

    @property
    def values(self) -> list[float]:
        """The knob's value at every depth."""
        return [getattr(keeper, self.knob.name) for keeper in self.keepers]

    def set(self, value: float) -> None:
        """Sets the knob at every depth."""
        for keeper in self.keepers:
            setattr(keeper, self.knob.name, value)

    @contextlib.contextmanager
    def unless_done(self) -> Iterator[None]:
        """Restores the value of every depth, and what was fitted to data, where the `with` block fails."""
        before = self.values
        fitted = [{name: buffer.clone() for name, buffer in keeper.named_buffers()} for keeper in self.keepers]
        try:
            yield
        except BaseException:
            for keeper, value, buffers in zip(self.keepers, before, fitted, strict=True):
                setattr(keeper, self.knob.name, value)
                keeper.load_state_dict(buffers, strict=False)
            raise

    def commit(self, value: float) -> None:
        """Sets the knob, and writes its value into `model.pruning.config`, for the towers that it is of."""
        self.set(value)
        record = get_pruning(self.model)
        stages = tuple(self._committed(stage, record.towers, value) for stage in record.config.stages)
        config = record.config.with_stages(stages)
        object.__setattr__(unwrapped(self.model), "pruning", dataclasses.replace(record, config=config))

    def _committed(self, stage: Stage, towers: Mapping[str, PrunedEncoder], value: float) -> Stage:
        """A stage with the knob's value in the keepers of the towers that the knob is of; as it is, where it keeps all."""
        if stage.keep == Part("all"):
            return stage
        pruned = [name for name, tower in towers.items() if tower.pruners]
        if isinstance(stage.keep, Part) and set(pruned) == set(self.towers):
            return dataclasses.replace(stage, keep=stage.keep.replace(**{self.knob.name: value}))
        named = stage.keep if isinstance(stage.keep, Mapping) else towers
        keep = {tower: stage.part("keep", tower) for tower in named}
        keep |= {tower: keep[tower].replace(**{self.knob.name: value}) for tower in self.towers}
        one = keep[self.towers[0]]
        return dataclasses.replace(stage, keep=one if all(part == one for part in keep.values()) else keep)


def keepers_with_knob(guided: bool) -> list[str]:
    """Names of the registered keepers that a budget can set. guided: also those that read a guide."""
    makers = {name: keepers[name] for name in keepers.names()}
    return [
        name
        for name, maker in makers.items()
        if getattr(maker, "knob", None) is not None and (guided or not getattr(maker, "guided", False))
    ]


def keepers_of(tower: PrunedEncoder) -> list[KeepRatioPredictor]:
    """The keepers of a pruned tower, one a depth and stage, without those that keep all."""
    modules = tower.pruners.modules()
    return [module for module in modules if isinstance(module, KeepRatioPredictor) and not isinstance(module, All)]
