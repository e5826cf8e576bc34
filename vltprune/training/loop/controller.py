"""Budget controller: adjusts the keepers' budget after each measurement, while the weights move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from ...cost.calibration import Batch, BudgetControl, Calibration, measure
from ...cost.macs import CostMeter
from ...pruning.model import get_pruning

Target: TypeAlias = float | Mapping[str, float]  # share of the dense MACs to save, or one of each tower's own

_GAIN = 0.1  # of the knob's range, for each 100 % of the dense MACs that the cost is off
_MEMORY = 0.9  # of the running mean of what was measured
_INTERVALS = 24  # of the knob's range: a first value lies at an end of one of them
_BISECTIONS, _SAME_SHARE = 6, 0.01  # to where an end of the range begins to matter; shares that count as the same


def target(step: int, steps: int, reduction: float, ramp: float) -> float:
    """Share of the dense MACs to save at a step: rises from 0 to `reduction` over the first `ramp` of all steps.

    1 - (1 - t)^3 of it (Zhu and Gupta, arXiv 1710.01878, equation 1): fast at first.

    Args:
        step: of the run.
        steps: of the whole run.
        reduction: share of the dense MACs to save in the end.
        ramp: share of the steps (0: `reduction` from the first step on).

    Returns:
        The share, 0 .. `reduction`.
    """
    t = min(step / (ramp * steps), 1.0) if ramp > 0 else 1.0
    return reduction * (1 - (1 - t) ** 3)


@dataclass
class Controller:
    """Integral control of one knob by measured MACs.

    Args:
        model: the pruned model.
        saved: running mean of the share that was saved, for people to read.
        tower: whose knob it is, and whose own MACs are meant (None: one knob and the MACs of all towers).

    Raises:
        ValueError: the keepers have no knob, or several; or nothing is pruned.
    """

    model: nn.Module
    saved: float = 0.0
    tower: str | None = None

    def __post_init__(self) -> None:
        self.control = BudgetControl(self.model, self.tower)
        self.value = self.control.value

    def initialize(
        self,
        batches: Iterable[Batch],
        reduction: float,
        tick: Callable[[], object] | None = None,
        meter: CostMeter | None = None,
    ) -> None:
        """Sets the knob, from anywhere, to within a 24th of its range of a first target, by bisection.

        Where the target lies beyond what the knob can do, it begins where its end begins to make no difference.

        Args:
            batches: what MACs are measured on.
            reduction: share of the dense MACs to save.
            tick: called after each value that was tried.
            meter: the model's cost meter, where there is one already.
        """
        inputs, knob, meter = list(batches), self.control.knob, meter or CostMeter(self.model)

        def at(position: float) -> Calibration:
            calibration = measure(self.model, inputs, knob.value_at(position), self.tower, meter)
            if tick is not None:
                tick()
            return calibration

        ends = [at(0.0), at(1.0)]
        least, most = sorted(map(self._saved, ends))
        if least < reduction < most:
            ends = self._crossing(ends, reduction, at)
        best = min(ends, key=lambda one: abs(self._saved(one) - reduction))
        if not least < reduction < most:
            best = self._edge(best, at)
        assert best.value is not None  # `measure` set all depths alike
        self.load_state_dict({"value": best.value, "saved": self._saved(best)})

    def _saved(self, calibration: Calibration) -> float:
        """The share that was saved of the MACs that the target is of."""
        return calibration.reduction if self.tower is None else calibration.towers[self.tower].reduction

    def _crossing(
        self, ends: list[Calibration], reduction: float, at: Callable[[float], Calibration]
    ) -> list[Calibration]:
        """What was measured on both sides of a target, an interval apart. Savings need not rise or fall all the way: any
        crossing will do."""
        starts_below = self._saved(ends[0]) < reduction
        low, high = 0, _INTERVALS
        while high - low > 1:
            middle = (low + high) // 2
            calibration = at(middle / _INTERVALS)
            if (self._saved(calibration) < reduction) == starts_below:
                low, ends = middle, [calibration, ends[1]]
            else:
                high, ends = middle, [ends[0], calibration]
        return ends

    def _edge(self, end: Calibration, at: Callable[[float], Calibration]) -> Calibration:
        """The farthest from an end of the range that still saves what the end does, by bisection."""
        assert end.value is not None
        near, far, best = self.control.knob.fraction(end.value), 1 - self.control.knob.fraction(end.value), end
        for _ in range(_BISECTIONS):
            calibration = at((near + far) / 2)
            if abs(self._saved(calibration) - self._saved(end)) < _SAME_SHARE:
                near, best = (near + far) / 2, calibration
            else:
                far = (near + far) / 2
        return best

    def step(self, saved: float, wanted: float) -> None:
        """Moves the knob by a tenth of its range times what the step was off.

        Args:
            saved: share of the dense MACs that a step saved, of all processes.
            wanted: its target.
        """
        knob = self.control.knob
        more = (saved - wanted) if knob.larger_keeps_more else (wanted - saved)
        position = min(max(knob.fraction(self.value) + _GAIN * more, 0.0), 1.0)
        saved = _MEMORY * self.saved + (1 - _MEMORY) * saved
        self.load_state_dict({"value": knob.value_at(position), "saved": saved})

    def apply(self) -> None:
        """Sets the model's knob to this controller's value."""
        self.control.set(self.value)

    def state_dict(self) -> dict[str, float]:
        """The knob's value and the running mean."""
        return {"value": self.value, "saved": self.saved}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores both, and sets the model's knob."""
        self.value, self.saved = state["value"], state["saved"]
        self.control.set(self.value)


