"""Advice in budget errors: what to change where a cost cannot be reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..pruning.model import get_pruning
from ..pruning.part import Part
from ..pruning.stage import NAMED_ALONE, Stage
from ..pruning.tower import pruned_depths
from .budget_control import BudgetControl
from .describe import percent

_REACH_ANY = ("ratio", "distortion")  # keepers whose knob goes from all tokens to one or none


def budget_advice(
    model: nn.Module, control: BudgetControl, reduction: float, least: float, most: float, visual: float | None = None
) -> str:
    """The advice of an error: what to write where no value of a knob reaches a cost.

    Args:
        model: the pruned model.
        control: its knob, of all towers or of one.
        reduction: the fraction of the dense MACs that was to be saved, in (0, 1).
        least: the smallest fraction that a value of the knob saves.
        most: the largest fraction that one saves.
        visual: the visual tokens of a dense prompt, where the fractions are of these. None where they are of MACs.

    Returns:
        One sentence, without a period.
    """
    stages = get_pruning(model).config.stages
    names = {part.name for stage in stages for part in _keepers(stage, control.towers)}
    if least < reduction < most:
        # counts that follow from lengths alone are the same in more batches
        more = [] if all(keeper.fixed for keeper in control.keepers) else ["give more batches"]
        others = [] if "distortion" in names else ["use keep='distortion'"]
        return _either([*more, "ask for what is nearest", "pass a larger tolerance=", *others])
    others = [] if names & {*_REACH_ANY} else [f"use keep={name!r}" for name in _REACH_ANY]
    behind = all(stage.place == "output" for stage in stages)
    if reduction >= most:
        # a language model behind a tower reads fewer tokens, and saves by that
        if behind and most <= 0:
            return "Nothing is saved in a tower that is pruned behind its last block: write place='block', at=0.25, say"
        ways = [f"ask for {_beyond(most, visual, is_most=True)}"] if most > 0 else []
        if "threshold" in names and control.knob.name == "power":
            # its threshold is then near the mean of the scores, and no power moves instances that keep all their tokens
            ways.append("raise the temperature, keep='threshold(temperature=100.0)'")
        if behind:
            ways += ["prune layers of the language model too (then=...)"] if _reads_on(model) else []
        elif _has_dense_blocks(model, control):
            ways.append("prune at more depths (at=...)")
        return _either(ways + others)
    several = any(len(pruned_depths(get_pruning(model).towers[tower])) > 1 for tower in control.towers)
    ways = [f"ask for {_beyond(least, visual, is_most=False)}"]
    return _either([*ways, *(["prune at fewer depths (at=...)"] if several else []), *others])


def _beyond(fraction: float, visual: float | None, is_most: bool) -> str:
    """What to ask for: less than the most that is saved, or more than the least."""
    if visual is None:
        return f"{'less' if is_most else 'more'} than {percent(fraction)}"
    return f"{'more' if is_most else 'fewer'} than {visual * (1 - fraction):.1f} visual tokens"


def _keepers(stage: Stage, towers: Iterable[str]) -> list[Part]:
    """A stage's keepers of some towers."""
    keep = stage.keep
    return [stage.part("keep", tower) for tower in towers if not isinstance(keep, Mapping) or tower in keep]


def _reads_on(model: nn.Module) -> bool:
    """Whether a language model that is not pruned reads what the image tower leaves, and could be."""
    language = get_pruning(model).towers.get(NAMED_ALONE)
    return language is not None and not language.pruners


def _has_dense_blocks(model: nn.Module, control: BudgetControl) -> bool:
    """Whether a tower that the target is of has a block without a pruner."""
    towers = get_pruning(model).towers
    asked = towers if control.tower is None else (control.tower,)
    return any(len(pruned_depths(towers[name])) < len(towers[name].adapter.blocks(towers[name].host)) for name in asked)


def _either(ways: list[str]) -> str:
    """The ways as one sentence."""
    text = ", ".join(ways[:-1]) + (" or " if len(ways) > 1 else "") + ways[-1] if ways else "nothing more can be saved"
    return text[0].upper() + text[1:]
