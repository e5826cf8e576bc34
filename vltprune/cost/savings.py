"""MACs of a model and of each of its towers, dense and pruned, and what is saved, as numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

_ALONE = 0.95  # from such a share of all that is saved on, it is one tower's
_LITTLE = 0.05  # a tower that saves less of its own MACs is about as slow as dense


@dataclass(frozen=True)
class Cost:
    """MACs of one call.

    towers           per tower name, [depths + 2, instances of the tower]: before, in and after its blocks
    dense            the same for the dense host, on the tokens that are there: padding left out
    head             of what stands behind the towers, once an instance
    instances        sentences, or images where there is no text
    decoder          of a decoder, in the whole call
    dense_decoder    the same for as many tokens behind the dense towers
    padding          per tower name, [depths + 2, instances]: what the dense host spends on padding besides
    decoder_padding  the same of a decoder, which looks at the padding of a dense tower
    """

    towers: dict[str, Tensor]
    dense: dict[str, Tensor]
    head: float
    instances: int
    decoder: float = 0.0
    dense_decoder: float = 0.0
    padding: dict[str, Tensor] = field(default_factory=dict)
    decoder_padding: float = 0.0

    @property
    def total(self) -> float:
        """MACs of the whole call."""
        return _total(self.towers) + self.head * self.instances + self.decoder

    @property
    def dense_total(self) -> float:
        """MACs of the dense model in the whole call, on the tokens that are there."""
        return _total(self.dense) + self.head * self.instances + self.dense_decoder

    @property
    def skipped(self) -> float:
        """MACs that the dense model spends on padding besides, and that the pruned one skips."""
        return _total(self.padding) + self.decoder_padding

    @property
    def padded_total(self) -> float:
        """All that the dense model computes, padding included."""
        return self.dense_total + self.skipped

    @property
    def reduction(self) -> float:
        """The share of `dense_total` that was saved; padding counts neither as spent nor as saved."""
        return 1 - self.total / self.dense_total

    @property
    def reductions(self) -> dict[str, float]:
        """Per tower, the share of its own dense MACs that was saved."""
        return {tower: 1 - float(macs.detach().sum() / self.dense[tower].sum()) for tower, macs in self.towers.items()}

    @property
    def shares(self) -> dict[str, float]:
        """Per tower, its part of all that was saved; what is missing from 1 is a decoder's. Empty where nothing was."""
        spent = {tower: float(macs.detach().sum()) for tower, macs in self.towers.items()}
        towers = {tower: (macs, float(self.dense[tower].sum())) for tower, macs in spent.items()}
        return shares(towers, self.dense_total - self.total)


def _total(towers: Mapping[str, Tensor]) -> float:
    """MACs of all towers together; a number, also in soft training, where MACs have gradients."""
    return sum(float(macs.detach().sum()) for macs in towers.values())


