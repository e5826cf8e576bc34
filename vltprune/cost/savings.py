"""MACs of a model and of each of its towers, dense and pruned: of one call, and of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..utils.table import table
from .describe import format_change, note_on_towers, percent, saving_by_tower, unit_of


@dataclass(frozen=True)
class Cost:
    """MACs of one call of a pruned model, and of the dense model in its place. `print` shows them as a table.

    Attributes:
        towers: per tower, MACs [depths + 2, instances of the tower]: before its blocks, in each, and behind them.
        dense: the same of the dense model, on the tokens that are there, without padding.
        head: MACs per instance of what follows the towers, such as a classifier of pairs.
        instances: how many instances the call had: texts, or images where there is no text.
        decoder: MACs of a decoder in the whole call; a scalar with gradients where soft training keeps visual tokens in part.
        dense_decoder: the same for as many generated tokens behind the dense towers.
        padding: per tower, MACs [depths + 2, instances] that the dense model spends on padding besides.
        decoder_padding: MACs that a decoder spends on the padding of a dense tower.
    """

    towers: dict[str, Tensor]
    dense: dict[str, Tensor]
    head: float
    instances: int
    decoder: float | Tensor = 0.0
    dense_decoder: float = 0.0
    padding: dict[str, Tensor] = field(default_factory=dict)
    decoder_padding: float = 0.0

    @property
    def total(self) -> float:
        """MACs of the whole call."""
        return sum(self._spent(self.towers).values()) + self.head * self.instances + self.decoder_total

    @property
    def dense_total(self) -> float:
        """MACs of the dense model in the whole call, on the tokens that are there."""
        return sum(self._spent(self.dense).values()) + self.head * self.instances + self.dense_decoder

    @property
    def padding_total(self) -> float:
        """MACs that the dense model spends on padding in addition, and that the pruned one skips."""
        return sum(self._spent(self.padding).values()) + self.decoder_padding

    @property
    def padded_total(self) -> float:
        """MACs of the dense model in the whole call, padding included."""
        return self.dense_total + self.padding_total

    @property
    def reduction(self) -> float:
        """The fraction of `dense_total` that was saved; padding counts neither as spent nor as saved."""
        return 1 - self.total / self.dense_total

    @property
    def reductions(self) -> dict[str, float]:
        """Per tower, the fraction of its own dense MACs that was saved."""
        dense = self._spent(self.dense)
        return {tower: 1 - macs / dense[tower] for tower, macs in self._spent(self.towers).items()}

    @property
    def saving_by_tower(self) -> dict[str, float]:
        """Per tower, its part of all that was saved; what is missing from 1 is a decoder's. Empty where nothing was."""
        dense = self._spent(self.dense)
        towers = {tower: (macs, dense[tower]) for tower, macs in self._spent(self.towers).items()}
        return saving_by_tower(towers, self.dense_total - self.total)

    @property
    def decoder_total(self) -> float:
        """MACs of the decoder in the whole call, a number also in soft training."""
        return float(self.decoder.detach()) if isinstance(self.decoder, Tensor) else self.decoder

    @staticmethod
    def _spent(towers: Mapping[str, Tensor]) -> dict[str, float]:
        """Per tower, MACs of all depths and instances; numbers, also in soft training, where MACs have gradients."""
        return {tower: float(macs.detach().sum()) for tower, macs in towers.items()}

    def __str__(self) -> str:
        dense, padding = self._spent(self.dense), self._spent(self.padding)
        head = self.head * self.instances
        parts = {
            tower: (dense[tower], macs, padding.get(tower, 0.0)) for tower, macs in self._spent(self.towers).items()
        }
        parts |= {"head": (head, head, 0.0)} if head else {}
        parts |= (
            {"decoder": (self.dense_decoder, self.decoder_total, self.decoder_padding)} if self.dense_decoder else {}
        )
        parts |= {"total": (self.dense_total, self.total, self.padding_total)} if len(parts) > 1 else {}
        scale, unit = unit_of(self.padded_total)
        whose = "1 instance" if self.instances == 1 else f"{self.instances} instances"
        rows = [[f"{unit}MACs, {whose}", "dense", "pruned", "saved", "padding"]]
        for name, (full, pruned, padded) in parts.items():
            numbers = [f"{full / scale:.3f}", f"{pruned / scale:.3f}", percent(1 - pruned / full)]
            rows.append([name, *numbers, f"{padded / scale:.3f}"])
        return table(rows)


