"""MACs and what is saved of them, in words: percentages, targets, changes, and notes on towers."""

from __future__ import annotations

from collections.abc import Mapping

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_ALONE = 0.95  # from such a part of all that is saved on, it is one tower's
_LITTLE = 0.05  # a tower that saves less of its own MACs is about as slow as dense


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as a percentage, "50.0 %"; what rounds to zero has no sign."""
    return f"{round(100 * fraction, digits) + 0.0:.{digits}f} %"


def unit_of(macs: float) -> tuple[float, str]:
    """The unit to print MACs in: (1e9, "G")."""
    return next((unit for unit in _UNITS if unit[0] <= macs), _UNITS[-1])


def format_target(reduction: float | Mapping[str, float], unit: str = " %") -> str:
    """A target in words: "50 %" for one of all towers, "image 50 %, text 30 %" for one of each."""
    if isinstance(reduction, Mapping):
        return ", ".join(f"{tower} {format_target(one, unit)}" for tower, one in reduction.items())
    return f"{100 * reduction:g}{unit}"


def format_saving(macs: float, dense: float, padding: float = 0.0) -> str:
    """MACs against those of the dense model on the tokens that are there, and those that it spends on padding."""
    return (
        f"{macs / 1e9:.3f} GMACs, {format_change(macs, dense)} than dense ({dense / 1e9:.3f}){format_padding(padding)}"
    )


def format_change(macs: float, dense: float) -> str:
    """How many MACs fewer than dense, or how many more."""
    change = 1 - macs / dense
    return f"{percent(abs(change))} {'fewer' if change >= 0 else 'MORE'}"


def format_padding(padding: float) -> str:
    """MACs of the dense model on padding, as the tail of a sentence; empty where there are none."""
    return f"; dense spends {padding / 1e9:.3f} more on padding, which is skipped" if padding > 0 else ""


def format_tower_saving(tower: str, savings: Mapping[str, float]) -> str:
    """A tower's part of all that is saved, as the tail of a sentence; empty where one tower saves, or none."""
    return f"; {percent(savings[tower], 0)} of the saving" if len(savings) > 1 else ""


def saving_by_tower(towers: Mapping[str, tuple[float, float]], saved: float) -> dict[str, float]:
    """Per tower, its part of all MACs that were saved; empty where none were.

    Args:
        towers: per tower, its MACs and its dense MACs.
        saved: MACs that all towers together save.
    """
    return {tower: (dense - macs) / saved for tower, (macs, dense) in towers.items()} if saved > 0 else {}


def note_on_towers(savings: Mapping[str, float], reductions: Mapping[str, float], reduction: float) -> str:
    """A sentence where nearly all that is saved is one of several towers', or nothing is saved; empty otherwise.

    Args:
        savings: per tower, its part of all that is saved.
        reductions: per tower, the fraction of its own dense MACs that is saved.
        reduction: the fraction of all dense MACs that is saved.
    """
    if reduction <= 0:
        return "Nothing is saved: this model is no faster than the dense one."
    alone = [tower for tower, part in savings.items() if part >= _ALONE and len(savings) > 1]
    slow = [tower for tower, part in reductions.items() if part < _LITTLE and len(reductions) > 1]
    notes = [f"Nearly all of the saving ({percent(savings[tower], 0)}) is the {tower} tower's." for tower in alone]
    notes += [
        f"The {tower} tower by itself spends {percent(1 - reductions[tower])} of its dense MACs, and is no faster than dense."
        for tower in slow
    ]
    return " ".join(notes)
