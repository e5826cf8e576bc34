"""Steering the cost while the weights move: the knob is turned a little after each measurement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..budget import Batch, Dial, measure

_PULL = 0.1  # of the knob's range, for each 100 % of the dense MACs that the cost is off
_MEMORY = 0.9  # of the running mean of what was measured
_PLACES = 25  # tried on the way to a first value


def target(step: int, steps: int, reduction: float, ramp: float) -> float:
    """The share of the dense MACs to save at a step: from 0 to `reduction` over the first `ramp` of all steps, fast at
    first (1 - (1 - t)^3, Zhu and Gupta, arXiv 1710.01878, equation 1)."""
    t = min(step / (ramp * steps), 1.0) if ramp > 0 else 1.0
    return reduction * (1 - (1 - t) ** 3)


@dataclass
class Controller:
    """Integral control of one knob by measured MACs. `saved` is the running mean of what was saved, for people to read."""

    model: nn.Module
    saved: float = 0.0

    def __post_init__(self) -> None:
        self.dial = Dial(self.model)

    def start(self, batches: Iterable[Batch], reduction: float) -> None:
        """Set the knob, from anywhere, as near to a first target as it comes on these batches."""
        inputs, knob = list(batches), self.dial.knob
        found = [measure(self.model, inputs, knob.at(place / (_PLACES - 1))) for place in range(_PLACES)]
        best = min(found, key=lambda one: abs(one.reduction - reduction))
        self.dial.turn(best.value)
        self.saved = best.reduction

    def step(self, saved: float, wanted: float) -> None:
        """saved: the share of the dense MACs that a step saved, of all processes; wanted: its target."""
        knob = self.dial.knob
        more = (saved - wanted) if knob.keeps else (wanted - saved)
        place = min(max(knob.place(self.dial.value) + _PULL * more, 0.0), 1.0)
        self.dial.turn(knob.at(place))
        self.saved = _MEMORY * self.saved + (1 - _MEMORY) * saved

    def state_dict(self) -> dict[str, float]:
        return {"value": self.dial.value, "saved": self.saved}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.dial.turn(state["value"])
        self.saved = state["saved"]