@dataclass(frozen=True)
class TowerCalibration:
    """What one tower spends and saves after `calibrate`.

    Attributes:
        macs: MACs of the pruned tower, per instance of the model.
        dense_macs: MACs of the dense tower on the tokens that are there, per instance of the model.
        padding: MACs that the dense tower spends on padding besides, per instance of the model.
        knob, value: what sets its keepers; None where they have no knob, or the tower is not pruned.
    """

    macs: float
    dense_macs: float
    padding: float = 0.0
    knob: str | None = None
    value: float | None = None

    @property
    def reduction(self) -> float:
        """The fraction of the tower's dense MACs that was saved."""
        return 1 - self.macs / self.dense_macs


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found: the knob, its value, and what the model spends and saves with it. `print` shows one line.

    Attributes:
        knob, value: of all towers; None where towers have knobs or values of their own, which `towers` holds.
        macs: MACs of the pruned model, per instance; of the tokens that are generated too, where they were to count.
        dense_macs: MACs of the dense model on the tokens that are there, per instance.
        padding: MACs that the dense model spends on padding besides, per instance.
        towers: the same of each tower; what is missing from the sums is of a head or a decoder.
        visual_tokens: visual tokens at the input of a layer of the language model, mean over layers and prompts: what papers
            mean by "192 tokens". None for a model without a language model, and for calls without images.
        dense_visual_tokens: visual tokens of the whole prompts, mean over prompts. None as `visual_tokens`.
    """

    knob: str | None
    value: float | None
    macs: float
    dense_macs: float
    padding: float = 0.0
    towers: Mapping[str, TowerCalibration] = field(default_factory=dict)
    visual_tokens: float | None = None
    dense_visual_tokens: float | None = None

    @property
    def reduction(self) -> float:
        """The fraction of the dense MACs that was saved; padding counts neither as spent nor as saved."""
        return 1 - self.macs / self.dense_macs

    @property
    def saving_by_tower(self) -> dict[str, float]:
        """Per tower, its part of all that was saved; what is missing from 1 is a decoder's. Empty where nothing was."""
        towers = {name: (one.macs, one.dense_macs) for name, one in self.towers.items()}
        return saving_by_tower(towers, self.dense_macs - self.macs)

    @property
    def note(self) -> str:
        """A sentence where nearly all that is saved is one tower's, or nothing is saved; empty otherwise."""
        reductions = {name: tower.reduction for name, tower in self.towers.items()}
        return note_on_towers(self.saving_by_tower, reductions, self.reduction)

    def __str__(self) -> str:
        by_tower = self.value is None
        towers = [
            f"{name} {format_change(tower.macs, tower.dense_macs)}{_setting(tower.knob, tower.value) if by_tower else ''}"
            for name, tower in self.towers.items()
        ]
        change = f"{format_change(self.macs, self.dense_macs)} MACs{_setting(self.knob, self.value)}"
        scale, unit = unit_of(self.dense_macs)
        spent = f"{self.macs / scale:.3f} of {self.dense_macs / scale:.3f} {unit}MACs per instance"
        visual = ""
        if self.visual_tokens is not None:
            visual = f", {self.visual_tokens:.1f} of {self.dense_visual_tokens:.1f} visual tokens on average"
        return f"{change} ({spent}{visual})" + (f": {', '.join(towers)}" if len(towers) > 1 else "")


def _setting(knob: str | None, value: float | None) -> str:
    """ " at ratio=0.5"; empty where there is no one value."""
    return "" if knob is None or value is None else f" at {knob}={value:.4g}"
