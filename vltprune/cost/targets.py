"""Targets of a calibration: a fraction of the dense MACs to save, of a model or of a tower, or a number of visual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..pruning.model import get_pruning
from .budget_control import BudgetControl
from .describe import percent
from .macs import CostMeter
from .savings import Calibration


@dataclass(frozen=True)
class Target:
    """What one value of a knob is searched for.

    Attributes:
        reduction: fraction of the dense MACs to save; None for a number of visual tokens.
        tower: the tower whose MACs are meant; None for those of the whole model.
        visual_tokens: visual tokens at the input of a layer, mean over layers and prompts; None for MACs.
    """

    reduction: float | None
    tower: str | None = None
    visual_tokens: float | None = None

    def saved(self, found: Calibration) -> float:
        """The fraction that is saved, of MACs or of visual tokens.

        Args:
            found: what was measured.

        Returns:
            The fraction; below 0 where more is spent.

        Raises:
            ValueError: where the batches have no images, or did not run the tower.
        """
        if self.visual_tokens is not None:
            if found.visual_tokens is None or found.dense_visual_tokens is None:
                raise ValueError(
                    f"visual_tokens={self.visual_tokens:g}: none of the batches has images: give pixel_values too"
                )
            return 1 - found.visual_tokens / found.dense_visual_tokens
        if self.tower is None:
            return found.reduction
        if self.tower not in found.towers:
            raise ValueError(f"none of the batches ran the {self.tower} tower: give inputs that it reads too")
        return found.towers[self.tower].reduction

    def to_save(self, found: Calibration) -> float:
        """The fraction that is to be saved.

        Args:
            found: what was measured at any value of the knob.

        Returns:
            The fraction, in (0, 1).

        Raises:
            ValueError: for as many visual tokens as the prompts have, or more.
        """
        if self.reduction is not None:
            return self.reduction
        assert self.visual_tokens is not None and found.dense_visual_tokens is not None  # `saved` was asked before
        if self.visual_tokens >= found.dense_visual_tokens:
            raise ValueError(
                f"visual_tokens={self.visual_tokens:g} leaves nothing to prune: the prompts have "
                f"{found.dense_visual_tokens:.1f} on average"
            )
        return 1 - self.visual_tokens / found.dense_visual_tokens

    def describe(self, found: Calibration) -> str:
        """What is saved, or how many visual tokens are left, in words."""
        saved = self.saved(found)
        return percent(saved) if self.visual_tokens is None else f"{found.visual_tokens:.1f} visual tokens"

    def __str__(self) -> str:
        whose = "" if self.tower is None else f" of the {self.tower} tower"
        return (
            f"reduction={self.reduction}{whose}"
            if self.visual_tokens is None
            else f"visual_tokens={self.visual_tokens:g}"
        )


def check_targets(
    model: nn.Module, reduction: float | Mapping[str, float] | None, visual_tokens: float | None = None
) -> None:
    """Refuses a target that `calibrate` cannot search for.

    Args:
        model: a pruned model, wrapped or not.
        reduction: the fraction of the dense MACs to save, or one for each tower; None where there is another target.
        visual_tokens: the visual tokens that are to be left on average; None where there is another target.

    Raises:
        TypeError: for a dense model.
        ValueError: for two targets, for one outside its range, and for a tower that the model lacks or does not prune, or
            whose keeper has no knob.
    """
    towers = get_pruning(model).towers
    if visual_tokens is not None:
        if reduction is not None:
            raise ValueError(
                f"reduction={reduction} and visual_tokens={visual_tokens} are two targets of one knob: give one of them"
            )
        if isinstance(visual_tokens, bool) or not visual_tokens > 0:
            raise ValueError(f"visual_tokens={visual_tokens} must be above 0: the visual tokens left, mean over layers")
        BudgetControl(model)
        return
    by_tower = dict(reduction) if isinstance(reduction, Mapping) else {}
    for target in by_tower.values() if by_tower else (reduction,):
        if target is None or isinstance(target, (bool, Mapping)) or not 0 < target < 1:
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


def check_language(meter: CostMeter, visual_tokens: float | None, decode: int) -> None:
    """Refuses targets of language models for a model without one.

    Args:
        meter: the model's CostMeter.
        visual_tokens, decode: as in `calibrate`.

    Raises:
        TypeError: for a model without a language model that reads an image tower's tokens.
        ValueError: for a negative number of tokens.
    """
    if isinstance(decode, bool) or not isinstance(decode, int) or decode < 0:
        raise ValueError(
            f"decode={decode} must be a whole number of 0 or more: the tokens generated behind each prompt"
        )
    asked = f"visual_tokens={visual_tokens}" if visual_tokens is not None else f"decode={decode}" if decode else None
    if asked is not None and meter.language is None:
        raise TypeError(
            f"{asked} is of a vision-language model with a language model, and a {type(meter.host).__name__} has none that "
            "reads visual tokens: give reduction= alone"
        )
