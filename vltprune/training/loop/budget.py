"""Budget of a run: the cost each step trains at, its target, and what keeps the model to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ...cost.budget_control import keepers_of
from ...cost.calibration import Batch
from ...cost.macs import CostMeter
from ...layers import KeepRatioPredictor
from ...pruning.model import get_pruning
from ...pruning.pruner import Pruner
from ..config import CompressConfig
from .controller import CostRotation, Target, target
from .metrics import tower_metrics

# MACs are measured, and the knob is adjusted, every so many steps; so often in a run, at least
_MEASURE_EVERY, _LEAST_MEASUREMENTS = 5, 200
_FIRST_TEMPERATURE, _LAST_TEMPERATURE = 0.5, 0.01  # of soft thresholds, in standard deviations of the scores
_BATCH_WEIGHT = 0.1  # of a batch in the running mean of what keepers fit to data
_SOFT_SHARE = 0.5  # of the steps; after them tokens stay or go, as in evaluation
_MULTIPLIER_RATE = 0.05  # how much a step adds to the multiplier for each 100 % of the dense MACs too much


class TrainBudget:
    """Keeps a model to the costs of a config: by controllers, or softly, by a loss on the expected MACs, at first.

    The loss is that of an augmented Lagrangian: `multiplier` times the constraint violation, plus its square.

    Args:
        model: the pruned model.
        config: says the costs, how they are kept, and how fast targets rise.
        steps: steps of the whole run.
    """

    def __init__(self, model: nn.Module, config: CompressConfig, steps: int):
        self.model, self.config, self.steps = model, config, steps
        self.multiplier = 0.0
        costs = dict.fromkeys((config.reduction, *config.serve))
        for keeper in _keepers(model):
            keeper.batch_weight = _BATCH_WEIGHT
        self.rotation = CostRotation(model, tuple(costs)) if config.reduction else None

    def initialize(self, batches: Iterable[Batch], tick: Callable[[], object], meter: CostMeter) -> None:
        """Sets the knobs to their first targets, as `Controller.initialize`; does nothing where nothing is saved.

        Args:
            batches: what MACs are measured on.
            tick: called after each value that was tried.
            meter: the model's cost meter.
        """
        if self.rotation is not None:
            self.rotation.initialize(batches, self.target(0), tick, meter)

    def target(self, step: int, index: int = 0) -> Target:
        """Target of one of the costs at a step.

        Args:
            step: of the run.
            index: of the cost: 0 is the config's `reduction`, then its `serve` follow.

        Returns:
            Share of the dense MACs to save; or, where towers have targets, a share of each tower's own.
        """
        cost: Target = 0.0 if self.rotation is None else self.rotation.costs[index]
        if isinstance(cost, Mapping):
            return {tower: target(step, self.steps, share, self.config.ramp) for tower, share in cost.items()}
        return target(step, self.steps, cost, self.config.ramp)

    def is_soft(self, step: int) -> bool:
        """Whether tokens are kept softly at a step, under a loss on the expected MACs."""
        return self.config.budget == "learned" and self.rotation is not None and step < _SOFT_SHARE * self.steps

    def is_measured(self, step: int) -> bool:
        """Whether MACs are measured at a step."""
        every = max(min(_MEASURE_EVERY, self.steps // _LEAST_MEASUREMENTS), 1)
        if self.rotation is None or self.is_soft(step):
            return step % every == 0
        return self.rotation.is_measured(step, every)

    def apply(self, step: int) -> None:
        """Sets the pruners to a step's cost, and to a soft temperature that falls, so that the weights get used to it."""
        if self.rotation is not None:
            self.rotation.apply(self._index(step))
        fall = (_LAST_TEMPERATURE / _FIRST_TEMPERATURE) ** (step / (_SOFT_SHARE * self.steps))
        for tower in get_pruning(self.model).towers.values():
            for module in tower.modules():
                if isinstance(module, Pruner):
                    module.soft_temperature = _FIRST_TEMPERATURE * fall if self.is_soft(step) else 0.0

    def update(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Adjusts multiplier and knob to a step's metrics.

        Args:
            step: of the run.
            metrics: as of `reduce_metrics`; where MACs were not measured, knobs stay.

        Returns:
            The metrics to report: those of the config's `reduction` as they are, of another cost two, under its own names.
        """
        self.multiplier += _MULTIPLIER_RATE * metrics.get("violation", 0.0)
        if self.rotation is None:
            return dict(metrics)
        index = self._index(step)
        if "saved" in metrics and not self.is_soft(step):
            wanted = self.target(step, index)
            saved = {t: metrics[f"saved {t}"] for t in wanted} if isinstance(wanted, Mapping) else metrics["saved"]
            self.rotation.controllers[index].step(saved, wanted)
        if index == 0:
            return dict(metrics)
        cost = f"{self.rotation.costs[index]:g}"
        return {f"{name} {cost}": metrics[name] for name in ("task", "saved") if name in metrics}

    def metrics(self, step: int) -> dict[str, float]:
        """Target and knob at a step."""
        knob = {} if self.rotation is None else tower_metrics("knob", self.rotation.controllers[0].value)
        return {**tower_metrics("target", self.target(step)), **knob}

    def state_dict(self) -> dict[str, Any]:
        """Plain data that json can write."""
        controllers = None if self.rotation is None else self.rotation.state_dict()
        return {"multiplier": self.multiplier, "controllers": controllers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the multiplier and the knobs."""
        self.multiplier = state["multiplier"]
        if self.rotation is not None:
            self.rotation.load_state_dict(state["controllers"])

    def _index(self, step: int) -> int:
        """Index of the cost that a step learns; thresholds learn softly at the first alone."""
        return 0 if self.rotation is None or self.is_soft(step) else self.rotation.index(step)


def _keepers(model: nn.Module) -> list[KeepRatioPredictor]:
    """The keepers of a pruned model that fit data."""
    towers = get_pruning(model).towers.values()
    return [keeper for tower in towers for keeper in keepers_of(tower) if keeper.fits_data]