class TowerControllers:
    """A controller for each tower that has a target of its own; used as a `Controller`.

    Targets and measured shares are mappings from tower to a share of its own dense MACs. Knobs of other towers stay.

    Args:
        model: the pruned model.
        towers: names of those that have a target.

    Raises:
        ValueError: a tower's keepers have no knob, or several; or it is pruned nowhere.
    """

    def __init__(self, model: nn.Module, towers: Iterable[str]):
        # in the model's order, images first: a text tower's cost depends on the image tokens that it looks at
        self.towers = {name: Controller(model, tower=name) for name in get_pruning(model).towers if name in {*towers}}

    @property
    def value(self) -> dict[str, float]:
        """Value of each tower's knob."""
        return {name: one.value for name, one in self.towers.items()}

    def initialize(
        self,
        batches: Iterable[Batch],
        reduction: Mapping[str, float],
        tick: Callable[[], object] | None = None,
        meter: CostMeter | None = None,
    ) -> None:
        """Sets each tower's knob to a first target, as `Controller.initialize`, one tower after the other.

        Args:
            batches: what MACs are measured on.
            reduction: share of its own dense MACs to save, by tower.
            tick: called after each value that was tried.
            meter: the model's cost meter, where there is one already.
        """
        inputs = list(batches)
        for name, one in self.towers.items():
            one.initialize(inputs, reduction[name], tick, meter)

    def step(self, saved: Mapping[str, float], wanted: Mapping[str, float]) -> None:
        """Moves each tower's knob, as `Controller.step`.

        Args:
            saved: share of its own dense MACs that a step saved, by tower.
            wanted: its target, by tower.
        """
        for name, one in self.towers.items():
            one.step(saved[name], wanted[name])

    def apply(self) -> None:
        """Sets the model's knobs to these controllers' values."""
        for one in self.towers.values():
            one.apply()

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The state of each tower's controller."""
        return {name: one.state_dict() for name, one in self.towers.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, float]]) -> None:
        """Restores the controllers, and sets the model's knobs."""
        for name, one in self.towers.items():
            one.load_state_dict(state[name])


class CostRotation:
    """Several costs that one model learns in rotation: every second step is the first one's, the others take the rest.

    A model that was trained at one cost is good at that: at a milder one its weights expect fewer tokens than there are.

    Args:
        model: the pruned model.
        costs: targets, each once: shares of the dense MACs of all towers, or of each tower's own.

    Raises:
        ValueError: the keepers have no knob, or several; or a tower with a target is pruned nowhere.
    """

    def __init__(self, model: nn.Module, costs: Sequence[Target]):
        self.costs = tuple(costs)
        self.controllers: list[Any] = [
            TowerControllers(model, cost) if isinstance(cost, Mapping) else Controller(model) for cost in self.costs
        ]

    def index(self, step: int) -> int:
        """Index of the cost that a step learns."""
        others = len(self.costs) - 1
        return 1 + step // 2 % others if others and step % 2 else 0

    def is_measured(self, step: int, every: int) -> bool:
        """Whether a step's cost is measured, where each cost is measured at every so many of its steps.

        Args:
            step: of the run.
            every: 1 for each step of a cost, 2 for every second one, and so on.

        Returns:
            Whether it is.
        """
        others = len(self.costs) - 1
        period = 1 if not others else 2 if self.index(step) == 0 else 2 * others
        return step // period % every == 0

    def apply(self, index: int) -> None:
        """Sets the model's knobs to the values of one cost."""
        self.controllers[index].apply()

    def initialize(
        self,
        batches: Iterable[Batch],
        reduction: Target,
        tick: Callable[[], object] | None = None,
        meter: CostMeter | None = None,
    ) -> None:
        """Sets the knobs to a first target, as `Controller.initialize`; all costs begin at the same value.

        Args:
            batches: what MACs are measured on.
            reduction: target of the first cost, as `costs` has it.
            tick: called after each value that was tried.
            meter: the model's cost meter, where there is one already.
        """
        self.controllers[0].initialize(batches, reduction, tick, meter)
        self.load_state_dict([self.controllers[0].state_dict()] * len(self.controllers))

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each controller."""
        return [controller.state_dict() for controller in self.controllers]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Restores the controllers, and sets the model's knobs as the first one has them."""
        for controller, state in reversed(list(zip(self.controllers, states, strict=True))):
            controller.load_state_dict(state)
