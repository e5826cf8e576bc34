"""Budget controller: adjusts the keepers' budget after each measurement, while the weights move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from ...cost.calibration import Batch, BudgetControl, Calibration, measure
from ...cost.macs import CostMeter
from ...pruning.model import get_pruning

Target: TypeAlias = float | Mapping[str, float]  # a share of the dense MACs, or one of each tower's own

_PULL = 0.1  # of the knob's range, for each 100 % of the dense MACs that the cost is off
_MEMORY = 0.9  # of the running mean of what was measured
_EQUAL = 24  # parts of the knob's range: a first value lies between two of them
_HALVINGS, _SAME = 6, 0.01  # of the range, on the way to where its end begins to matter; what is the same share there


def target(step: int, steps: int, reduction: float, ramp: float) -> float:
    """The share of the dense MACs to save at a step: from 0 to `reduction` over the first `ramp` of all steps, fast at
    first (1 - (1 - t)^3, Zhu and Gupta, arXiv 1710.01878, equation 1)."""
    t = min(step / (ramp * steps), 1.0) if ramp > 0 else 1.0
    return reduction * (1 - (1 - t) ** 3)


@dataclass
class Controller:
    """Integral control of one knob by measured MACs. `value`: of the knob; `saved`: the running mean of what was saved, for
    people to read; `tower`: whose knob it is, and whose own MACs are meant (None: those of all towers)."""

    model: nn.Module
    saved: float = 0.0
    tower: str | None = None

    def __post_init__(self) -> None:
        self.control = BudgetControl(self.model, self.tower)
        self.value = self.control.value

    def start(
        self,
        batches: Iterable[Batch],
        reduction: float,
        tick: Callable[[], object] | None = None,
        meter: CostMeter | None = None,
    ) -> None:
        """Set the knob, from anywhere, to within a 24th of its range of a first target, by bisection on these batches.

        Where the target lies beyond what the knob can do, it begins where its end begins to make no difference. tick: called
        after each value that was tried; meter: the model's, where there is one already.
        """
        inputs, knob, meter = list(batches), self.control.knob, meter or CostMeter(self.model)

        def at(place: float) -> Calibration:
            found = measure(self.model, inputs, knob.value_at(place), self.tower, meter)
            if tick is not None:
                tick()
            return found

        ends = [at(0.0), at(1.0)]
        least, most = sorted(map(self._saved, ends))
        if least < reduction < most:
            ends = self._crossing(ends, reduction, at)
        best = min(ends, key=lambda one: abs(self._saved(one) - reduction))
        if not least < reduction < most:
            best = self._edge(best, at)
        assert best.value is not None  # `measure` set all depths alike
        self.load_state_dict({"value": best.value, "saved": self._saved(best)})

    def _saved(self, found: Calibration) -> float:
        """The share that was saved of the MACs that the target is of."""
        return found.reduction if self.tower is None else found.towers[self.tower].reduction

    def _crossing(
        self, ends: list[Calibration], reduction: float, at: Callable[[float], Calibration]
    ) -> list[Calibration]:
        """What was measured on both sides of a target between the ends of the range, a part of it apart. What is saved need
        not rise or fall all the way: any crossing will do."""
        starts_below = self._saved(ends[0]) < reduction
        low, high = 0, _EQUAL
        while high - low > 1:
            middle = (low + high) // 2
            found = at(middle / _EQUAL)
            if (self._saved(found) < reduction) == starts_below:
                low, ends = middle, [found, ends[1]]
            else:
                high, ends = middle, [ends[0], found]
        return ends

    def _edge(self, end: Calibration, at: Callable[[float], Calibration]) -> Calibration:
        """The farthest from an end of the range that still saves what the end does, by bisection."""
        assert end.value is not None
        near, far, best = self.control.knob.fraction(end.value), 1 - self.control.knob.fraction(end.value), end
        for _ in range(_HALVINGS):
            found = at((near + far) / 2)
            if abs(self._saved(found) - self._saved(end)) < _SAME:
                near, best = (near + far) / 2, found
            else:
                far = (near + far) / 2
        return best

    def step(self, saved: float, wanted: float) -> None:
        """saved: the share of the dense MACs that a step saved, of all processes; wanted: its target."""
        knob = self.control.knob
        more = (saved - wanted) if knob.larger_keeps_more else (wanted - saved)
        place = min(max(knob.fraction(self.value) + _PULL * more, 0.0), 1.0)
        saved = _MEMORY * self.saved + (1 - _MEMORY) * saved
        self.load_state_dict({"value": knob.value_at(place), "saved": saved})

    def take(self) -> None:
        """The knob to where this controller has it."""
        self.control.set(self.value)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "saved": self.saved}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """With the knob turned to where it was."""
        self.value, self.saved = state["value"], state["saved"]
        self.control.set(self.value)


class TowerControllers:
    """A controller for each tower that has a target of its own; the others' knobs stay where they are.

    Targets and measured shares are mappings from tower to a share of its own dense MACs; else it is used as a `Controller`.
    """

    def __init__(self, model: nn.Module, towers: Iterable[str]):
        # in the model's order, images first: a text tower's cost depends on the image tokens that it looks at
        self.towers = {name: Controller(model, tower=name) for name in get_pruning(model).towers if name in {*towers}}

    @property
    def value(self) -> dict[str, float]:
        """Of each tower's knob."""
        return {name: one.value for name, one in self.towers.items()}

    def start(
        self,
        batches: Iterable[Batch],
        reduction: Mapping[str, float],
        tick: Callable[[], object] | None = None,
        meter: CostMeter | None = None,
    ) -> None:
        inputs = list(batches)
        for name, one in self.towers.items():
            one.start(inputs, reduction[name], tick, meter)

    def step(self, saved: Mapping[str, float], wanted: Mapping[str, float]) -> None:
        for name, one in self.towers.items():
            one.step(saved[name], wanted[name])

    def take(self) -> None:
        for one in self.towers.values():
            one.take()

    def state_dict(self) -> dict[str, dict[str, float]]:
        return {name: one.state_dict() for name, one in self.towers.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, float]]) -> None:
        for name, one in self.towers.items():
            one.load_state_dict(state[name])


