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
from .targets import Target, check_language, check_targets
from .visual_tokens import PromptCounts

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
    reduction: float | Mapping[str, float] | None = None,
    tolerance: float = 0.01,
    *,
    visual_tokens: float | None = None,
    decode: int = 0,
    inputs: Inputs = None,
    progress: bool | None = None,
    meter: CostMeter | None = None,
) -> Calibration:
    """Sets the knob of a pruned model's keepers so that its mean MACs over `batches` are `reduction` below dense.

    One number sets one value of the knob at every depth of every tower. A mapping sets a value for each tower that it names,
    so that the tower saves that fraction of its own MACs. The others stay as they are. The values are also written into
    `model.pruning.config`.

    MACs of a vision-language model are those of the image tower and of the prompts. `visual_tokens` is another target: what
    papers mean by "192 tokens".

    Args:
        model: a pruned model, wrapped (compiled, in parallel) or not.
        batches: a DataLoader or a list of batches, held in memory and run about ten times, at most 30. A batch is a tensor, a
            tuple or list of positional inputs, or a mapping of named inputs. Tensors are moved to the model's device and
            floating-point type. A function is called with the model, for another method than its call.
        reduction: fraction of the dense MACs to save, in (0, 1), such as 0.5 or {"image": 0.5, "text": 0.3}. Dense MACs are
            those on the tokens that are there, without padding. None is 0.5 without `visual_tokens`.
        tolerance: relative to the MACs, or to the visual tokens, that are to remain.
        visual_tokens: in place of `reduction`, visual tokens at the input of a layer of the language model, mean over layers
            and prompts. Batches without images do not count.
        decode: how many tokens are generated behind each prompt, by a model with a language model. MACs are then of these
            too.
        inputs: which part of a batch the model takes, where a batch holds more, such as labels. It is a position (0), a key
            ("pixel_values") or a function of the batch. None passes the whole batch.
        progress: whether to show a progress bar on stderr; None shows it where stderr is a terminal.
        meter: the model's CostMeter, where it is measured again and again.

    Returns:
        The Calibration: the knob's value, and MACs per instance, pruned and dense, in all and for each tower.

    Raises:
        ValueError: for a reduction outside (0, 1), a tower that the model lacks or does not prune, no batches, or a keeper
            without a knob; for two targets, and for more visual tokens than the prompts have.
        TypeError: for a dense model, for batches that the model does not take, and for `visual_tokens` and `decode` of a model
            without a language model.
        BudgetError: for a target out of reach, or between two counts. The model is then as it was.
    """
    if reduction is None and visual_tokens is None:
        reduction = 0.5
    check_targets(model, reduction, visual_tokens)
    meter = meter or CostMeter(model)
    check_language(meter, visual_tokens, decode)
    if decode and isinstance(reduction, Mapping):
        raise ValueError(
            f"decode={decode} counts for the whole model, and reduction={reduction} is by tower: give one reduction"
        )
    held = list(model_inputs(batches, inputs))
    if not held:
        raise ValueError("calibrate needs at least one batch of inputs")
    if isinstance(reduction, Mapping):
        # in the model's order, images first: a text tower's cost depends on the image tokens that it looks at
        order = [tower for tower in get_pruning(model).towers if tower in reduction]
        targets = [Target(reduction[tower], tower) for tower in order]
    else:
        targets = [Target(reduction, visual_tokens=visual_tokens)]
    what = f"{visual_tokens:g} visual tokens" if reduction is None else f"{format_target(reduction)} fewer MACs"
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(bar(f"calibrating to {what}", disable=None if progress is None else not progress))
        searches = [_Search(model, held, shown, meter, target, decode) for target in targets]
        for search in searches:
            stack.enter_context(search.control.unless_done())
        found = [search.find(tolerance) for search in searches]
    for search, one in zip(searches, found, strict=True):
        search.control.commit(search.value(one))
    # the last was measured with all the others set
    return dataclasses.replace(found[-1], knob=None, value=None) if isinstance(reduction, Mapping) else found[-1]


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    value: float | None = None,
    tower: str | None = None,
    meter: CostMeter | None = None,
    *,
    decode: int = 0,
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
        decode: as in `calibrate`.
        inputs: which part of a batch the model takes, as in `calibrate`.

    Returns:
        The Calibration at this value.

    Raises:
        ValueError: for no batches; with a value or a tower, for a tower that the model lacks or does not prune, and for keepers
            without a knob.
        TypeError: for a dense model, for batches that the model does not take, and for `decode` of a model without a language
            model.
    """
    meter = meter or CostMeter(model)
    check_language(meter, None, decode)
    if value is None and tower is None:
        return _measured(model, meter, model_inputs(batches, inputs), decode=decode)
    control, wanted = BudgetControl(model, tower), model_inputs(batches, inputs)
    if any(keeper.fits_data for keeper in control.keepers):
        wanted = list(wanted)
    with control.unless_done():
        if value is not None:
            control.set(value)
            fit_keepers(model, control, wanted)
        return _measured(model, meter, wanted, tower, decode)


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
    """What is saved, of the model or of one tower, as a function of the knob, and the bisection on it."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], shown: tqdm, meter: CostMeter, target: Target, decode: int
    ):
        self.model, self.batches, self.shown, self.target, self.decode = model, batches, shown, target, decode
        self.control, self.meter = BudgetControl(model, target.tower), meter
        self.knob = self.control.knob

    def measure(self, value: float) -> Calibration:
        self.set(value)
        batches = counted(self.batches, self.shown)
        found = _measured(self.model, self.meter, batches, self.target.tower, self.decode)
        self.shown.set_postfix_str(f"{self.target.describe(found)} at {self.knob.name}={value:.4g}")
        return found

    def set(self, value: float) -> None:
        """Sets the knob, and fits what follows from it and from the batches."""
        self.control.set(value)
        fit_keepers(self.model, self.control, self.batches)

    def value(self, found: Calibration) -> float:
        """The knob's value where it was measured."""
        tower = self.target.tower
        value = found.value if tower is None else found.towers[tower].value
        assert value is not None  # `measure` sets one
        return value

    def find(self, tolerance: float) -> Calibration:
        """The value that meets the target, by bisection. Savings need not be monotonic: any crossing will do.

        They are relative to the dense model measured with the same value: a decoder generates other words from other tokens.
        """
        saved = self.target.saved
        tried = [self.measure(self.knob.value_at(0.0)), self.measure(self.knob.value_at(1.0))]
        reduction = self.target.to_save(tried[0])
        starts_below = saved(tried[0]) > reduction
        between = (0.0, 1.0) if (saved(tried[1]) > reduction) != starts_below else self._crossing(reduction, tried)

        def off(found: Calibration) -> float:
            return abs(saved(found) - reduction)

        low, high = between or (0.0, 0.0)
        while min(map(off, tried)) > tolerance * (1 - reduction) and high - low > _FINEST:
            middle = (low + high) / 2
            tried.append(self.measure(self.knob.value_at(middle)))
            low, high = (middle, high) if (saved(tried[-1]) > reduction) == starts_below else (low, middle)
        best = min(tried, key=off)
        if off(best) > tolerance * (1 - reduction):
            raise BudgetError(self._missed(reduction, tolerance, tried, best), best)
        self.set(self.value(best))  # as the next tower's search must find it
        return best

    def _crossing(self, reduction: float, tried: list[Calibration]) -> tuple[float, float] | None:
        """Two places between which the target is crossed first; None where no step has it beyond."""
        below = self.target.saved(tried[0]) > reduction
        for step in range(1, _STEPS):
            tried.append(self.measure(self.knob.value_at(step / _STEPS)))
            if (self.target.saved(tried[-1]) > reduction) != below:
                return (step - 1) / _STEPS, step / _STEPS
        return None

    def _missed(self, reduction: float, tolerance: float, tried: Sequence[Calibration], best: Calibration) -> str:
        """Why the target was missed, the nearest to it, and what this model's config leaves to change."""
        keep, knob, target = get_pruning(self.model).config.describe("keep"), self.knob, self.target
        least, most = (function(tried, key=target.saved) for function in (min, max))
        nearest = f"the nearest is {target.describe(best)} at {knob.name}={self.value(best):g}"
        is_visual = target.visual_tokens is not None
        if target.saved(least) < reduction < target.saved(most):
            whose = "" if target.tower is None else f" of the {target.tower} tower"
            left = f"{percent(1 - reduction)} of the MACs{whose}"
            if is_visual:
                left = f"{target.visual_tokens:g} visual tokens on average"
            reason = (
                f"no {knob.name} of keep={keep!r} leaves {left} to within {percent(tolerance)} of them: its counts jump "
                f"there, and {nearest}"
            )
        else:
            others = "" if target.tower is None else " with the other towers as they then are"
            does = "leaves" if is_visual else "saves"
            reason = (
                f"{target} is out of reach of keep={keep!r}: {knob.name} from {knob.low:g} to "
                f"{knob.high:g} {does} {target.describe(least)} to {target.describe(most)}{others}, and {nearest}"
            )
        visual = best.dense_visual_tokens if is_visual else None
        advice = budget_advice(self.model, self.control, reduction, target.saved(least), target.saved(most), visual)
        return f"{reason}. {advice}"


