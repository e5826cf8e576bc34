"""Asking for a cost instead of a threshold: calibration by bisection, on inputs alone, without training."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .flops import Meter
from .layers import KeepRatioPredictor, Knob, Ratio
from .modes import evaluating
from .pruner import PrunedEncoder, Pruner, UntrainedGuideWarning
from .surgery import pruning
from .tokens import PackedTokens
from .traces import collect

_STEPS, _MOST_TRIED = 12, 50  # of a search: equal steps where both ends are beyond a cost or short of it, values in all

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any] | Callable[[nn.Module], Any]


class BudgetError(ValueError):
    """A cost that the keeper's knob cannot reach. nearest: the Calibration that comes nearest to it."""

    def __init__(self, message: str, nearest: Calibration):
        super().__init__(message, nearest)  # both, so that it can be pickled

    def __str__(self) -> str:
        return self.args[0]

    @property
    def nearest(self) -> Calibration:
        return self.args[1]


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found: the knob and its value, MACs per instance with it and dense, and the share saved."""

    knob: str
    value: float
    macs: float
    dense_macs: float

    @property
    def reduction(self) -> float:
        return 1 - self.macs / self.dense_macs


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    reduction: float = 0.5,
    tolerance: float = 0.01,
    progress: Callable[[float, float], None] | None = None,
) -> Calibration:
    """Set a pruned model's knob, DTP's power or a ratio, so that its mean MACs over `batches` are `reduction` below dense.

    batches: inputs of the model, each a tensor, a tuple of positional inputs or a mapping of named ones, or a function that
    puts its inputs to the model itself, by another method than the call; they are run some ten times, and at most 50. The
    knob is set at every depth of every tower, and in `model.pruning.config`. tolerance: relative to the target. progress:
    called with each value tried and the reduction it gave. Returns a Calibration.

    Raises ValueError for a reduction outside (0, 1), no batches, or a keeper without a knob; BudgetError, with what can be
    had, where the target is out of reach or between two counts. The model is then as it was.
    """
    if not 0 < reduction < 1:
        raise ValueError(f"reduction={reduction} must lie between 0 and 1: the share of the dense MACs to save")
    inputs = list(batches)
    if not inputs:
        raise ValueError("calibrate needs at least one batch of inputs")
    search = _Search(model, inputs, progress)
    with search.dial.unless_done():
        found = search.find(reduction, tolerance)
    search.dial.settle(found.value)
    return found


def measure(model: nn.Module, batches: Iterable[Batch], value: float | None = None) -> Calibration:
    """Mean MACs per instance over batches, as in `calibrate`, with the knob at `value`, where it stays (None: as it is).

    Where it fails, the knob is where it was.
    """
    dial = Dial(model)
    with dial.unless_done():
        if value is not None:
            dial.turn(value)
        return _measured(model, Meter(model), dial, batches)


def fit_guide(model: nn.Module, batches: Iterable[Batch], seed: int = 0, points: int = 20_000) -> None:
    """Place the shared anchors of a pruned model among its own tokens: k-means over those of all towers and depths.

    For use without training: an untrained codebook is noise. batches as in `calibrate`; at most `points` tokens are held,
    drawn with `seed`, equally many of each tower and more readily from later batches. Nothing is pruned meanwhile.
    Raises ValueError for a model without a guide, no batches, or fewer tokens than anchors.
    """
    guide = pruning(model).guide
    if guide is None:
        raise ValueError("this model has no guide to fit: prune it with guide='codebook'")
    generator, each = torch.Generator().manual_seed(seed), points // len(pruning(model).towers)
    drawn: dict[str, Tensor] = {}
    with evaluating(model), torch.no_grad(), collect() as traces, _keeping_all(model):
        for batch in batches:
            _run(model, batch)
            for trace in traces:
                fresh = [_free(step.guidance.mapped) for step in trace.steps if step.guidance is not None]
                if not fresh:
                    continue  # this tower prunes nowhere
                tokens = torch.cat([drawn[trace.tower], *fresh] if trace.tower in drawn else fresh)
                drawn[trace.tower] = tokens[torch.randperm(len(tokens), generator=generator)[:each].to(tokens.device)]
            traces.clear()
    if not drawn:
        raise ValueError("fit_guide needs at least one batch of inputs")
    guide.fit(torch.cat(list(drawn.values())), seed)


class Dial:
    """The knob of a pruned model, at all its depths. ValueError for a keeper that has none."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.keepers = [keeper for tower in pruning(model).towers.values() for keeper in _keepers(tower)]
        knob = self.keepers[0].knob if self.keepers else None
        if knob is None:
            raise ValueError(
                f"keep={str(pruning(model).config.part('keep'))!r} has nothing a budget can turn: use keep='threshold', "
                "'ratio' or 'random_ratio'"
            )
        self.knob: Knob = knob

    @property
    def value(self) -> float:
        """The first depth's."""
        return getattr(self.keepers[0], self.knob.name)

    def turn(self, value: float) -> None:
        for keeper in self.keepers:
            setattr(keeper, self.knob.name, value)

    @contextlib.contextmanager
    def unless_done(self) -> Iterator[None]:
        """Where the `with` block fails, every depth has the value again that it had before."""
        before = [getattr(keeper, self.knob.name) for keeper in self.keepers]
        try:
            yield
        except BaseException:
            for keeper, value in zip(self.keepers, before, strict=True):
                setattr(keeper, self.knob.name, value)
            raise

    def settle(self, value: float) -> None:
        """Turn it, and write the value into `model.pruning.config`."""
        self.turn(value)
        record = pruning(self.model)
        config = record.config.replace(keep=record.config.part("keep").replace(**{self.knob.name: value}))
        object.__setattr__(self.model, "pruning", dataclasses.replace(record, config=config))