class Turns:
    """Several costs that one model learns by turns: every second step is the first one's, the others share the rest.

    A model that was trained at one cost is good at that: at a milder one its weights expect fewer tokens than there are.
    """

    def __init__(self, model: nn.Module, costs: Sequence[Target]):
        """costs: what to save, each once: of the dense MACs of all towers, or of each tower's own."""
        self.costs = tuple(costs)
        self.controllers: list[Any] = [
            TowerControllers(model, cost) if isinstance(cost, Mapping) else Controller(model) for cost in self.costs
        ]

    def place(self, step: int) -> int:
        """Whose turn a step is."""
        others = len(self.costs) - 1
        return 1 + step // 2 % others if others and step % 2 else 0

    def is_measured(self, step: int, every: int) -> bool:
        """Whether a step's cost is measured, where each cost is measured in every so many of its turns."""
        others = len(self.costs) - 1
        period = 1 if not others else 2 if self.place(step) == 0 else 2 * others
        return step // period % every == 0

    def take(self, place: int) -> None:
        """The knobs to where a cost has them."""
        self.controllers[place].take()

    def start(
        self,
        batches: Iterable[Batch],
        reduction: Target,
        tick: Callable[[], object] | None = None,
        meter: CostMeter | None = None,
    ) -> None:
        """All of them from the same value. tick: called after each value that was tried; meter: the model's."""
        self.controllers[0].start(batches, reduction, tick, meter)
        self.load_state_dict([self.controllers[0].state_dict()] * len(self.controllers))

    def state_dict(self) -> list[dict[str, Any]]:
        return [controller.state_dict() for controller in self.controllers]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """With the knob as the first one has it."""
        for controller, state in reversed(list(zip(self.controllers, states, strict=True))):
            controller.load_state_dict(state)
