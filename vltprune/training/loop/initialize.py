"""Initial state of a fresh run: the guide's anchors, the knobs, and the work of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...cost.guide_fit import fit_guide
from ...cost.macs import CostMeter
from ...pruning.model import get_pruning
from ...utils.modes import evaluating
from ...utils.progress import counted
from ..losses.decoding import DecodeWork
from ..progress import announced
from .budget import TrainBudget


def initialize(
    model: nn.Module, batches: Sequence[Any], budget: TrainBudget, meter: CostMeter, show: bool
) -> DecodeWork | None:
    """Fits an untrained guide, sets the knobs to their first targets, and measures what decoding costs.

    Args:
        model: the pruned model.
        batches: as `calibration_batches` makes them.
        budget: the run's.
        meter: the model's cost meter.
        show: whether progress is printed.

    Returns:
        The work of a decoder, None for a model that has none or saves nothing.

    Raises:
        ValueError: there are no batches to fit the guide to, as where no record can be opened.
    """
    config = budget.config
    with evaluating(model):  # here, and not again for each of many measurements
        guide = get_pruning(model).guide
        if guide is not None and guide.is_untrained:
            with announced("placing the guide's anchors among their tokens, by k-means", show) as bar:
                fit_guide(model, counted(batches, bar), config.seed, progress=False)
        if not config.reduction:
            return None
        if config.budget == "controller":
            with announced("measuring MACs, to set the knob", show) as bar:
                budget.initialize(batches, bar.update, meter)
        with announced("measuring what decoding costs, where there is a decoder", show) as bar:
            return DecodeWork.measure(model, counted(batches, bar))
