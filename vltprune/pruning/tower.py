"""Tower: base class of pruned towers, with what traces and cost counters read of one."""

from __future__ import annotations

from torch import nn

from ..hosts.base import Host
from ..layers import AlignmentGuide
from .pruner import Pruner
from .stage import Place

# in the order in which they prune; the output of a tower is behind its last block
_IN_A_BLOCK: tuple[Place, ...] = ("before", "attention", "block")


class Tower(nn.Module):
    """A tower with pruners at some of its depths.

    Attributes:
        tower: its name in the model, such as "image".
        host: the dense tower.
        adapter: the `Host` that runs it.
        guide: the alignment guide that the towers of a model share; None without one.
        pruners: the pruners by depth and stage, as `pruner_key` names them.
        places: the place of each stage.
    """

    tower: str
    host: nn.Module
    adapter: Host
    guide: AlignmentGuide | None
    pruners: nn.ModuleDict
    places: tuple[Place, ...]

    def pruners_at(self, depth: int, place: Place | None = None) -> list[Pruner]:
        """The pruners of a block, in the order in which they prune.

        Args:
            depth: the index of the block.
            place: "before" for those before the block, "attention", or "block" for those behind it, those of the tower's output
                included. None for all.

        Returns:
            The pruners; none where nothing is pruned.
        """
        if place is None:
            return [pruner for one in _IN_A_BLOCK for pruner in self.pruners_at(depth, one)]
        found = []
        for number, where in enumerate(self.places):
            key = pruner_key(depth, number)
            pruner = self.pruners[key] if key in self.pruners else None  # noqa: SIM401 (ModuleDict has no get)
            if isinstance(pruner, Pruner) and (where if where != "output" else "block") == place:
                found.append(pruner)
        return found


def pruner_key(depth: int, stage: int) -> str:
    """The name of a pruner in its tower.

    Args:
        depth: the index of its block.
        stage: the number of its stage.

    Returns:
        The depth, with the number of the stage where it is not the first: "3", "3:1".
    """
    return f"{depth}:{stage}" if stage else str(depth)


def stage_number(key: str) -> int:
    """The number of the stage of a pruner, from its name."""
    return int(key.partition(":")[2] or 0)


def pruned_depths(tower: Tower) -> tuple[int, ...]:
    """The depths at which a tower is pruned, ascending, each once."""
    return tuple(sorted({int(key.partition(":")[0]) for key in tower.pruners}))
