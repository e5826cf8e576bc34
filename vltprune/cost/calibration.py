"""Calibration: sets the budget of a pruned model to a cost by bisection, on inputs alone, without training."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from tqdm import tqdm

from ..layers import KeepRatioPredictor
from ..pruning.model import get_pruning
from ..pruning.trace import collect
from ..utils.modes import evaluating
from ..utils.progress import bar, counted
from .advice import budget_advice
from .budget_control import BudgetControl, keepers_of
from .describe import format_target, percent
from .inputs import Batch, Inputs, model_inputs, run_batch
from .macs import CostMeter
from .savings import Calibration, TowerCalibration

# of a knob's range: equal steps where both ends are beyond a cost or short of it, and the finest step of halving
_STEPS = 12
_FINEST = 2**-20


class BudgetError(ValueError):
    """The knob of a model's keepers cannot reach a cost.

    Attributes:
        message: the cost, the nearest reachable one, and what to change.
        nearest: the Calibration that comes nearest to the cost.
    """

    def __init__(self, message: str, nearest: Calibration):
        super().__init__(message, nearest)  # both, so that it can be pickled

    def __str__(self) -> str:
        return self.args[0]

    @property
    def nearest(self) -> Calibration:
        return self.args[1]


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    reduction: float | Mapping[str, float] = 0.5,
    tolerance: float = 0.01,
    *,
    inputs: Inputs = None,
    progress: bool | None = None,
    meter: CostMeter | None = None,
) -> Calibration:
    """Sets the knob of a pruned model's keepers so that its mean MACs over `batches` are `reduction` below dense.

    One number sets one value of the knob at every depth of every tower. A mapping sets a value for each tower that it names,
    so that the tower saves that fraction of its own MACs. The others stay as they are. The values are also written into
    `model.pruning.config`.

    Args:
        model: a pruned model, wrapped (compiled, in parallel) or not.
        batches: a DataLoader or a list of batches, held in memory and run about ten times, at most 30. A batch is a tensor, a
            tuple or list of positional inputs, or a mapping of named inputs. Tensors are moved to the model's device and
            floating-point type. A function is called with the model, for another method than its call.
        reduction: fraction of the dense MACs to save, in (0, 1), such as 0.5 or {"image": 0.5, "text": 0.3}. Dense MACs are
            those on the tokens that are there, without padding.
        tolerance: relative to the MACs that are to remain.
        inputs: which part of a batch the model takes, where a batch holds more, such as labels. It is a position (0), a key
            ("pixel_values") or a function of the batch. None passes the whole batch.
        progress: whether to show a progress bar on stderr; None shows it where stderr is a terminal.
        meter: the model's CostMeter, where it is measured again and again.

    Returns:
        The Calibration: the knob's value, and MACs per instance, pruned and dense, in all and for each tower.

    Raises:
        ValueError: for a reduction outside (0, 1), a tower that the model lacks or does not prune, no batches, or a keeper
            without a knob.
        TypeError: for a dense model, and for batches that the model does not take.
        BudgetError: for a target out of reach, or between two counts. The model is then as it was.
    """
    check_targets(model, reduction)
    held = list(model_inputs(batches, inputs))
    if not held:
        raise ValueError("calibrate needs at least one batch of inputs")
    wanted: dict[str | None, float] = {}
    if isinstance(reduction, Mapping):
        # in the model's order, images first: a text tower's cost depends on the image tokens that it looks at
        wanted |= {tower: reduction[tower] for tower in get_pruning(model).towers if tower in reduction}
    else:
        wanted[None] = reduction
    meter = meter or CostMeter(model)
    what = f"calibrating to {format_target(reduction)} fewer MACs"
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(bar(what, disable=None if progress is None else not progress))
        searches = {tower: _Search(model, held, shown, meter, tower) for tower in wanted}
        for search in searches.values():
            stack.enter_context(search.control.unless_done())
        found = [search.find(wanted[tower], tolerance) for tower, search in searches.items()]
    for search, one in zip(searches.values(), found, strict=True):
        search.control.commit(search.value(one))
    # the last was measured with all the others set
    return dataclasses.replace(found[-1], knob=None, value=None) if isinstance(reduction, Mapping) else found[-1]


def check_targets(model: nn.Module, reduction: float | Mapping[str, float]) -> None:
    """Refuses a target that `calibrate` cannot search for.

    Args:
        model: a pruned model, wrapped or not.
        reduction: the fraction of the dense MACs to save, or one for each tower.

    Raises:
        TypeError: for a dense model.
        ValueError: for a target outside (0, 1), and for a tower that the model lacks or does not prune, or whose keeper has
            no knob.
    """
    towers = get_pruning(model).towers
    by_tower = dict(reduction) if isinstance(reduction, Mapping) else {}
    for target in by_tower.values() if by_tower else (reduction,):
        if isinstance(target, (bool, Mapping)) or not 0 < target < 1:
            raise ValueError(
                f"reduction={reduction} must lie between 0 and 1: the fraction of the dense MACs to save"
                + (", for each tower; leave a tower out to leave it as it is" if by_tower else "")
            )
    for tower in by_tower:
        if tower not in towers:
            raise ValueError(f"reduction={reduction} names the tower {tower!r}; this model has {', '.join(towers)}")
        if not towers[tower].pruners:
            raise ValueError(f"reduction={reduction}: the {tower} tower is pruned nowhere, so it cannot save anything")
    for tower in by_tower or (None,):
        BudgetControl(model, tower)


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    value: float | None = None,
    tower: str | None = None,
    meter: CostMeter | None = None,
    *,
    inputs: Inputs = None,
) -> Calibration:
    """Measures the mean MACs per instance of a pruned model over batches, as it is or at a value of its keepers' knob.

    Args:
        model: a pruned model, wrapped or not.
        batches: a DataLoader or a list of batches, as `calibrate` takes them. They are run once,
            and once more where keepers fit data.
        value: what the knob is set to. It stays there, unless measuring fails. Keepers that fit data are fitted to the batches.
            None leaves the knob as it is.
        tower: the tower whose knob is set. None for the knob of all towers.
        meter: the model's CostMeter, where it is measured again and again.
        inputs: which part of a batch the model takes, as in `calibrate`.

    Returns:
        The Calibration at this value.

    Raises:
        ValueError: for no batches; with a value or a tower, for a tower that the model lacks or does not prune, and for keepers
            without a knob.
        TypeError: for a dense model, and for batches that the model does not take.
    """
    meter = meter or CostMeter(model)
    if value is None and tower is None:
        return _measured(model, meter, model_inputs(batches, inputs))
    control, wanted = BudgetControl(model, tower), model_inputs(batches, inputs)
    if any(keeper.fits_data for keeper in control.keepers):
        wanted = list(wanted)
    with control.unless_done():
        if value is not None:
            control.set(value)
            fit_keepers(model, control, wanted)
        return _measured(model, meter, wanted, tower)


def fit_keepers(model: nn.Module, control: BudgetControl, batches: Iterable[Batch]) -> None:
    """Fits the keepers that `fits_data` to the mean of batches, at the knob's value; without any, nothing is run.

    Args:
        model: a pruned model.
        control: its knob.
        batches: what the model takes, as it takes it.
    """
    fitted = [keeper for keeper in control.keepers if keeper.fits_data]
    if not fitted:
        return
    weights = [keeper.batch_weight for keeper in fitted]
    with evaluating(model), torch.no_grad(), collect(threads=False):
        for keeper in fitted:
            keeper.train()
        try:
            for number, batch in enumerate(batches, 1):
                for keeper in fitted:
                    keeper.batch_weight = 1 / number
                run_batch(model, batch)
        finally:
            for keeper, weight in zip(fitted, weights, strict=True):
                keeper.batch_weight = weight


class _Search:
    """Mean MACs, of the model or of one tower, as a function of the knob, and the bisection on it."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], shown: tqdm, meter: CostMeter, tower: str | None):
        self.model, self.batches, self.shown, self.tower = model, batches, shown, tower
        self.control, self.meter = BudgetControl(model, tower), meter
        self.knob = self.control.knob

    def measure(self, value: float) -> Calibration:
        self.set(value)
        found = _measured(self.model, self.meter, counted(self.batches, self.shown), self.tower)
        self.shown.set_postfix_str(f"{percent(self.saved(found))} at {self.knob.name}={value:.4g}")
        return found

    def set(self, value: float) -> None:
        """Sets the knob, and fits what follows from it and from the batches."""
        self.control.set(value)
        fit_keepers(self.model, self.control, self.batches)

    def value(self, found: Calibration) -> float:
        """The knob's value where it was measured."""
        value = found.value if self.tower is None else found.towers[self.tower].value
        assert value is not None  # `measure` sets one
        return value

    def saved(self, found: Calibration) -> float:
        """The fraction that was saved of the MACs that the target is of."""
        if self.tower is None:
            return found.reduction
        if self.tower not in found.towers:
            raise ValueError(f"none of the batches ran the {self.tower} tower: give inputs that it reads too")
        return found.towers[self.tower].reduction

    def find(self, reduction: float, tolerance: float) -> Calibration:
        """The value that meets the target, by bisection. Savings need not be monotonic: any crossing will do.

        They are relative to the dense MACs measured with the same value: a decoder generates other words from other tokens.
        """
        tried = [self.measure(self.knob.value_at(0.0)), self.measure(self.knob.value_at(1.0))]
        starts_below = self.saved(tried[0]) > reduction
        between = (0.0, 1.0) if (self.saved(tried[1]) > reduction) != starts_below else self._crossing(reduction, tried)

        def off(found: Calibration) -> float:
            return abs(self.saved(found) - reduction)

        low, high = between or (0.0, 0.0)
        while min(map(off, tried)) > tolerance * (1 - reduction) and high - low > _FINEST:
            middle = (low + high) / 2
            tried.append(self.measure(self.knob.value_at(middle)))
            low, high = (middle, high) if (self.saved(tried[-1]) > reduction) == starts_below else (low, middle)
        best = min(tried, key=off)
        if off(best) > tolerance * (1 - reduction):
            raise BudgetError(self._missed(reduction, tolerance, tried, best), best)
        self.set(self.value(best))  # as the next tower's search must find it
        return best

    def _crossing(self, reduction: float, tried: list[Calibration]) -> tuple[float, float] | None:
        """Two places between which the target is crossed first; None where no step has it beyond."""
        below = self.saved(tried[0]) > reduction
        for step in range(1, _STEPS):
            tried.append(self.measure(self.knob.value_at(step / _STEPS)))
            if (self.saved(tried[-1]) > reduction) != below:
                return (step - 1) / _STEPS, step / _STEPS
        return None

    def _missed(self, reduction: float, tolerance: float, tried: Sequence[Calibration], best: Calibration) -> str:
        """Why the target was missed, the nearest to it, and what this model's config leaves to change."""
        keep, knob = get_pruning(self.model).config.describe("keep"), self.knob
        whose = "" if self.tower is None else f" of the {self.tower} tower"
        least, most = (f(self.saved(one) for one in tried) for f in (min, max))
        nearest = f"the nearest is {percent(self.saved(best))} at {knob.name}={self.value(best):g}"
        if least < reduction < most:
            reason = (
                f"no {knob.name} of keep={keep!r} leaves {percent(1 - reduction)} of the MACs{whose} to within "
                f"{percent(tolerance)} of them: its counts jump there, and {nearest}"
            )
        else:
            others = "" if self.tower is None else " with the other towers as they then are"
            reason = (
                f"reduction={reduction}{whose} is out of reach of keep={keep!r}: {knob.name} from {knob.low:g} to "
                f"{knob.high:g} saves {percent(least)} to {percent(most)}{others}, and {nearest}"
            )
        return f"{reason}. {budget_advice(self.model, self.control, reduction, least, most)}"