class _Search:
    """Mean MACs as a function of the knob, and the bisection on it."""

    def __init__(self, model: nn.Module, inputs: Sequence[Batch], progress: Any):
        self.model, self.inputs, self.progress = model, inputs, progress
        self.dial, self.meter = Dial(model), Meter(model)
        self.knob = self.dial.knob

    def measure(self, value: float) -> Calibration:
        self.dial.turn(value)
        found = _measured(self.model, self.meter, self.dial, self.inputs)
        if self.progress is not None:
            self.progress(value, found.reduction)
        return found

    def find(self, reduction: float, tolerance: float) -> Calibration:
        """The value that meets the target. What is saved need not rise or fall all the way: any crossing will do.

        A share of the dense MACs that were measured with each value: a decoder says other words with other tokens.
        """
        tried = [self.measure(self.knob.at(0.0)), self.measure(self.knob.at(1.0))]
        starts_below = tried[0].reduction > reduction
        between = (0.0, 1.0) if (tried[1].reduction > reduction) != starts_below else self._crossing(reduction, tried)

        def off(found: Calibration) -> float:
            return abs(found.reduction - reduction)

        while between and min(map(off, tried)) > tolerance * (1 - reduction) and len(tried) < _MOST_TRIED:
            low, high = between
            middle = (low + high) / 2
            tried.append(self.measure(self.knob.at(middle)))
            between = (middle, high) if (tried[-1].reduction > reduction) == starts_below else (low, middle)
        best = min(tried, key=off)
        if off(best) > tolerance * (1 - reduction):
            raise BudgetError(self._missed(reduction, tolerance, tried, best), best)
        return best

    def _crossing(self, reduction: float, tried: list[Calibration]) -> tuple[float, float] | None:
        """Two places between which the target is crossed first; None where no step has it beyond."""
        below = tried[0].reduction > reduction
        for step in range(1, _STEPS):
            tried.append(self.measure(self.knob.at(step / _STEPS)))
            if (tried[-1].reduction > reduction) != below:
                return (step - 1) / _STEPS, step / _STEPS
        return None

    def _missed(self, reduction: float, tolerance: float, tried: Sequence[Calibration], best: Calibration) -> str:
        keep, knob = str(pruning(self.model).config.keep), self.knob
        least, most = (f(one.reduction for one in tried) for f in (min, max))
        nearest = f"the nearest is {best.reduction:.1%} at {knob.name}={best.value:g}"
        if least < reduction < most:
            return (
                f"no {knob.name} of keep={keep!r} leaves {1 - reduction:.1%} of the MACs to within {tolerance:.1%} of them: "
                f"its counts jump there, and {nearest}. Ask for that, for a larger tolerance=, or use keep='distortion'"
            )
        return (
            f"reduction={reduction} is out of reach of keep={keep!r}: {knob.name} from {knob.low:g} to {knob.high:g} saves "
            f"{least:.1%} to {most:.1%}, and {nearest}. Ask for another reduction, prune at other depths (at=...), or use "
            "keep='distortion' or keep='ratio'"
        )


def _measured(model: nn.Module, meter: Meter, dial: Dial, batches: Iterable[Batch]) -> Calibration:
    macs = dense = instances = 0.0
    for batch in batches:
        with evaluating(model), torch.no_grad(), collect() as traces:
            _run(model, batch)
        cost = meter(traces)
        macs, dense, instances = macs + cost.total, dense + cost.dense_total, instances + cost.instances
    return Calibration(dial.knob.name, dial.value, macs / instances, dense / instances)


@contextlib.contextmanager
def _keeping_all(model: nn.Module) -> Iterator[None]:
    """Within the `with` block every token stays; scores and guidance are computed still."""
    kept = []
    for pruner in [
        m for tower in pruning(model).towers.values() for m in tower.pruners.modules() if isinstance(m, Pruner)
    ]:
        kept.append((pruner, pruner.keeper))
        pruner.keeper = Ratio(pruner.scorer.site, ratio=1.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedGuideWarning)  # of no matter where everything stays
            yield
    finally:
        for pruner, keeper in kept:
            pruner.keeper = keeper


def _run(model: nn.Module, batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if callable(batch) and not isinstance(batch, Tensor):
        return batch(model)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _free(tokens: PackedTokens) -> Tensor:
    return tokens.x[tokens.free]


def _keepers(tower: PrunedEncoder) -> list[KeepRatioPredictor]:
    return [module for module in tower.pruners.modules() if isinstance(module, KeepRatioPredictor)]
