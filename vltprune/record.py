"""What `prune` notes of a model: its config, its dense model, its guide and its pruned towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from .config import PruneConfig
from .layers import AlignmentGuide

if TYPE_CHECKING:
    from .pruner import PrunedEncoder


@dataclass(frozen=True)
class Pruning:
    """What `prune` made of a model: its config, the dense model, the guide that its towers share, the pruned towers."""

    config: PruneConfig
    host: nn.Module
    guide: AlignmentGuide | None
    towers: Mapping[str, PrunedEncoder]


class Noted:
    """A tower's record of its own pruning, where it is a model by itself; a tower of a composite model has none.

    The record is completed with the tower each time it is read. Noted in the tower, it would refer to the tower itself, and
    the weights of a model that nobody holds any more would stay until Python looks for such circles.
    """

    tower: str

    @property
    def pruning(self) -> Pruning:
        if "_noted" not in self.__dict__:
            raise AttributeError(f"the {self.tower} tower is no model by itself: its composite model has `pruning`")
        this: Any = self
        return replace(self.__dict__["_noted"], towers={self.tower: this})

    @pruning.setter
    def pruning(self, record: Pruning) -> None:
        self.__dict__["_noted"] = replace(record, towers={})