def _measured(model: nn.Module, meter: CostMeter, batches: Iterable[Batch], tower: str | None = None) -> Calibration:
    """The mean cost of batches, with the knob of all towers, or of one."""
    macs = dense = padding = instances = 0.0
    towers: dict[str, list[float]] = {}
    for batch in batches:
        with evaluating(model), torch.no_grad(), collect(threads=False) as traces:
            run_batch(model, batch)
        cost = meter(traces)
        macs, dense, padding = macs + cost.total, dense + cost.dense_total, padding + cost.padding_total
        instances += cost.instances
        for name in cost.towers:
            spent = [float(one[name].sum()) for one in (cost.towers, cost.dense, cost.padding)]
            towers[name] = [sum(pair) for pair in zip(towers.get(name, [0.0] * 3), spent, strict=True)]
    if not instances:
        raise ValueError("measuring needs at least one batch of inputs")
    encoders = get_pruning(model).towers
    tower_calibrations = {}
    for name, sums in towers.items():
        pruned, full, padded = (one / instances for one in sums)
        tower_calibrations[name] = TowerCalibration(pruned, full, padded, *_set_to(keepers_of(encoders[name])))
    asked = encoders if tower is None else (tower,)
    knob, value = _set_to(keeper for name in asked for keeper in keepers_of(encoders[name]))
    return Calibration(knob, value, macs / instances, dense / instances, padding / instances, tower_calibrations)


def _set_to(keepers: Iterable[KeepRatioPredictor]) -> tuple[str | None, float | None]:
    """The knob that all keepers have, and the value that all have; None for none in common."""
    settings = {
        (keeper.knob.name, getattr(keeper, keeper.knob.name)) if keeper.knob else (None, None) for keeper in keepers
    }
    names = {name for name, _ in settings}
    value = settings.pop()[1] if len(settings) == 1 else None
    return (names.pop() if len(names) == 1 else None), value
