"""Composites whose towers are children of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from .base import Composite, Host
from .find import find_host
from .graft import with_submodule


class WithTowers(Composite):
    """A composite whose towers are children of the model.

    Attributes:
        names: The name of each tower -> the name of the child.
    """

    names: ClassVar[Mapping[str, str]]

    def towers(self, model: nn.Module) -> dict[str, tuple[nn.Module, Host]]:
        children = {tower: model.get_submodule(name) for tower, name in self.names.items()}
        return {tower: (child, find_host(child)) for tower, child in children.items()}

    def assemble(self, model: nn.Module, towers: Mapping[str, nn.Module]) -> nn.Module:
        for tower, name in self.names.items():
            model = with_submodule(model, name, towers[tower])
        return model


class ImageAndText(WithTowers):
    """A composite of the children `visual` and `text`."""

    names: ClassVar = {"image": "visual", "text": "text"}
