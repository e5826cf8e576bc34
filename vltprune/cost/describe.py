"""MACs and what is saved of them, in words: percentages, targets, changes, and notes on towers."""

from __future__ import annotations

from collections.abc import Mapping

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_ALONE = 0.95  # from such a part of all that is saved on, it is one tower's
_LITTLE = 0.05  # a tower that saves less of its own MACs is about as slow as dense


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as a percentage, such as "50.0 %".

    Args:
        fraction: the fraction, 1 for 100 %.
        digits: the number of digits after the point.

    Returns:
        The text. What rounds to zero has no sign.
    """
    return f"{round(100 * fraction, digits) + 0.0:.{digits}f} %"


def unit_of(macs: float) -> tuple[float, str]:
    """The unit to print MACs in: (1e9, "G")."""
    return next((unit for unit in _UNITS if unit[0] <= macs), _UNITS[-1])


def format_target(reduction: float | Mapping[str, float], unit: str = " %") -> str:
    """A target in words: "50 %" for one of all towers, "image 50 %, text 30 %" for one of each.

    Args:
        reduction: the fraction of the dense MACs to save, or one for each tower.
        unit: the text after each number.

    Returns:
        The text.
    """
    if isinstance(reduction, Mapping):
        return ", ".join(f"{tower} {format_target(one, unit)}" for tower, one in reduction.items())
    return f"{100 * reduction:g}{unit}"


def format_saving(macs: float, dense: float, padding: float = 0.0) -> str:
    """MACs of a pruned model in words, against those of the dense one.

    Args:
        macs: MACs of the pruned model.
        dense: MACs of the dense model on the tokens that are there.
        padding: MACs that the dense model spends on padding besides.

    Returns:
        The text, in GMACs.
    """
    return (
        f"{macs / 1e9:.3f} GMACs, {format_change(macs, dense)} than dense ({dense / 1e9:.3f}){format_padding(padding)}"
    )


def format_change(macs: float, dense: float) -> str:
    """The change of MACs in words: how many percent fewer than dense, or how many more.

    Args:
        macs: MACs of the pruned model.
        dense: MACs of the dense model, above 0.

    Returns:
        The text, such as "50.0 % fewer".
    """
    change = 1 - macs / dense
    return f"{percent(abs(change))} {'fewer' if change >= 0 else 'MORE'}"


def format_padding(padding: float) -> str:
    """MACs of the dense model on padding, as the tail of a sentence; empty where there are none."""
    return f"; dense spends {padding / 1e9:.3f} more on padding, which is skipped" if padding > 0 else ""


def format_tower_saving(tower: str, savings: Mapping[str, float]) -> str:
    """A tower's part of all that is saved, as the tail of a sentence.

    Args:
        tower: the tower's name.
        savings: per tower, its part of all that is saved.

    Returns:
        The text, such as "; 80 % of the saving"; empty where one tower saves, or none.
    """
    return f"; {percent(savings[tower], 0)} of the saving" if len(savings) > 1 else ""


def saving_by_tower(towers: Mapping[str, tuple[float, float]], saved: float) -> dict[str, float]:
    """The part of each tower in all MACs that were saved.

    Args:
        towers: per tower, its MACs and its dense MACs.
        saved: MACs that the whole model saves.

    Returns:
        Per tower, its part, 1 for all; empty where nothing was saved.
    """
    return {tower: (dense - macs) / saved for tower, (macs, dense) in towers.items()} if saved > 0 else {}


def note_on_towers(savings: Mapping[str, float], reductions: Mapping[str, float], reduction: float) -> str:
    """A note where nearly all that is saved is one of several towers', where a tower is as slow as dense, or nothing is saved.

    Args:
        savings: per tower, its part of all that is saved.
        reductions: per tower, the fraction of its own dense MACs that is saved.
        reduction: the fraction of all dense MACs that is saved.

    Returns:
        One or several sentences; empty otherwise.
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
