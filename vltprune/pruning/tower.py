"""Tower: base class of pruned towers, with what traces and cost counters read of one."""

from __future__ import annotations

from torch import nn

from ..hosts.base import Host
from ..layers import AlignmentGuide
from .pruner import Pruner


class Tower(nn.Module):
    """A tower with pruners at some of its depths.

    Attributes:
        tower: its name in the model, such as "image".
        host: the dense tower.
        adapter: the `Host` that runs it.
        guide: the alignment guide that the towers of a model share; None without one.
        pruners: the pruners by depth, written as a string.
    """

    tower: str
    host: nn.Module
    adapter: Host
    guide: AlignmentGuide | None
    pruners: nn.ModuleDict

    def pruner(self, depth: int) -> Pruner | None:
        """The pruner at a depth, None where nothing is pruned."""
        pruner = self.pruners[str(depth)] if str(depth) in self.pruners else None  # noqa: SIM401 (ModuleDict has no get)
        assert pruner is None or isinstance(pruner, Pruner)
        return pruner