@dataclass(frozen=True)
class TowerCalibration:
    """What one tower spends and saves: MACs per instance of the model, pruned, dense, and of the dense tower on padding.

    knob, value: what sets its keepers; None where they have no knob, or the tower is not pruned.
    """

    macs: float
    dense_macs: float
    padding: float = 0.0
    knob: str | None = None
    value: float | None = None

    @property
    def reduction(self) -> float:
        """The share of the tower's dense MACs that was saved."""
        return 1 - self.macs / self.dense_macs


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found: the knob and its value, and MACs per instance, pruned and dense. As text, it says whose they are.

    knob, value  of all towers; None where they have knobs, or values, of their own, which `towers` says
    dense_macs   of the dense model on the tokens that are there; `padding`, what it spends on padding besides
    towers       the same of each tower; what is missing from the sums is of a head or a decoder
    """

    knob: str | None
    value: float | None
    macs: float
    dense_macs: float
    padding: float = 0.0
    towers: Mapping[str, TowerCalibration] = field(default_factory=dict)

    @property
    def reduction(self) -> float:
        """The share of the dense MACs that was saved; padding counts neither as spent nor as saved."""
        return 1 - self.macs / self.dense_macs

    @property
    def shares(self) -> dict[str, float]:
        """Per tower, its part of all that was saved; what is missing from 1 is a decoder's. Empty where nothing was."""
        towers = {name: (one.macs, one.dense_macs) for name, one in self.towers.items()}
        return shares(towers, self.dense_macs - self.macs)

    @property
    def note(self) -> str:
        """A sentence where nearly all that is saved is one tower's, or nothing is saved; empty otherwise."""
        return whose(self.shares, {name: t.reduction for name, t in self.towers.items()}, self.reduction)

    def __str__(self) -> str:
        lines = [_set(self.knob, self.value) + saving(self.macs, self.dense_macs, self.padding)]
        for name, tower in self.towers.items() if len(self.towers) > 1 else ():
            own = _set(tower.knob, tower.value) if self.value is None else ""
            told = saving(tower.macs, tower.dense_macs, tower.padding)
            lines.append(f"  {name} tower: {own}{told}{share(name, self.shares)}")
        return "\n".join([*lines, self.note] if self.note else lines)


def _set(knob: str | None, value: float | None) -> str:
    return "" if knob is None or value is None else f"{knob}={value:.4g}: "


def asked(reduction: float | Mapping[str, float], unit: str = " %") -> str:
    """A target in words: "50 %" for one of all towers, "image 50 %, text 30 %" for one of each."""
    if isinstance(reduction, Mapping):
        return ", ".join(f"{tower} {asked(share, unit)}" for tower, share in reduction.items())
    return f"{100 * reduction:g}{unit}"


def saving(macs: float, dense: float, padding: float = 0.0) -> str:
    """What was saved: MACs, the dense model's on the tokens that are there, and what that spends on padding besides."""
    return f"{macs / 1e9:.3f} GMACs, {less(macs, dense)} than dense ({dense / 1e9:.3f}){skipped(padding)}"


def less(macs: float, dense: float) -> str:
    """How many MACs fewer than dense, or how many more."""
    change = 1 - macs / dense
    return f"{abs(change):.1%} {'fewer' if change >= 0 else 'MORE'}"


def skipped(padding: float) -> str:
    """What the dense model spends on padding, as the tail of a sentence; empty where there is none."""
    return f"; dense spends {padding / 1e9:.3f} more on padding, which is skipped" if padding > 0 else ""


def shares(towers: Mapping[str, tuple[float, float]], saved: float) -> dict[str, float]:
    """Per tower, its part of all MACs that were saved; empty where none were. towers: MACs of each, and its dense MACs."""
    return {tower: (dense - macs) / saved for tower, (macs, dense) in towers.items()} if saved > 0 else {}


def share(tower: str, shares: Mapping[str, float]) -> str:
    """A tower's part of all that is saved, as the tail of a sentence; empty where there is but one tower, or nothing saved."""
    return f"; {shares[tower]:.0%} of the saving" if len(shares) > 1 else ""


def whose(shares: Mapping[str, float], reductions: Mapping[str, float], reduction: float) -> str:
    """A sentence where nearly all that is saved is one of several towers', or nothing is saved; empty otherwise.

    shares: per tower, its part of all that is saved; reductions: per tower, the share of its own MACs; reduction: of all.
    """
    if reduction <= 0:
        return "Nothing is saved: this model is no faster than the dense one."
    alone = [tower for tower, part in shares.items() if part >= _ALONE and len(shares) > 1]
    slow = [tower for tower, part in reductions.items() if part < _LITTLE and len(reductions) > 1]
    told = [f"Nearly all of the saving ({shares[tower]:.0%}) is the {tower} tower's." for tower in alone]
    told += [
        f"The {tower} tower by itself spends {1 - reductions[tower]:.1%} of its dense MACs, and is no faster than dense."
        for tower in slow
    ]
    return " ".join(told)