def _measured(
    model: nn.Module, meter: CostMeter, batches: Iterable[Batch], tower: str | None = None, decode: int = 0
) -> Calibration:
    """The mean cost of batches, with the knob of all towers, or of one."""
    macs = dense = padding = instances = 0.0
    towers: dict[str, list[float]] = {}
    prompts: list[PromptCounts] = []
    language = meter.language
    for batch in batches:
        with evaluating(model), torch.no_grad(), collect(threads=False) as traces:
            run_batch(model, batch)
        if language is not None and not traces:
            continue  # a text alone, of which nothing is pruned
        cost = meter(traces)
        macs, dense, padding = macs + cost.total, dense + cost.dense_total, padding + cost.padding_total
        instances += cost.instances
        for name in cost.towers:
            spent = [float(one[name].sum()) for one in (cost.towers, cost.dense, cost.padding)]
            towers[name] = [sum(pair) for pair in zip(towers.get(name, [0.0] * 3), spent, strict=True)]
        counts = None if language is None else PromptCounts.from_traces(traces, language.layers)
        if language is not None and counts is not None:
            prompts.append(counts)
            macs += language.decode(counts.prompts, counts.cached, decode)
            dense += language.decode(counts.prompts, counts.dense_length, decode)
    if not instances:
        what = "inputs" if language is None else "inputs with images"
        raise ValueError(f"measuring needs at least one batch of {what}")
    encoders = get_pruning(model).towers
    tower_calibrations = {}
    for name, sums in towers.items():
        pruned, full, padded = (one / instances for one in sums)
        tower_calibrations[name] = TowerCalibration(pruned, full, padded, *_set_to(keepers_of(encoders[name])))
    asked = encoders if tower is None else (tower,)
    knob, value = _set_to(keeper for name in asked for keeper in keepers_of(encoders[name]))
    macs, dense, padding = (one / instances for one in (macs, dense, padding))
    visual, whole = _mean_visual(prompts)
    return Calibration(knob, value, macs, dense, padding, tower_calibrations, visual, whole)


def _mean_visual(prompts: Sequence[PromptCounts]) -> tuple[float | None, float | None]:
    """Visual tokens of prompts, mean over layers and prompts, pruned and dense; None for no prompts with images."""
    number = sum(one.prompts for one in prompts)
    if not number:
        return None, None
    return sum(one.average for one in prompts) / number, sum(one.dense for one in prompts) / number


def _set_to(keepers: Iterable[KeepRatioPredictor]) -> tuple[str | None, float | None]:
    """The knob that all keepers have, and the value that all have; None for none in common."""
    settings = {
        (keeper.knob.name, getattr(keeper, keeper.knob.name)) if keeper.knob else (None, None) for keeper in keepers
    }
    names = {name for name, _ in settings}
    value = settings.pop()[1] if len(settings) == 1 else None
    return (names.pop() if len(names) == 1 else None), value
